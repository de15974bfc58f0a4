"""What a plan is worth: figures of the planner, and the time of the slowest rank under it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from time import perf_counter

import numpy as np
import torch

import megakernel
from balance import Plan, Topology, Trace, make_plan
from balance.baselines import BASELINES
from balance.compare.report import Row, compare, measure_plan
from balance.recorded.synthetic import SyntheticConfig, make_trace
from megakernel.tools.models import MODELS, ModelShape
from perf.measuring.measure import Timing
from perf.problems.cases import SHAPES, Case, read_trace, sizes_of
from perf.problems.tensors import make_weights
from perf.results.record import LABEL
from perf.simulator.predict import predict
from perf.suites.bench import Bench

NUM_RANKS = 8
SPARE_SLOTS = 1
# Of a micro-batch, where the recording is of whole sequences.
TOKENS_OF_SUITE = {"planner": 3400, "makespan": 27200}
ELEMENT_BYTES = 2
CONTIGUOUS, EPLB, OURS, EVEN = "contiguous", "EPLB oracle", "our plan", "ideal even"
BASELINE_OF = {CONTIGUOUS: "none (contiguous)", EPLB: "EPLB, oracle per micro-batch"}


def planner(bench: Bench) -> None:
    """Seconds, imbalance before and after, bound, copies and bytes of every algorithm."""
    topology = Topology(1, NUM_RANKS, SPARE_SLOTS)
    for model, scenario, trace in recordings(bench, "planner"):
        case = Case(model, trace.num_tokens, scenario, trace=bench.trace)
        plan, seconds = time_plans(trace, topology, 1 if bench.quick else 3)
        planned = measure_plan(plan, trace, 128)
        names = list(BASELINE_OF.values()) if bench.quick else list(BASELINES)
        _, rows = compare(trace.loads(), topology, planned=planned, names=names)
        for row in rows:
            add_method(bench, case, row)
            if row.plan_seconds is not None:
                taken = seconds if row.name == planned.name else [row.plan_seconds]
                bench.add("planner", case, row.name, "host", "plan time", "s", Timing.of(taken))


def time_plans(trace: Trace, topology: Topology, repeats: int) -> tuple[Plan, list[float]]:
    """Plan several times; return the last plan, equal to the others, and the seconds of each."""
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        plan = make_plan(trace, topology)
        seconds.append(perf_counter() - start)
    return plan, seconds


def add_method(bench: Bench, case: Case, row: Row) -> None:
    """Add what an algorithm reached, and what it moves for it."""
    add = partial(add_exact, bench, "planner", case, row.name)
    add("imbalance avg", "max/mean", row.imbalance_avg)
    add("imbalance worst", "max/mean", row.imbalance_worst)
    add("gap to bound", "ratio", row.gap)
    if row.arrivals is not None:
        expert_bytes = 3 * ELEMENT_BYTES * case.model.hidden * case.model.intermediate
        add("weights moved", "MB", row.arrivals * expert_bytes * 1e-6)


def add_exact(
    bench: Bench, suite: str, case: Case, provider: str, metric: str, unit: str, value: float
) -> None:
    """Add a counted figure."""
    bench.add(suite, case, provider, "counted", metric, unit, Timing.exact(value))


def recordings(bench: Bench, suite: str) -> Iterator[tuple[ModelShape, str, Trace]]:
    """Yield a model, a scenario and its routing: made up, and that of the bench's recording."""
    model = MODELS["Qwen3-30B-A3B"]
    config = SyntheticConfig(
        num_experts=model.num_experts,
        top_k=model.top_k,
        num_layers=1 if bench.quick or suite == "makespan" else 4,
        num_micro_batches=2 if bench.quick else 8,
        tokens_per_micro_batch=4096 if bench.quick else 32768,
        num_ranks=NUM_RANKS,
    )
    yield model, "synthetic", make_trace(config)
    if not bench.quick:
        yield from played(bench, suite)


