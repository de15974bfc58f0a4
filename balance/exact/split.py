"""The best split of tokens over given copies: how many tokens does each copy serve?

Up to eight ranks the optimum is a closed form (``balance.exact.rank_sets``) and the split is read off the
same table, one copy after the other: a copy may serve any number of tokens between what the other
copies cannot take and what its rank can still take, and any choice in between leaves the rest
solvable. With integer limits both ends are integers, so quotas are whole tokens and optimal as
such; no fraction is ever rounded. Beyond eight ranks ``balance.exact.flow`` does the same.

All problems of a batch are solved at once: N problems, X experts each, D ranks, S extra copies.
"""

from __future__ import annotations

import numpy as np
import torch

from balance.exact import flow
from balance.exact import rank_sets as subsets


def bottleneck(
    load_NX: torch.Tensor,
    home_NX: torch.Tensor,
    copy_NS: torch.Tensor,
    rank_of_S: torch.Tensor,
    speed_D: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least time of the slowest rank over given copies, and the set of ranks that proves it.

        level = max over sets A of (load of experts with all copies inside A) / speed(A)

    Args:
        load_NX: loads >= 0, any numeric dtype.
        home_NX: int64 rank of each expert's home copy.
        copy_NS: int64 expert in each extra slot, -1 for none.
        rank_of_S: int64 rank of each extra slot.
        speed_D: float64, > 0.

    Returns:
        level_N float64 and tight_ND bool, a set of ranks that attains it.
    """
    num_ranks = len(speed_D)
    if num_ranks > subsets.MAX_RANKS:
        return _bottleneck_by_flow(load_NX, home_NX, copy_NS, rank_of_S, speed_D)
    mask_NX = subsets.copy_masks(home_NX, copy_NS, rank_of_S)
    inside_NA = subsets.inside_NA(load_NX.double(), mask_NX, num_ranks)
    level_N, tight_N = (inside_NA[:, 1:] / subsets.total_of_A(speed_D)[1:]).max(1)
    return level_N, ((tight_N[:, None] + 1) >> torch.arange(num_ranks)) & 1 == 1


def integral_limits(level_N: torch.Tensor, speed_D: torch.Tensor) -> torch.Tensor:
    """Whole tokens that each rank can serve within a time: floor(level · speed), int64 [N, D]."""
    return torch.floor(level_N[:, None] * speed_D * (1 + 1e-12) + 1e-9).long()


def raise_limits(limit_ND: torch.Tensor, speed_D: torch.Tensor) -> torch.Tensor:
    """Limits with one more token on the rank where it takes the least time (lowest rank on ties).

    Starting from ``integral_limits`` of a lower bound, the first limits that are feasible are the
    integer optimum, since every raise moves to the next time at which any rank finishes a token.
    """
    cheapest_N = ((limit_ND + 1) / speed_D).argmin(1)
    return limit_ND.scatter_add(1, cheapest_N[:, None], torch.ones_like(limit_ND))


def integer_quotas(
    load_NX: torch.Tensor,
    home_NX: torch.Tensor,
    copy_NS: torch.Tensor,
    rank_of_S: torch.Tensor,
    speed_D: torch.Tensor,
    wish_NS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Whole tokens for every extra copy such that the slowest rank is as fast as possible.

    Args:
        load_NX: int64 tokens per expert.
        home_NX: int64 rank of each expert's home copy.
        copy_NS: int64 expert in each extra slot, -1 for none; one copy per expert and rank.
        rank_of_S: int64 rank of each extra slot.
        speed_D: float64, > 0.
        wish_NS: int64 quotas >= 0 to stay near to where the optimum leaves a choice (tokens that
            are already on that rank, say); None asks for equal shares.

    Returns:
        quota_NS int64: tokens of each extra copy, 0 for an empty slot; the home copy serves
        ``load - sum of quotas``.
    """
    level_N, _ = bottleneck(load_NX, home_NX, copy_NS, rank_of_S, speed_D)
    limit_ND = integral_limits(level_N, speed_D)
    wish_NS = equal_shares(load_NX, copy_NS) if wish_NS is None else wish_NS
    if len(speed_D) <= subsets.MAX_RANKS:
        mask_NX = subsets.copy_masks(home_NX, copy_NS, rank_of_S)
        return _quotas_by_table(load_NX, mask_NX, copy_NS, rank_of_S, limit_ND, speed_D, wish_NS)
    holds_NXD = _holds(home_NX, copy_NS, rank_of_S, len(speed_D))
    quota_NS = torch.zeros_like(copy_NS)
    for n, holds_XD in enumerate(holds_NXD):
        filled = (copy_NS[n] >= 0).nonzero(as_tuple=True)[0]
        where = (copy_NS[n, filled].numpy(), rank_of_S[filled].numpy())
        start_XD = np.zeros(holds_XD.shape, dtype=np.int64)
        start_XD[where] = wish_NS[n, filled]
        load_X = load_NX[n].numpy()[:, None]
        start_XD = np.diff(np.minimum(start_XD.cumsum(1), load_X), axis=1, prepend=0)
        start_XD[np.arange(len(start_XD)), home_NX[n]] = load_X[:, 0] - start_XD.sum(1)
        load_XD = settle(start_XD, holds_XD, limit_ND[n, None], speed_D)
        quota_NS[n, filled] = torch.from_numpy(load_XD[where])
    return quota_NS


def equal_shares(load_NX: torch.Tensor, copy_NS: torch.Tensor) -> torch.Tensor:
    """Each extra copy's equal share of its expert's load, rounded down; 0 for empty slots."""
    expert_NS = copy_NS.clamp(min=0)
    count_NX = torch.ones_like(load_NX).scatter_add_(1, expert_NS, (copy_NS >= 0).long())
    share_NS = load_NX.gather(1, expert_NS) // count_NX.gather(1, expert_NS)
    return torch.where(copy_NS >= 0, share_NS, 0)


def _quotas_by_table(
    load_NX: torch.Tensor,
    mask_NX: torch.Tensor,
    copy_NS: torch.Tensor,
    rank_of_S: torch.Tensor,
    limit_ND: torch.Tensor,
    speed_D: torch.Tensor,
    wish_NS: torch.Tensor,
) -> torch.Tensor:
    num_ranks = len(speed_D)
    inside_NA = subsets.inside_NA(load_NX, mask_NX, num_ranks)
    limit_ND = limit_ND.clone()
    while True:
        short_N = (inside_NA > subsets.total_of_A(limit_ND)).any(1).nonzero(as_tuple=True)[0]
        if not len(short_N):
            break
        limit_ND[short_N] = raise_limits(limit_ND[short_N], speed_D)
    room_NA = subsets.total_of_A(limit_ND) - inside_NA
    left_NX, mask_NX = load_NX.clone(), mask_NX.clone()
    quota_NS = torch.zeros_like(copy_NS)
    for slot, rank in enumerate(rank_of_S.tolist()):
        filled = (copy_NS[:, slot] >= 0).nonzero(as_tuple=True)[0]
        expert = copy_NS[filled, slot]
        left, mask, room = left_NX[filled, expert], mask_NX[filled, expert], room_NA[filled]
        quota, room_NA[filled] = _serve(left, mask, rank, room, wish_NS[filled, slot])
        quota_NS[filled, slot] = quota
        left_NX[filled, expert] = left - quota
        mask_NX[filled, expert] = mask & ~(1 << rank)
    return quota_NS


def _serve(
    left_N: torch.Tensor,
    mask_N: torch.Tensor,
    rank: int,
    room_NA: torch.Tensor,
    wish_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fix what the copy on ``rank`` serves of an expert; returns it and the room that is left.

    Sets that hold ``rank`` but not all copies gain what it serves; sets that hold all other copies
    but not ``rank`` gain what it leaves to them.
    """
    num_ranks = room_NA.shape[1].bit_length() - 1
    contains_MA = subsets.contains_MA(num_ranks)
    holds_rank_A = contains_MA[1 << rank]
    gains_served_NA = holds_rank_A & ~contains_MA[mask_N]
    gains_rest_NA = ~holds_rank_A & contains_MA[mask_N & ~(1 << rank)]
    endless = torch.iinfo(room_NA.dtype).max
    most_N = torch.where(gains_served_NA, room_NA, endless).amin(1).minimum(left_N)
    least_N = (left_N - torch.where(gains_rest_NA, room_NA, endless).amin(1)).clamp(min=0)
    served_N = wish_N.maximum(least_N).minimum(most_N)
    room_NA = room_NA - gains_served_NA * served_N[:, None]
    return served_N, room_NA - gains_rest_NA * (left_N - served_N)[:, None]


def settle(
    load_XD: np.ndarray, holds_XD: np.ndarray, limit_1D: torch.Tensor, speed_D: torch.Tensor
) -> np.ndarray:
    """Move a split under the first limits, from these on, that some split over the copies meets.

    Args:
        load_XD: int64 split to start from.
        holds_XD: bool, where load may go.
        limit_1D: int64 most load per rank, one row.
        speed_D: float64, > 0.
    """
    result = flow.fit_under(load_XD, holds_XD, limit_1D[0].numpy())
    while result.stuck_D is not None:
        limit_1D = raise_limits(limit_1D, speed_D)
        result = flow.fit_under(result.load_XD, holds_XD, limit_1D[0].numpy())
    return result.load_XD


def _bottleneck_by_flow(
    load_NX: torch.Tensor,
    home_NX: torch.Tensor,
    copy_NS: torch.Tensor,
    rank_of_S: torch.Tensor,
    speed_D: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_problems, num_ranks = len(load_NX), len(speed_D)
    holds_NXD = _holds(home_NX, copy_NS, rank_of_S, num_ranks)
    level_N = torch.zeros(num_problems, dtype=torch.float64)
    tight_ND = torch.zeros(num_problems, num_ranks, dtype=torch.bool)
    for n, load_X in enumerate(load_NX.double().numpy()):
        level, tight_D = flow.best_level(load_X, holds_NXD[n], speed_D.numpy())
        level_N[n], tight_ND[n] = level, torch.from_numpy(tight_D)
    return level_N, tight_ND


def _holds(
    home_NX: torch.Tensor, copy_NS: torch.Tensor, rank_of_S: torch.Tensor, num_ranks: int
) -> np.ndarray:
    """[N, X, D] bool: which ranks hold a copy of each expert."""
    holds_NXD = torch.nn.functional.one_hot(home_NX, num_ranks).bool()
    problem, slot = (copy_NS >= 0).nonzero(as_tuple=True)
    holds_NXD[problem, copy_NS[problem, slot], rank_of_S[slot]] = True
    return holds_NXD.numpy()
