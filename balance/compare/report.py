"""Figures to compare by: is balancing worth it, and who balances how well?

Rows are frozen records, so that tables, JSON and pictures come from the same figures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from balance.compare.baselines.run import BASELINES, Outcome, run_baseline
from balance.exact.bounds import ideal_level
from balance.measures.load import (
    efficiency,
    gini,
    max_violation,
    ratio_to,
    round_to_tiles,
    slowest,
    summarize,
)
from balance.plan import Plan
from balance.topology import Topology
from balance.trace import Trace

OURS = "this planner"
# Below this time of the slowest rank over the mean, a published fit of step times (Qwen3-235B,
# EP8) found no gain from balancing: other work hides it.
WORTH_IT = 1.09


@dataclass(frozen=True)
class RankStats:
    """Contiguous placement on some ranks: what there is to gain.

    Attributes:
        num_ranks: expert-parallel ranks.
        imbalance_avg, imbalance_p95, imbalance_worst: max / mean over ranks.
        slowdown: sum of maxima / sum of means, the time of the expert layers over the balanced.
        batch_slowdown: the same for each layer's load over the whole batch: what remains when
            only batch totals matter. Far below ``slowdown`` means that micro-batches differ.
        worth_it: slowdown above ``WORTH_IT``.
    """

    num_ranks: int
    imbalance_avg: float
    imbalance_p95: float
    imbalance_worst: float
    slowdown: float
    batch_slowdown: float
    worth_it: bool


@dataclass(frozen=True)
class TraceStats:
    """One trace at a glance; expert figures are means over layers of the whole batch's loads."""

    label: str
    num_tokens: int
    num_micro_batches: int
    num_layers: int
    num_experts: int
    top_k: int
    num_missing: int
    num_masked_rows: int
    all_zero_layers: tuple[int, ...]
    gini: float
    max_violation: float
    ranks: tuple[RankStats, ...]


@dataclass(frozen=True)
class Row:
    """One method in the comparison.

    Attributes:
        name: of the method.
        imbalance_avg, imbalance_p95, imbalance_worst: max / mean over ranks.
        efficiency: sum of means / sum of maxima.
        gap: mean of max / bound - 1; the bound holds for any plan.
        straggler: mean of max - mean, assignments.
        tile_imbalance: mean of the slowest rank's load in whole tiles / mean load: imbalance and
            padding together.
        copies: copies beyond one per expert, mean per micro-batch and layer.
        arrivals: expert weights that reach a rank anew, mean per micro-batch and layer.
        plan_seconds: time to plan the whole batch.

    The last four are None for the bound, which is no plan.
    """

    name: str
    imbalance_avg: float
    imbalance_p95: float
    imbalance_worst: float
    efficiency: float
    gap: float
    straggler: float
    tile_imbalance: float | None
    copies: float | None
    arrivals: float | None
    plan_seconds: float | None


def trace_stats(trace: Trace, rank_counts: Sequence[int]) -> TraceStats:
    """Gini, MaxVio and contiguous imbalance at each number of ranks (at most one per expert)."""
    load_BLE = trace.loads()
    report = trace.report()
    counts = [ranks for ranks in rank_counts if 1 <= ranks <= trace.num_experts]
    return TraceStats(
        trace.label,
        trace.num_tokens,
        trace.num_micro_batches,
        trace.num_layers,
        trace.num_experts,
        trace.top_k,
        report.num_missing,
        trace.num_tokens - report.num_rows,
        report.all_zero_layers,
        float(gini(load_BLE.sum(0)).mean()),
        float(max_violation(load_BLE.sum(0)).mean()),
        tuple(_rank_stats(load_BLE, ranks) for ranks in counts),
    )


def contiguous_rank_load(load_BLE: np.ndarray, num_ranks: int) -> np.ndarray:
    """load_BLR with experts in order on the ranks."""
    home_E = Topology(1, num_ranks, 0).contiguous_home_rank_E(load_BLE.shape[2])
    # Homes ascend and every rank has one, so each rank is a run of experts.
    return np.add.reduceat(load_BLE, np.searchsorted(home_E, np.arange(num_ranks)), axis=2)


def compare(
    load_BLE: np.ndarray,
    topology: Topology,
    *,
    planned: Outcome | None = None,
    tile: int = 128,
    names: Sequence[str] = tuple(BASELINES),
    on_layer: Callable[[], object] = lambda: None,
) -> tuple[list[Outcome], list[Row]]:
    """Every baseline, then the plan, then the bound that holds for any plan.

    Args:
        load_BLE: assignments per micro-batch, layer and expert.
        topology: the machine.
        planned: what the plan achieves, measured from its own assignment of tokens.
        tile: rows of a tile.
        names: baselines to run.
        on_layer: called after each layer of each baseline.
    """
    outcomes = [
        run_baseline(name, load_BLE, topology, tile=tile, on_layer=on_layer) for name in names
    ]
    if planned is not None:
        outcomes.append(planned)
    bound_BL = lower_bound(load_BLE, topology)
    rows = [make_row(outcome, bound_BL, topology) for outcome in outcomes]
    return outcomes, [*rows, _bound_row(load_BLE, bound_BL, topology)]