def played(bench: Bench, suite: str) -> Iterator[tuple[ModelShape, str, Trace]]:
    """Yield the bench's recording with the first model of its sizes; note if none has them."""
    recorded = read_trace(bench.trace)
    num_experts, top_k = sizes_of(recorded)
    shape_of = {(shape.num_experts, shape.top_k): shape for shape in reversed(SHAPES.values())}
    if (num_experts, top_k) not in shape_of:
        bench.notes.append(
            f"{bench.trace.name}: skipped, no model has {num_experts} experts, top-{top_k}"
        )
        return
    if isinstance(recorded, Trace):
        trace = recorded
    else:
        trace = recorded.pack(NUM_RANKS, TOKENS_OF_SUITE[suite])
    trace = replace(trace, source_rank_T=trace.source_rank_T % NUM_RANKS)
    chosen = first_layer(trace) if suite == "makespan" else trace
    yield shape_of[num_experts, top_k], "trace", chosen


def first_layer(trace: Trace) -> Trace:
    """Keep one layer of a trace."""
    return Trace(
        trace.ids_TLK[:, :1],
        trace.micro_batch_T,
        trace.source_rank_T,
        trace.num_experts,
        label=trace.label,
    )


def makespan(bench: Bench) -> None:
    """Time each rank's own experts and rows by themselves in the kernel; the slowest decides.

    No communication is timed or claimed. Without a GPU the simulator's times stand in.
    """
    if not bench.on_gpu:
        bench.notes.append(LABEL)
    topology = Topology(1, NUM_RANKS, SPARE_SLOTS)
    for model, scenario, trace in recordings(bench, "makespan"):
        plan = make_plan(trace, topology)
        slowest_B: dict[str, list[float]] = {CONTIGUOUS: [], EPLB: [], OURS: [], EVEN: []}
        for b in range(trace.num_micro_batches):
            if b and bench.is_late:
                bench.notes.append(f"{scenario}: time is up after {b} micro-batches")
                break
            rows_of_method = share_rows(trace, plan, topology, b)
            times = time_ranks(bench, model, rows_of_method)
            for method, times_R in times.items():
                slowest_B[method].append(max(times_R))
        tokens = trace.num_tokens // trace.num_micro_batches
        case = Case(model, tokens, scenario, trace=bench.trace)
        mode = "graph" if bench.on_gpu else "predicted"
        for method, slowest in slowest_B.items():
            ratios = [one / even for one, even in zip(slowest, slowest_B[EVEN], strict=True)]
            bench.add("makespan", case, method, mode, "slowest rank", "us", Timing.of(slowest))
            bench.add("makespan", case, method, mode, "over ideal", "ratio", Timing.of(ratios))


def share_rows(
    trace: Trace, plan: Plan, topology: Topology, micro_batch: int
) -> dict[str, np.ndarray]:
    """Return rows_ER of each method: assignments of each expert that each rank computes."""
    load_BE = trace.loads()[:, 0]
    load_E, R = load_BE[micro_batch], topology.num_ranks
    # Baselines are given the whole batch, since some plan from earlier micro-batches.
    served_of = {
        method: BASELINES[name](load_BE.astype(float), topology).load_BER[micro_batch]
        for method, name in BASELINE_OF.items()
    }
    rows_of = {method: round_rows(share_ER, load_E) for method, share_ER in served_of.items()}
    rows_of[OURS] = planned_rows(plan, trace, micro_batch)
    rows_of[EVEN] = cut_evenly(load_E, R)
    return rows_of


def cut_evenly(load_E: np.ndarray, num_ranks: int) -> np.ndarray:
    """Cut all assignments, sorted by expert, into equal parts: no plan can be more even."""
    bound_R1 = np.arange(num_ranks + 1) * load_E.sum() // num_ranks
    end_E = np.cumsum(load_E)
    first_ER = np.maximum((end_E - load_E)[:, None], bound_R1[:-1])
    last_ER = np.minimum(end_E[:, None], bound_R1[1:])
    return np.maximum(last_ER - first_ER, 0)


