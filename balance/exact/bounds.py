"""What no plan can beat: lower bounds of the slowest rank's time, and the gap to them.

A level is load / speed. Each bound holds whatever the plan does with what is still free:

* ``ideal_level``: all load over all speed, in whole tokens. Holds for any plan at all.
* ``node_level``: homes and batch-static copies are given, copies of a micro-batch and splits are
  free. Load that cannot leave a set of nodes has to be served there (Hall's condition).
* ``slot_level``: spare slots are few. A rank receives at most the heaviest experts that fit its
  spare slots, and keeps what the other ranks' spare slots cannot take.
"""

from __future__ import annotations

import torch

from balance.exact import split


def ideal_level(total_N: torch.Tensor, speed_D: torch.Tensor) -> torch.Tensor:
    """Least time in which ranks of these speeds serve a number of whole tokens.

        min t such that sum over ranks of floor(t · speed) >= total

    Args:
        total_N: int64 tokens, >= 0.
        speed_D: float64, >= 0, not all 0; ranks of speed 0 are left out.

    Returns:
        level_N float64; ceil(total / D) for speeds of 1.
    """
    speed_D = speed_D[speed_D > 0]
    limit_ND = split.integral_limits(total_N.double() / speed_D.sum(), speed_D)
    while True:
        short_N = limit_ND.sum(1) < total_N
        if not short_N.any():
            break
        limit_ND[short_N] = split.raise_limits(limit_ND[short_N], speed_D)
    return torch.maximum((limit_ND / speed_D).amax(1), total_N.double() / speed_D.sum())


def slot_level(
    load_NX: torch.Tensor, home_NX: torch.Tensor, slots_ND: torch.Tensor, speed_D: torch.Tensor
) -> torch.Tensor:
    """Least level with this many spare slots per rank, relaxed to any contents of the slots.

    Rank d serves at most its home load plus its ``slots`` heaviest other experts. With c_d that
    limit and F the load, every set S of ranks gives ``level >= (F - c(S)) / speed(not S)``.
    Likewise a rank keeps its home load less the heaviest experts that slots elsewhere can take.

    Args:
        load_NX: loads >= 0.
        home_NX: int64 home rank of each expert, in [0, D).
        slots_ND: int64 spare slots of each rank that may be filled.
        speed_D: float64, > 0.
    """
    num_ranks = len(speed_D)
    load_NX = load_NX.double()
    at_home_DNX = home_NX == torch.arange(num_ranks)[:, None, None]
    home_ND = torch.where(at_home_DNX, load_NX, 0).sum(2).T
    away_ND = _heaviest(torch.where(at_home_DNX, 0, load_NX), slots_ND)
    leave_ND = _heaviest(
        torch.where(at_home_DNX, load_NX, 0), slots_ND.sum(1, keepdim=True) - slots_ND
    )
    kept_N = ((home_ND - leave_ND) / speed_D).amax(1)
    most_ND = home_ND + away_ND
    order_ND = (most_ND / speed_D).argsort(1)
    served_ND = most_ND.gather(1, order_ND).cumsum(1).roll(1, 1)
    served_ND[:, 0] = 0
    speed_ND = speed_D[order_ND].flip(1).cumsum(1).flip(1)
    filled_N = ((load_NX.sum(1, keepdim=True) - served_ND) / speed_ND).amax(1)
    return torch.maximum(kept_N, filled_N)


def _heaviest(load_DNX: torch.Tensor, count_ND: torch.Tensor) -> torch.Tensor:
    """Sum of the ``count`` heaviest loads: [N, D]."""
    most = min(int(count_ND.max()) if count_ND.numel() else 0, load_DNX.shape[2])
    sums_DNm = load_DNX.topk(most, dim=2).values.cumsum(2)
    sums_DNm = torch.nn.functional.pad(sums_DNm, (1, 0))
    return sums_DNm.gather(2, count_ND.T.clamp(max=most)[:, :, None])[:, :, 0].T


def node_level(
    load_NE: torch.Tensor,
    node_NE: torch.Tensor,
    copy_NS: torch.Tensor,
    node_of_S: torch.Tensor,
    speed_of_node: torch.Tensor,
) -> torch.Tensor:
    """Least level of the slowest node when homes and cross-node copies are given.

    Args:
        load_NE: loads >= 0 of N problems.
        node_NE: int64 home node of each expert.
        copy_NS: int64 expert in each cross-node slot, -1 for none.
        node_of_S: int64 node of each cross-node slot.
        speed_of_node: float64 sum of rank speeds of each node, > 0.
    """
    level_N, _ = split.bottleneck(load_NE, node_NE, copy_NS, node_of_S, speed_of_node)
    return level_N
