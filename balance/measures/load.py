"""How unequal is the work, and what did it cost to make it more equal?

Loads count assignments (tokens × choices). Time on a rank is load / speed, with speed 1 when none
is given. Every function takes the last axis as the one to balance over and keeps the others. What
is not modelled: all-to-all volume, weight copies, gradient reduction, memory.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Balance:
    """Summary of rank loads over layers and micro-batches.

    Attributes:
        imbalance_avg: mean of max / mean, from 1.0.
        imbalance_p95: 95th percentile, linear interpolation.
        imbalance_worst: maximum.
        efficiency: sum of means / sum of maxima, in (0, 1]: layers run one after the other, so
            this is the share of the step in which the average rank works.
        straggler_avg: mean of max - mean, assignments of a rank of speed 1.
    """

    imbalance_avg: float
    imbalance_p95: float
    imbalance_worst: float
    efficiency: float
    straggler_avg: float


def summarize(load_BLR: Any, speed_R: Any = None) -> Balance:
    """Summary of rank loads [..., R]; of no problems at all, perfect balance."""
    ratio = imbalance(load_BLR, speed_R)
    if not ratio.size:
        return Balance(1.0, 1.0, 1.0, 1.0, 0.0)
    return Balance(
        float(ratio.mean()),
        float(np.percentile(ratio, 95)),
        float(ratio.max()),
        efficiency(load_BLR, speed_R),
        float(straggler(load_BLR, speed_R).mean()),
    )


def summarize_bound(
    level_BL: np.ndarray, bound_BL: np.ndarray, ideal_BL: np.ndarray
) -> dict[str, float]:
    """Imbalance of a lower bound, and how far the levels are above it.

    Args:
        level_BL: load / speed of the slowest rank.
        bound_BL: lower bound of it.
        ideal_BL: load / speed when all ranks take equally long.

    Returns:
        lower_bound_avg, the mean of bound / ideal; gap_avg, gap_p99 and gap_worst of
        level / bound - 1; 1.0 and 0.0 where there is no problem at all.
    """
    bound, gap = ratio_to(ideal_BL, bound_BL), ratio_to(bound_BL, level_BL) - 1
    return {
        "lower_bound_avg": float(bound.mean()) if bound.size else 1.0,
        "gap_avg": float(gap.mean()) if gap.size else 0.0,
        "gap_p99": float(np.percentile(gap, 99)) if gap.size else 0.0,
        "gap_worst": float(gap.max(initial=0.0)),
    }


def ratio_to(base: np.ndarray, value: np.ndarray) -> np.ndarray:
    """value / base, 1 where the base is 0: nothing to balance."""
    return np.divide(value, base, out=np.ones_like(base), where=base > 0)


def imbalance(load_R: Any, speed_R: Any = None) -> np.ndarray:
    """max over ranks of load / speed, over the least possible, sum of load / sum of speed.

    Equal speeds make it max / mean. 1.0 is best; zero load is 1.0; a rank of speed 0 (missing)
    may hold no load, else the result is infinite.

    Args:
        load_R: [..., R], finite, not negative.
        speed_R: [R], not negative, not all 0; relative (1.0 is a whole rank).

    Raises:
        ValueError: on NaN, infinite or negative load or speed, or no ranks.
    """
    longest, ideal = _slowest_and_ideal(load_R, speed_R)
    return np.divide(longest, ideal, out=np.ones_like(longest), where=ideal > 0)


def straggler(load_R: Any, speed_R: Any = None) -> np.ndarray:
    """Time the slowest rank needs beyond the balanced one: max - mean, in assignments."""
    longest, ideal = _slowest_and_ideal(load_R, speed_R)
    return longest - ideal


def slowest(load_R: Any, speed_R: Any = None) -> np.ndarray:
    """Time of the slowest rank: max of load / speed."""
    return _slowest_and_ideal(load_R, speed_R)[0]


def efficiency(load_BLR: Any, speed_R: Any = None) -> float:
    """Sum of means / sum of maxima over all leading axes (what vLLM logs); zero load is 1.0."""
    longest, ideal = _slowest_and_ideal(load_BLR, speed_R)
    return float(ideal.sum() / longest.sum()) if longest.sum() > 0 else 1.0


def max_violation(load_E: Any) -> np.ndarray:
    """MaxVio of expert loads: max / mean - 1, 0 at best, E - 1 with one hot expert."""
    return imbalance(load_E) - 1.0


def gini(load_E: Any) -> np.ndarray:
    """Gini coefficient, mean |a - b| / (2 mean a): 0 uniform, 1 - 1/E one hot, 0 for no load."""
    load_E = np.sort(check_loads("load_E", load_E), axis=-1)
    num_experts = load_E.shape[-1]
    rank_weight_E = 2 * np.arange(1, num_experts + 1) - num_experts - 1
    total = load_E.sum(-1)
    spread = (load_E * rank_weight_E).sum(-1)
    scale = num_experts * total
    return np.divide(spread, scale, out=np.zeros_like(total), where=scale > 0)


def round_to_tiles(load: Any, tile: int) -> np.ndarray:
    """Rows a grouped product computes for each copy: load rounded up to whole tiles, float64."""
    if tile < 1:
        raise ValueError(f"tile must be positive, got {tile}")
    # A split such as 384 / 3 copies may arrive a rounding error above the whole tile.
    return np.ceil(check_loads("load", load) / tile - 1e-9) * tile


def tile_rank_load(load_ER: Any, tile: int) -> np.ndarray:
    """Rank loads [..., R] with every copy of [..., E, R] rounded up to whole tiles."""
    return round_to_tiles(load_ER, tile).sum(-2)


def expert_bytes(hidden: int, intermediate: int, bytes_per_weight: int = 2) -> int:
    """Size of one expert: gate, up and down matrices, 3 · H · I weights."""
    return 3 * hidden * intermediate * bytes_per_weight


def bytes_moved(
    num_copies: int, num_moves: int, copy_bytes: int, state_bytes: int | None = None
) -> int:
    """Bytes sent to install copies and to move homes.

    Args:
        num_copies: copies installed: weights only.
        num_moves: experts whose home changed: weights, master weights and optimizer state.
        copy_bytes: size of one expert's weights in the compute dtype.
        state_bytes: what a home move carries in all; 7 × copy_bytes when None: 14 bytes for each
            bf16 parameter under Adam (2 weight, 4 master weight, 4 + 4 moments).
    """
    per_move_bytes = 7 * copy_bytes if state_bytes is None else state_bytes
    return num_copies * copy_bytes + num_moves * per_move_bytes


def check_loads(name: str, load: Any) -> np.ndarray:
    """Return loads as float64 with at least one entry on the last axis, or raise ValueError."""
    load = np.asarray(load, np.float64)
    if not load.ndim or not load.shape[-1]:
        raise ValueError(f"{name} must have a last axis to balance over, got {list(load.shape)}")
    if not (np.isfinite(load).all() and (load >= 0).all()):
        raise ValueError(f"{name} must be finite and not negative, got {load.min()}")
    return load


def _slowest_and_ideal(load_R: Any, speed_R: Any) -> tuple[np.ndarray, np.ndarray]:
    """Time of the slowest rank, and the time if all took equally long: [...] each."""
    load_R = check_loads("load_R", load_R)
    if speed_R is None:
        return load_R.max(-1), load_R.mean(-1)
    speed_R = check_loads("speed_R", speed_R)
    if speed_R.shape != load_R.shape[-1:] or not speed_R.any():
        raise ValueError(
            f"speed_R must give one speed for each of {load_R.shape[-1]} ranks, not all 0, got "
            f"{speed_R.tolist()}"
        )
    stuck_R = np.where(load_R > 0, np.inf, 0.0)
    time_R = np.divide(load_R, speed_R, out=stuck_R, where=speed_R > 0)
    return time_R.max(-1), load_R.sum(-1) / speed_R.sum()
