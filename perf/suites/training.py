"""Suites that time training: the backward alone, and forward and backward together."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from megakernel.launch.tuned import default_config
from megakernel.tools.models import MODELS
from perf.measuring.measure import Timing
from perf.measuring.roofline import Work, backward_work, useful_work
from perf.problems.cases import TINY, Case
from perf.problems.peers import PEERS
from perf.problems.providers import PLAIN, Provider
from perf.problems.training import OURS_TRAINING, prepare_steps
from perf.simulator.backward import predict_backward
from perf.suites.bench import Bench
from perf.suites.layer import (
    MOST_PREDICTED_TOKENS,
    QUICK_MODELS,
    add_peer_ratios,
    add_rates,
    timings_of,
)

TRAINING_TOKENS, QUICK_TRAINING_TOKENS = (32768, 8192, 2048), (8192,)
TRAINED = (*OURS_TRAINING, *(one for one in (*PLAIN, *PEERS) if one.trains))
# The true gradients of the weights, in float64, have to fit beside everything else.
MOST_TRUE_BYTES = 40e9
# What the simulator is asked for: route, what is saved, how gradients are kept.
PREDICTED = {
    "ours live": ("live", "preactivations", "bfloat16"),
    "ours replay": ("replay", "preactivations", "bfloat16"),
    "ours saving nothing": ("live", "nothing", "bfloat16"),
    "ours to float32": ("live", "preactivations", "float32"),
    "ours added to float32": ("live", "preactivations", "added"),
}


def backward(bench: Bench) -> None:
    """The backward, its forward having run before."""
    for case in bench.each(training_cases(bench)):
        time_steps(bench, "backward", case, TRAINED)


def train(bench: Bench) -> None:
    """Forward and backward in one call."""
    for case in bench.each(training_cases(bench)):
        time_steps(bench, "train", case, TRAINED)


def training_cases(bench: Bench) -> list[Case]:
    """Return the cases, model by model with falling T; a tiny one without a GPU."""
    if not bench.on_gpu:
        return [Case(TINY, 16)]
    names = QUICK_MODELS if bench.quick else tuple(MODELS)
    counts = QUICK_TRAINING_TOKENS if bench.quick else TRAINING_TOKENS
    return [Case(MODELS[name], T) for name in names for T in counts]


def why_too_large(case: Case) -> str | None:
    """Return why a case's true gradients cannot be had, or None."""
    model = case.model
    true_bytes = 8 * 3 * model.num_experts * model.hidden * model.intermediate
    if true_bytes <= MOST_TRUE_BYTES:
        return None
    return f"its gradients in float64 take {true_bytes * 1e-9:.0f} GB"


def time_steps(
    bench: Bench, suite: str, case: Case, providers: Sequence[Provider]
) -> dict[tuple[str, str], Timing]:
    """Check and time a step of each provider on one case; add times, rates and ratios.

    Args:
        bench: where.
        suite: "backward" or "train", which is also what a step holds.
        case: the problem.
        providers: who may be timed.

    Returns:
        timing_of[mode, label of the provider].
    """
    if reason := why_too_large(case):
        bench.notes.append(f"{case.name}: skipped, {reason}")
        return {}
    prepare = partial(prepare_steps, part=suite)
    timing_of, load_E = timings_of(bench, case, providers, prepare)
    if not timing_of:
        return {}
    add_figures(bench, suite, case, load_E, timing_of)
    add_peer_ratios(bench, suite, case, providers, timing_of)
    if suite == "backward" and bench.on_gpu and case.num_tokens <= MOST_PREDICTED_TOKENS:
        add_prediction_errors(bench, case, load_E, timing_of)
    return timing_of


def add_figures(
    bench: Bench,
    suite: str,
    case: Case,
    load_E: np.ndarray,
    timing_of: dict[tuple[str, str], Timing],
) -> None:
    """Add times, and what they are in useful FLOP/s, bytes/s and of the roofline.

    Whoever saves less and computes again is not credited with it; what moves for a gradient is
    counted as each keeps it.
    """
    for (mode, name), timing in timing_of.items():
        gradients = PREDICTED[name][2] if name in PREDICTED else "bfloat16"
        work = work_of(suite, case, load_E, gradients)
        add_rates(bench, suite, case, name, mode, timing, work)


def work_of(suite: str, case: Case, load_E: np.ndarray, gradients: str) -> Work:
    """Return the useful work of a step."""
    back = backward_work(case.model, case.num_tokens, load_E, gradients)
    if suite == "backward":
        return back
    ahead = useful_work(case.model, case.num_tokens, load_E)
    return Work(ahead.flops + back.flops, ahead.bytes + back.bytes)


def add_prediction_errors(
    bench: Bench, case: Case, load_E: np.ndarray, timing_of: dict[tuple[str, str], Timing]
) -> None:
    """Add how far the simulator was off each measured backward of ours."""
    config = default_config(case.layer, case.num_tokens, torch.bfloat16, bench.device)
    for name, (route, save, gradients) in PREDICTED.items():
        measured = timing_of.get(("graph", name))
        if measured is None:
            continue
        layer = case.model, case.num_tokens, load_E, config
        predicted = predict_backward(*layer, route, save, gradients, bench.machine)
        error = Timing.exact(predicted.launch_us / measured.median - 1)
        bench.add("backward", case, name, "graph", "prediction error", "ratio", error)
