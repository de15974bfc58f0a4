"""Suites that time the layer against its peers: forward, decode, replay, skew."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from megakernel.launch.tuned import default_config
from megakernel.tools.models import MODELS
from perf.measuring.measure import Timing
from perf.measuring.roofline import Work, useful_work
from perf.problems.cases import (
    DECODE_TOKENS,
    FORWARD_TOKENS,
    GPT_OSS_20B,
    SCENARIOS,
    TINY,
    Case,
    why_missing,
)
from perf.problems.peers import ALL_PROVIDERS
from perf.problems.providers import OURS, Provider
from perf.problems.ready import Ready, prepare
from perf.problems.tensors import Problem, make_problem
from perf.simulator.predict import predict
from perf.suites.bench import Bench

QUICK_MODELS = ("Qwen3-30B-A3B", "Mixtral-8x7B")
SKEW_TOKENS = 8192


class Sizes(NamedTuple):
    """What a suite sweeps.

    Attributes:
        counts, quick_counts: numbers of tokens, and those of a quick run.
        scenario: of the routing.
    """

    counts: tuple[int, ...]
    quick_counts: tuple[int, ...]
    scenario: str


SIZES = {
    "forward": Sizes(FORWARD_TOKENS, (8192, 4096), "uniform"),
    "decode": Sizes(DECODE_TOKENS, (64, 1), "uniform"),
    "replay": Sizes((1, 64, 1024, 8192), (8192, 64), "recorded"),
}
# Predicting a launch takes the host a second for every 50,000 tasks.
MOST_PREDICTED_TOKENS = 8192
ROUTE_OF_OURS = {"ours live": "live", "ours replay": "replay", "ours given": "given"}


def forward(bench: Bench) -> None:
    """Prefill and training sizes, uniform routing."""
    for case in bench.each(cases_of("forward", bench)):
        time_providers(bench, "forward", case, ALL_PROVIDERS)


def decode(bench: Bench) -> None:
    """Few tokens: reading the touched experts' weights is the work."""
    for case in bench.each(cases_of("decode", bench)):
        time_providers(bench, "decode", case, ALL_PROVIDERS)


def replay(bench: Bench) -> None:
    """The same work on the live route, with replayed ids, and with the whole routing given."""
    for case in bench.each(cases_of("replay", bench)):
        time_providers(bench, "replay", case, OURS)


def skew(bench: Bench) -> None:
    """The same FLOPs under every routing scenario, and each time over the balanced one."""
    models = (TINY,) if not bench.on_gpu else (MODELS["Qwen3-30B-A3B"], GPT_OSS_20B)
    num_tokens = SKEW_TOKENS if bench.on_gpu else 32
    balanced: dict[tuple, float] = {}
    for case in bench.each(
        Case(model, num_tokens, name, trace=bench.trace) for model in models for name in SCENARIOS
    ):
        if reason := why_missing(case):
            bench.notes.append(f"{case.name}: skipped, {reason}")
            continue
        timing_of = time_providers(bench, "skew", case, ALL_PROVIDERS)
        for (mode, provider), timing in timing_of.items():
            key = (case.model.name, mode, provider)
            if case.scenario == "balanced":
                balanced[key] = timing.median
            if key in balanced:
                bench.add("skew", case, provider, mode, "time over balanced", "ratio",
                          timing.scaled(1 / balanced[key]))  # fmt: skip


def cases_of(suite: str, bench: Bench) -> list[Case]:
    """Return the cases of a suite, model by model with falling T; a tiny one without a GPU.

    A model's weights are then made once, and its largest call comes first: the memory that a
    stream's launches share never grows beside an older, smaller one.

    Args:
        suite: key of SIZES.
        bench: where it runs.
    """
    counts, quick_counts, scenario = SIZES[suite]
    if not bench.on_gpu:
        return [Case(TINY, min(counts[0], 32), scenario)]
    names = QUICK_MODELS if bench.quick else MODELS
    falling = sorted(quick_counts if bench.quick else counts, reverse=True)
    return [Case(MODELS[name], T, scenario) for name in names for T in falling]