def lower_bound(load_BLE: np.ndarray, topology: Topology) -> np.ndarray:
    """Least time of the slowest rank, whatever the plan: load / speed, in whole assignments."""
    total_BL = torch.from_numpy(load_BLE.sum(2).astype(np.int64))
    speed_R = torch.from_numpy(topology.speed_R)
    return ideal_level(total_BL.reshape(-1), speed_R).reshape(total_BL.shape).numpy()


def make_row(outcome: Outcome, bound_BL: np.ndarray, topology: Topology) -> Row:
    """Summary of one outcome against the bound."""
    speed_R = topology.speed_R
    balance = summarize(outcome.rank_load_BLR, speed_R)
    ideal_BL = outcome.rank_load_BLR.sum(2) / speed_R.sum()
    ratio_BL = ratio_to(bound_BL, slowest(outcome.rank_load_BLR, speed_R))
    tiles_BL = ratio_to(ideal_BL, slowest(outcome.tile_load_BLR, speed_R))
    return Row(
        outcome.name,
        balance.imbalance_avg,
        balance.imbalance_p95,
        balance.imbalance_worst,
        balance.efficiency,
        # Methods that divide evenly may fall a rounding below a bound in whole assignments.
        max(0.0, _mean(ratio_BL) - 1.0),
        balance.straggler_avg,
        _mean(tiles_BL),
        _mean(outcome.copies_BL),
        _mean(outcome.arrivals_BL),
        outcome.plan_seconds,
    )


def measure_plan(plan: Plan, trace: Trace, tile: int) -> Outcome:
    """What a plan achieves, counted from the slot it gives to every single assignment.

    Args:
        plan: made for this trace.
        trace: the routing.
        tile: rows of a tile.
    """
    B, L, R = plan.num_micro_batches, plan.num_layers, plan.topology.num_ranks
    rank_load_BLR, tile_load_BLR = np.zeros((2, B, L, R))
    num_slots = plan.expert_of_BLP.shape[2]
    for b in range(B):
        for layer in range(L):
            slot_TK = plan.slot_of_TK(b, layer, trace)
            load_RQ = np.bincount(slot_TK[slot_TK >= 0], minlength=num_slots).reshape(R, -1)
            rank_load_BLR[b, layer] = load_RQ.sum(1)
            tile_load_BLR[b, layer] = round_to_tiles(load_RQ, tile).sum(1)
    copies_BL = (plan.expert_of_BLP >= 0).sum(2) - plan.num_experts
    static_L = plan.is_static_LP.sum(1)
    # Batch-static copies and moved homes travel once, the other copies for every micro-batch.
    arrivals_BL = copies_BL - static_L
    moves_L = (plan.home_rank_LE != plan.previous_home_LE).sum(1)
    arrivals_BL[:1] += static_L + moves_L
    return Outcome(OURS, rank_load_BLR, tile_load_BLR, copies_BL, arrivals_BL, plan.plan_seconds)


def _rank_stats(load_BLE: np.ndarray, num_ranks: int) -> RankStats:
    """What contiguous placement on so many ranks loses."""
    rank_load_BLR = contiguous_rank_load(load_BLE, num_ranks)
    balance = summarize(rank_load_BLR)
    slowdown = 1 / balance.efficiency
    return RankStats(
        num_ranks,
        balance.imbalance_avg,
        balance.imbalance_p95,
        balance.imbalance_worst,
        slowdown,
        1 / efficiency(rank_load_BLR.sum(0)),
        slowdown > WORTH_IT,
    )


def _bound_row(load_BLE: np.ndarray, bound_BL: np.ndarray, topology: Topology) -> Row:
    """The bound itself, shown as if it were a method."""
    ideal_BL = load_BLE.sum(2) / topology.speed_R.sum()
    ratio_BL = ratio_to(ideal_BL, bound_BL)
    total = bound_BL.sum()
    some = ratio_BL.size > 0
    return Row(
        "lower bound of any plan",
        float(ratio_BL.mean()) if some else 1.0,
        float(np.percentile(ratio_BL, 95)) if some else 1.0,
        float(ratio_BL.max(initial=1.0)),
        float(ideal_BL.sum() / total) if total else 1.0,
        0.0,
        _mean(bound_BL - ideal_BL),
        None,
        None,
        None,
        None,
    )


def _mean(values: np.ndarray) -> float:
    """Mean, 0 of nothing."""
    return float(values.mean()) if values.size else 0.0
