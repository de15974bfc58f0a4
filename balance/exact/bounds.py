"""What no plan can beat: lower bounds of the slowest rank's time, and the gap to them.

A level is load / speed. Each bound holds whatever the plan does with what is still free:

* ``ideal_level``: all load over all speed, in whole tokens. Holds for any plan at all.
* ``node_level``: homes and batch-static copies are given, copies of a micro-batch and splits are
  free. Load that cannot leave a set of nodes has to be served there (Hall's condition).
* ``slot_level``: spare slots are few. A rank receives at most the heaviest experts that fit its
  spare slots, and keeps what the other ranks' spare slots cannot take.
"""

import torch

from balance.exact import split


def ideal_level(total_F: torch.Tensor, speed_D: torch.Tensor) -> torch.Tensor:
    """Least time in which ranks of these speeds serve a number of whole tokens.

        min t such that sum over ranks of floor(t · speed) >= total

    Args:
        total_F: int64 tokens, >= 0.
        speed_D: float64, >= 0, not all 0; ranks of speed 0 are left out.

    Returns:
        level_F float64; ceil(total / D) for speeds of 1.
    """
    speed_D = speed_D[speed_D > 0]
    limit_FD = split.integral_limits(total_F.double() / speed_D.sum(), speed_D)
    while True:
        short_F = limit_FD.sum(1) < total_F
        if not short_F.any():
            break
        limit_FD[short_F] = split.raise_limits(limit_FD[short_F], speed_D)
    return torch.maximum((limit_FD / speed_D).amax(1), total_F.double() / speed_D.sum())


def slot_level(
    load_FX: torch.Tensor, home_FX: torch.Tensor, slots_FD: torch.Tensor, speed_D: torch.Tensor
) -> torch.Tensor:
    """Least level with this many spare slots per rank, relaxed to any contents of the slots.

    Rank d serves at most its home load plus its ``slots`` heaviest other experts. With c_d that
    limit and w the load, every set u of ranks gives ``level >= (w - c(u)) / speed(not u)``.
    Likewise a rank keeps its home load less the heaviest experts that slots elsewhere can take.

    Args:
        load_FX: loads >= 0.
        home_FX: int64 home rank of each expert, in [0, D).
        slots_FD: int64 spare slots of each rank that may be filled.
        speed_D: float64, > 0.
    """
    num_ranks = len(speed_D)
    load_FX = load_FX.double()
    at_home_DFX = home_FX == torch.arange(num_ranks)[:, None, None]
    home_FD = torch.where(at_home_DFX, load_FX, 0).sum(2).T
    away_FD = _heaviest(torch.where(at_home_DFX, 0, load_FX), slots_FD)
    leave_FD = _heaviest(
        torch.where(at_home_DFX, load_FX, 0), slots_FD.sum(1, keepdim=True) - slots_FD
    )
    kept_F = ((home_FD - leave_FD) / speed_D).amax(1)
    most_FD = home_FD + away_FD
    order_FD = (most_FD / speed_D).argsort(1)
    served_FD = most_FD.gather(1, order_FD).cumsum(1).roll(1, 1)
    served_FD[:, 0] = 0
    speed_FD = speed_D[order_FD].flip(1).cumsum(1).flip(1)
    filled_F = ((load_FX.sum(1, keepdim=True) - served_FD) / speed_FD).amax(1)
    return torch.maximum(kept_F, filled_F)


def _heaviest(load_DFX: torch.Tensor, count_FD: torch.Tensor) -> torch.Tensor:
    """Sum of the ``count`` heaviest loads: [F, D]."""
    most = min(int(count_FD.max()) if count_FD.numel() else 0, load_DFX.shape[2])
    sums_DFx = load_DFX.topk(most, dim=2).values.cumsum(2)
    sums_DFx = torch.nn.functional.pad(sums_DFx, (1, 0))
    return sums_DFx.gather(2, count_FD.T.clamp(max=most)[:, :, None])[:, :, 0].T


def node_level(
    load_FE: torch.Tensor,
    node_FE: torch.Tensor,
    copy_FJ: torch.Tensor,
    node_of_J: torch.Tensor,
    speed_N: torch.Tensor,
) -> torch.Tensor:
    """Least level of the slowest node when homes and batch-static copies are given.

    Args:
        load_FE: loads >= 0 of F problems.
        node_FE: int64 home node of each expert.
        copy_FJ: int64 expert in each batch-static slot, -1 for none.
        node_of_J: int64 node of each batch-static slot.
        speed_N: float64 sum of rank speeds of each node, > 0.
    """
    level_F, _ = split.bottleneck(load_FE, node_FE, copy_FJ, node_of_J, speed_N)
    return level_F
