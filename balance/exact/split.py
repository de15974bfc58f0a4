"""The best split of tokens over given copies: how many tokens does each copy serve?

Up to eight ranks the optimum is a closed form (``balance.exact.rank_sets``) and the split is read
off the same table, one copy after the other: a copy may serve any number of tokens between what
the other copies cannot take and what its rank can still take, and any choice in between leaves
the rest solvable. With integer limits both ends are integers, so quotas are whole tokens and
optimal as such; no fraction is ever rounded. Beyond eight ranks ``balance.exact.flow`` does the
same.

All problems of a batch are solved at once: F problems of X experts, D ranks and J extra slots.
"""

import numpy as np
import torch

from balance.exact import flow, rank_sets


def bottleneck(
    load_FX: torch.Tensor,
    home_FX: torch.Tensor,
    copy_FJ: torch.Tensor,
    rank_of_J: torch.Tensor,
    speed_D: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least time of the slowest rank over given copies, and the set of ranks that proves it.

        level = max over sets u of (load of experts with all copies inside u) / speed(u)

    Args:
        load_FX: loads >= 0, any numeric dtype.
        home_FX: int64 rank of each expert's home copy.
        copy_FJ: int64 expert in each extra slot, -1 for none.
        rank_of_J: int64 rank of each extra slot.
        speed_D: float64, > 0.

    Returns:
        level_F float64 and tight_FD bool, a set of ranks that attains it.
    """
    num_ranks = len(speed_D)
    if num_ranks > rank_sets.MAX_RANKS:
        return _bottleneck_by_flow(load_FX, home_FX, copy_FJ, rank_of_J, speed_D)
    mask_FX = rank_sets.copy_masks(home_FX, copy_FJ, rank_of_J)
    inside_FU = rank_sets.inside_FU(load_FX.double(), mask_FX, num_ranks)
    level_F, tight_F = (inside_FU[:, 1:] / rank_sets.total_of_U(speed_D)[1:]).max(1)
    return level_F, ((tight_F[:, None] + 1) >> torch.arange(num_ranks)) & 1 == 1


def integral_limits(level_F: torch.Tensor, speed_D: torch.Tensor) -> torch.Tensor:
    """Whole tokens that each rank can serve within a time: floor(level · speed), int64 [F, D]."""
    return torch.floor(level_F[:, None] * speed_D * (1 + 1e-12) + 1e-9).long()


def raise_limits(limit_FD: torch.Tensor, speed_D: torch.Tensor) -> torch.Tensor:
    """Limits with one more token on the rank where it takes the least time (lowest rank on ties).

    Starting from ``integral_limits`` of a lower bound, the first limits that are feasible are the
    integer optimum, since every raise moves to the next time at which any rank finishes a token.
    """
    cheapest_F = ((limit_FD + 1) / speed_D).argmin(1)
    return limit_FD.scatter_add(1, cheapest_F[:, None], torch.ones_like(limit_FD))


def integer_quotas(
    load_FX: torch.Tensor,
    home_FX: torch.Tensor,
    copy_FJ: torch.Tensor,
    rank_of_J: torch.Tensor,
    speed_D: torch.Tensor,
    wish_FJ: torch.Tensor | None = None,
) -> torch.Tensor:
    """Whole tokens for every extra copy such that the slowest rank is as fast as possible.

    Args:
        load_FX: int64 tokens per expert.
        home_FX: int64 rank of each expert's home copy.
        copy_FJ: int64 expert in each extra slot, -1 for none; one copy per expert and rank.
        rank_of_J: int64 rank of each extra slot.
        speed_D: float64, > 0.
        wish_FJ: int64 quotas >= 0 to stay near to where the optimum leaves a choice (tokens that
            are already on that rank, say); None asks for equal shares.

    Returns:
        quota_FJ int64: tokens of each extra copy, 0 for an empty slot; the home copy serves
        ``load - sum of quotas``.
    """
    level_F, _ = bottleneck(load_FX, home_FX, copy_FJ, rank_of_J, speed_D)
    limit_FD = integral_limits(level_F, speed_D)
    wish_FJ = equal_shares(load_FX, copy_FJ) if wish_FJ is None else wish_FJ
    if len(speed_D) <= rank_sets.MAX_RANKS:
        mask_FX = rank_sets.copy_masks(home_FX, copy_FJ, rank_of_J)
        return _quotas_by_table(load_FX, mask_FX, copy_FJ, rank_of_J, limit_FD, speed_D, wish_FJ)
    return _quotas_by_flow(load_FX, home_FX, copy_FJ, rank_of_J, limit_FD, speed_D, wish_FJ)


def equal_shares(load_FX: torch.Tensor, copy_FJ: torch.Tensor) -> torch.Tensor:
    """Each extra copy's equal share of its expert's load, rounded down; 0 for empty slots."""
    expert_FJ = copy_FJ.clamp(min=0)
    count_FX = torch.ones_like(load_FX).scatter_add_(1, expert_FJ, (copy_FJ >= 0).long())
    share_FJ = load_FX.gather(1, expert_FJ) // count_FX.gather(1, expert_FJ)
    return torch.where(copy_FJ >= 0, share_FJ, 0)


def _quotas_by_flow(
    load_FX: torch.Tensor,
    home_FX: torch.Tensor,
    copy_FJ: torch.Tensor,
    rank_of_J: torch.Tensor,
    limit_FD: torch.Tensor,
    speed_D: torch.Tensor,
    wish_FJ: torch.Tensor,
) -> torch.Tensor:
    """quota_FJ for any number of ranks: each problem starts from its wishes and is settled."""
    quota_FJ = torch.zeros_like(copy_FJ)
    for f, holds_XD in enumerate(_holds(home_FX, copy_FJ, rank_of_J, len(speed_D))):
        filled = (copy_FJ[f] >= 0).nonzero(as_tuple=True)[0]
        where = (copy_FJ[f, filled].numpy(), rank_of_J[filled].numpy())
        start_XD = np.zeros(holds_XD.shape, dtype=np.int64)
        start_XD[where] = wish_FJ[f, filled]
        load_X1 = load_FX[f].numpy()[:, None]
        # Wishes for more than the load are cut, later ranks first; the home serves the rest.
        start_XD = np.diff(np.minimum(start_XD.cumsum(1), load_X1), axis=1, prepend=0)
        start_XD[np.arange(len(start_XD)), home_FX[f]] = load_X1[:, 0] - start_XD.sum(1)
        load_XD = settle(start_XD, holds_XD, limit_FD[f, None], speed_D)
        quota_FJ[f, filled] = torch.from_numpy(load_XD[where])
    return quota_FJ


def _quotas_by_table(
    load_FX: torch.Tensor,
    mask_FX: torch.Tensor,
    copy_FJ: torch.Tensor,
    rank_of_J: torch.Tensor,
    limit_FD: torch.Tensor,
    speed_D: torch.Tensor,
    wish_FJ: torch.Tensor,
) -> torch.Tensor:
    """quota_FJ read off the table of sets, slot after slot, each quota as wished where it may be.

    The limits are raised until no set has more load inside than they allow it; the room that a set
    has left then says how much a copy on one of its ranks may still take.
    """
    num_ranks = len(speed_D)
    inside_FU = rank_sets.inside_FU(load_FX, mask_FX, num_ranks)
    limit_FD = limit_FD.clone()
    while True:
        short_F = (inside_FU > rank_sets.total_of_U(limit_FD)).any(1).nonzero(as_tuple=True)[0]
        if not len(short_F):
            break
        limit_FD[short_F] = raise_limits(limit_FD[short_F], speed_D)
    room_FU = rank_sets.total_of_U(limit_FD) - inside_FU
    left_FX, mask_FX = load_FX.clone(), mask_FX.clone()
    quota_FJ = torch.zeros_like(copy_FJ)
    for slot, rank in enumerate(rank_of_J.tolist()):
        filled = (copy_FJ[:, slot] >= 0).nonzero(as_tuple=True)[0]
        expert = copy_FJ[filled, slot]
        left, mask, room = left_FX[filled, expert], mask_FX[filled, expert], room_FU[filled]
        quota, room_FU[filled] = _serve_from(rank, left, mask, room, wish_FJ[filled, slot])
        quota_FJ[filled, slot] = quota
        left_FX[filled, expert] = left - quota
        mask_FX[filled, expert] = mask & ~(1 << rank)
    return quota_FJ


def _serve_from(
    rank: int,
    left_F: torch.Tensor,
    mask_F: torch.Tensor,
    room_FU: torch.Tensor,
    wish_F: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fix what the copy on ``rank`` serves of an expert: served_F, and the room_FU that is left.

    Sets that hold ``rank`` but not all copies gain what it serves; sets that hold all other copies
    but not ``rank`` gain what it leaves to them.
    """
    num_ranks = room_FU.shape[1].bit_length() - 1
    contains_UU = rank_sets.contains_UU(num_ranks)
    holds_rank_U = contains_UU[1 << rank]
    gains_served_FU = holds_rank_U & ~contains_UU[mask_F]
    gains_rest_FU = ~holds_rank_U & contains_UU[mask_F & ~(1 << rank)]
    endless = torch.iinfo(room_FU.dtype).max
    most_F = torch.where(gains_served_FU, room_FU, endless).amin(1).minimum(left_F)
    least_F = (left_F - torch.where(gains_rest_FU, room_FU, endless).amin(1)).clamp(min=0)
    served_F = wish_F.maximum(least_F).minimum(most_F)
    room_FU = room_FU - gains_served_FU * served_F[:, None]
    return served_F, room_FU - gains_rest_FU * (left_F - served_F)[:, None]


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
    load_FX: torch.Tensor,
    home_FX: torch.Tensor,
    copy_FJ: torch.Tensor,
    rank_of_J: torch.Tensor,
    speed_D: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``bottleneck`` for any number of ranks, one problem at a time."""
    num_problems, num_ranks = len(load_FX), len(speed_D)
    holds_FXD = _holds(home_FX, copy_FJ, rank_of_J, num_ranks)
    level_F = torch.zeros(num_problems, dtype=torch.float64)
    tight_FD = torch.zeros(num_problems, num_ranks, dtype=torch.bool)
    for f, load_X in enumerate(load_FX.double().numpy()):
        level, tight_D = flow.best_level(load_X, holds_FXD[f], speed_D.numpy())
        level_F[f], tight_FD[f] = level, torch.from_numpy(tight_D)
    return level_F, tight_FD


def _holds(
    home_FX: torch.Tensor, copy_FJ: torch.Tensor, rank_of_J: torch.Tensor, num_ranks: int
) -> np.ndarray:
    """[F, X, D] bool: which ranks hold a copy of each expert."""
    holds_FXD = torch.nn.functional.one_hot(home_FX, num_ranks).bool()
    problem, slot = (copy_FJ >= 0).nonzero(as_tuple=True)
    holds_FXD[problem, copy_FJ[problem, slot], rank_of_J[slot]] = True
    return holds_FXD.numpy()
