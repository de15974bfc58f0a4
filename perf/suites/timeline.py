"""What the launch does inside: the times it keeps of its tasks, and the simulator fed with them.

On a GPU a clock counts nanoseconds. In the interpreter it counts its readings, which rehearses the
suite and measures nothing.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from megakernel.config import KernelConfig
from megakernel.launch.tuned import default_config
from megakernel.plan.protocol import NAMES
from megakernel.tools.models import MODELS
from megakernel.tools.timeline import Timeline, read_timeline
from perf.measuring.measure import Timing
from perf.problems.cases import TINY, Case, make_loads
from perf.problems.providers import Call, Provider, configured_call
from perf.problems.ready import prepare
from perf.problems.tensors import make_problem
from perf.results.record import provenance
from perf.results.timelines import Saved
from perf.simulator.costs import MeasuredCosts
from perf.simulator.predict import Launch, make_launch, simulate
from perf.suites.bench import Bench

ROUTES = ("live", "replay")
TIMED_TOKENS = (8192, 64)
TIMED_MODELS = ("Qwen3-30B-A3B", "Mixtral-8x7B")


def timeline(bench: Bench) -> None:
    """Times of every task, what keeping them costs, and what the simulator makes of them."""
    for case in bench.each(timed_cases(bench)):
        for route in ROUTES:
            record_launch(bench, case, route)


def timed_cases(bench: Bench) -> list[Case]:
    """Return the cases whose launches are taken apart; a tiny one without a GPU."""
    if not bench.on_gpu:
        return [Case(TINY, 24, "recorded")]
    models = TIMED_MODELS[:1] if bench.quick else TIMED_MODELS
    return [Case(MODELS[name], T, "recorded") for T in TIMED_TOKENS for name in models]


def record_launch(bench: Bench, case: Case, route: str) -> None:
    """Run a case with the clock and without, and keep its figures and its timeline."""
    plain = default_config(case.layer, case.num_tokens, torch.bfloat16, bench.device)
    providers = timed_providers(plain, route)
    where = f"{case.name} T={case.num_tokens} {route}"
    try:
        ready = prepare(make_problem(case, bench.device), providers, bench.say)
        without, with_clock = (ready.calls.get(provider.name) for provider in providers)
    except Exception as error:  # one case must not end the suite
        bench.failures.append(f"{where}: {type(error).__name__}: {error}")
        return
    bench.failures += [f"{where} {name}: {reason}" for name, reason in ready.failed.items()]
    if without is None or with_clock is None:
        return
    if bench.on_gpu:
        add_clock_cost(bench, case, route, ready.calls)
    with_clock()
    times = read_timeline(bench.device)
    add_task_times(bench, case, route, times)
    name = f"{case.model.name}_{case.num_tokens}_{route}".replace(" ", "-")
    bench.timelines[name] = make_saved(bench, case, route, times)
    if bench.on_gpu:
        measured = bench.time({"plain": without})["graph"]["plain"]
        launch = make_launch(
            case.model, case.num_tokens, make_loads(case), plain, route, bench.machine
        )
        add_replayed_prediction(bench, case, route, times, launch, measured)


def timed_providers(plain: KernelConfig, route: str) -> tuple[Provider, Provider]:
    """Return our layer on a route, without the clock and with it."""
    without, with_clock = (
        Provider(name, partial(configured_call, route=route, config=config), is_ours=True)
        for name, config in (
            ("without the clock", plain),
            ("with the clock", replace(plain, record_times=True)),
        )
    )
    return without, with_clock


def make_saved(bench: Bench, case: Case, route: str, times: Timeline) -> Saved:
    """Return the timeline with what a picture must say."""
    where = provenance()
    title = (
        f"{case.name}, T = {case.num_tokens}, {route}\n"
        f"{where['gpu']}, triton {where['triton']}, {where['commit']}, {where['date']}"
    )
    return Saved(title, times, "us" if bench.on_gpu else "interpreted, 1000 readings of the clock")


def add_clock_cost(bench: Bench, case: Case, route: str, calls: Mapping[str, Call]) -> None:
    """Add what keeping the times does to the launch's time."""
    timing_of = bench.time(calls)["graph"]
    cost = timing_of["with the clock"].scaled(1 / timing_of["without the clock"].median)
    metric = "time with the clock over without"
    bench.add("timeline", case, f"ours {route}", "graph", metric, "ratio", cost)


def task_us(times: Timeline) -> dict[str, list[float]]:
    """Return the times of each kind's tasks."""
    spent_N = times.end_N - times.start_N
    return {name: spent_N[times.kind_N == kind].tolist() for kind, name in enumerate(NAMES)}


def add_task_times(bench: Bench, case: Case, route: str, times: Timeline) -> None:
    """Add the time of a task of each kind, of claims and waits, and each one's share."""
    # Interpreted times are counts of readings, which the timeline takes for nanoseconds.
    how, unit, scale = ("clock", "us", 1.0) if bench.on_gpu else ("interpreted", "readings", 1e3)
    spent_of = {f"{name} task": spent for name, spent in task_us(times).items()}
    spent_of["claim"] = (times.claim_N - times.ask_N)[times.claim_N > times.ask_N].tolist()
    spent_of["wait"] = (times.start_N - times.claim_N)[times.start_N > times.claim_N].tolist()
    for metric, spent in spent_of.items():
        if spent:
            timing = Timing.of(spent).scaled(scale)
            bench.add("timeline", case, f"ours {route}", how, metric, unit, timing)
    for name, us in times.us_of_kind().items():
        share = Timing.exact(us / times.launch_us)
        bench.add("timeline", case, f"ours {route}", how, f"workers in {name}", "share", share)


def add_replayed_prediction(
    bench: Bench, case: Case, route: str, times: Timeline, launch: Launch, measured: Timing
) -> None:
    """Add how far off the simulator is when each kind of task costs its measured mean.

    A task's time holds its signal, which the simulator adds by itself.
    """
    signalling = {NAMES[task.kind] for task in launch.schedule.tasks()
                  if launch.schedule.signal(task) is not None}  # fmt: skip
    mean_us = {}
    for name, spent in task_us(times).items():
        mean = sum(spent) / len(spent) if spent else 0.0
        mean_us[name] = max(mean - bench.machine.signal_us * (name in signalling), 0.0)
    predicted = simulate(launch, MeasuredCosts(mean_us), bench.machine)
    error = Timing.exact(predicted.launch_us / measured.median - 1)
    metric = "prediction error, measured tasks"
    bench.add("timeline", case, f"ours {route}", "predicted", metric, "ratio", error)
    for name, us in mean_us.items():
        cost = Timing.exact(us)
        bench.add("timeline", case, f"ours {route}", "clock", f"{name} cost", "us", cost)