def time_providers(
    bench: Bench, suite: str, case: Case, providers: Sequence[Provider]
) -> dict[tuple[str, str], Timing]:
    """Check and time providers on one case; add times, rates and ratios.

    Returns:
        timing_of[mode, label of the provider].
    """
    timing_of, load_E = timings_of(bench, case, providers, prepare)
    if not timing_of:
        return {}
    work = useful_work(case.model, case.num_tokens, load_E)
    for (mode, name), timing in timing_of.items():
        add_rates(bench, suite, case, name, mode, timing, work)
    add_peer_ratios(bench, suite, case, providers, timing_of)
    if case.num_tokens <= MOST_PREDICTED_TOKENS:
        add_prediction_errors(bench, suite, case, load_E, timing_of)
    return timing_of


def timings_of(
    bench: Bench,
    case: Case,
    providers: Sequence[Provider],
    prepare: Callable[[Problem, Sequence[Provider], Callable[[str], object]], Ready],
) -> tuple[dict[tuple[str, str], Timing], np.ndarray]:
    """Time those of the providers who are right on one case; what goes wrong is kept in words.

    Args:
        bench: where.
        case: the problem.
        providers: who may be timed.
        prepare: says of a problem's providers what is timed of them, or why nothing is.

    Returns:
        timing_of[mode, label of the provider], and load_E.
    """
    where, load_E = f"{case.name} T={case.num_tokens}", np.zeros(case.model.num_experts, int)
    try:
        problem = make_problem(case, bench.device)
        ids_A = problem.expert_of_TK.flatten()
        load_E = torch.bincount(ids_A, minlength=case.model.num_experts).cpu().numpy()
        ready = prepare(problem, bench.keep_providers(providers), bench.say)
        bench.notes += [f"{name}: skipped, {reason}" for name, reason in ready.skipped.items()]
        bench.failures += [f"{where} {name}: {reason}" for name, reason in ready.failed.items()]
        not_captured = [provider.name for provider in providers if not provider.capturable]
        label_of = {provider.name: provider.label for provider in providers}
        timing_of = {
            (mode, label_of[name]): timing
            for mode, timings in bench.time(ready.calls, not_captured).items()
            for name, timing in timings.items()
        }
    except Exception as error:  # one case must not end the suite
        bench.failures.append(f"{where}: {type(error).__name__}: {error}")
        timing_of = {}
    return timing_of, load_E


def add_rates(
    bench: Bench, suite: str, case: Case, name: str, mode: str, timing: Timing, work: Work
) -> None:
    """Add the time, and what it is in FLOP/s, bytes/s and of the roofline."""
    bench.add(suite, case, name, mode, "time", "us", timing)
    bench.add(suite, case, name, mode, "rate", "TFLOP/s", timing.inverse(work.flops * 1e-6))
    bench.add(suite, case, name, mode, "traffic", "GB/s", timing.inverse(work.bytes * 1e-3))
    if bench.on_gpu:
        least_us = bench.roofs.least_us(work)
        bench.add(suite, case, name, mode, "of the roofline", "ratio", timing.inverse(least_us))


def add_peer_ratios(
    bench: Bench,
    suite: str,
    case: Case,
    providers: Sequence[Provider],
    timing_of: dict[tuple[str, str], Timing],
) -> None:
    """Add each of our times over that of the best peer that computes the router as well."""
    routing_ours = {p.name for p in providers if p.is_ours and p.has_router}
    peers = {p.label for p in providers if not p.is_ours}
    for (mode, name), timing in timing_of.items():
        best = [t.median for (m, peer), t in timing_of.items() if m == mode and peer in peers]
        if name in routing_ours and best:
            ratio = timing.scaled(1 / min(best))
            bench.add(suite, case, name, mode, "time over best peer", "ratio", ratio)


def add_prediction_errors(
    bench: Bench,
    suite: str,
    case: Case,
    load_E: np.ndarray,
    timing_of: dict[tuple[str, str], Timing],
) -> None:
    """Add how far the simulator was off each measured launch of ours."""
    if not bench.on_gpu:
        return
    for name, route in ROUTE_OF_OURS.items():
        measured = timing_of.get(("graph", name))
        if measured is None:
            continue
        config = default_config(case.layer, case.num_tokens, torch.bfloat16, bench.device)
        predicted_us = predict(
            case.model, case.num_tokens, load_E, config, route, bench.machine
        ).launch_us
        error = Timing.exact(predicted_us / measured.median - 1)
        bench.add(suite, case, name, "graph", "prediction error", "ratio", error)