def planned_rows(plan: Plan, trace: Trace, micro_batch: int) -> np.ndarray:
    """Count, from the slot of every assignment, what each rank computes under a plan."""
    expert_of_P = plan.expert_of_P(micro_batch, 0)
    slot_of_TK = plan.slot_of_TK(micro_batch, 0, trace)
    num_ranks = plan.topology.num_ranks
    rows_P = np.bincount(slot_of_TK[slot_of_TK >= 0], minlength=len(expert_of_P))
    rank_P = np.arange(len(expert_of_P)) // (len(expert_of_P) // num_ranks)
    rows_ER = np.zeros((trace.num_experts, num_ranks), np.int64)
    held_P = expert_of_P >= 0
    np.add.at(rows_ER, (expert_of_P[held_P], rank_P[held_P]), rows_P[held_P])
    return rows_ER


def round_rows(share_ER: np.ndarray, load_E: np.ndarray) -> np.ndarray:
    """Round shares to whole rows that sum to each expert's load."""
    rows_ER = np.floor(share_ER + 1e-9).astype(np.int64)
    missing_E = load_E - rows_ER.sum(1)
    order_ER = np.argsort(-(share_ER - rows_ER), axis=1, kind="stable")
    place_ER = np.argsort(order_ER, axis=1, kind="stable")
    return rows_ER + (place_ER < missing_E[:, None])


def time_ranks(
    bench: Bench, model: ModelShape, rows_of_method: dict[str, np.ndarray]
) -> dict[str, list[float]]:
    """Microseconds of each rank under each method: measured in turns, or predicted."""
    jobs = {
        (method, rank): rows_ER[:, rank]
        for method, rows_ER in rows_of_method.items()
        for rank in range(rows_ER.shape[1])
    }
    if bench.on_gpu:
        calls = {
            f"{method}|{rank}": make_rank_call(model, rows_E, bench.device)
            for (method, rank), rows_E in jobs.items()
        }
        timed = bench.time(calls)["graph"]
        times = {job: timed[f"{job[0]}|{job[1]}"].median for job in jobs}
    else:
        times = {job: predict_rank_us(bench, model, rows_E) for job, rows_E in jobs.items()}
    return {
        method: [times[method, rank] for rank in range(rows_ER.shape[1])]
        for method, rows_ER in rows_of_method.items()
    }


def make_rank_call(
    model: ModelShape, rows_E: np.ndarray, device: torch.device
) -> Callable[[], object]:
    """Return a call of the kernel on what one rank receives: each row a token with one expert."""
    gate_up_E2IH, down_EHI, _ = make_weights(model, device, torch.bfloat16)
    held = np.flatnonzero(rows_E)
    index = torch.from_numpy(held).to(device)
    experts = megakernel.Experts(gate_up_E2IH[index], down_EHI[index])
    local_A = torch.from_numpy(np.repeat(np.arange(len(held)), rows_E[held]))
    order_A = torch.randperm(len(local_A), generator=torch.Generator().manual_seed(0))
    ids_A1 = local_A[order_A, None].int().to(device)
    x_AH = torch.randn(len(ids_A1), model.hidden, device=device).bfloat16()
    gate_A1 = torch.ones(len(ids_A1), 1, device=device)
    return lambda: megakernel.moe_routed(x_AH, ids_A1, gate_A1, experts)


def predict_rank_us(bench: Bench, model: ModelShape, rows_E: np.ndarray) -> float:
    """Predict the same call."""
    held_E = rows_E[rows_E > 0]
    rows = int(held_E.sum())
    if not rows:
        return 0.0
    local = replace(model, num_experts=len(held_E), top_k=1)
    config = Case(local, rows).default_config
    return predict(local, rows, held_E, config, "given", bench.machine).launch_us
