"""Find the fastest KernelConfig for a model and a number of tokens, on the GPU at hand.

The simulator searches first, so that GPU minutes go to promising configs; the best of them are
checked, timed and entered in the table that moe() takes its default from. Without a GPU only
``--predict`` works, which prints the ranking and writes nothing.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, replace
from functools import partial
from pathlib import Path

import torch

from megakernel.config import SHIPPED, KernelConfig, shipped_config
from megakernel.launch.tuned import TABLE_PATH, Tuned, read_table
from perf.arguments import TRACE_HELP, count
from perf.measuring.measure import QUICK, Timing
from perf.problems.cases import RECORDING, SCENARIOS, SHAPES, Case, make_loads
from perf.problems.providers import Provider, configured_call
from perf.problems.ready import prepare
from perf.problems.tensors import Problem, make_problem
from perf.results.record import LABEL, provenance
from perf.simulator.predict import describe, search_configs
from perf.suites.bench import Bench, device_here

TOKENS = (1, 16, 64, 256, 1024, 4096, 8192, 32768)
ROUTES = ("live", "replay")


def tune(bench: Bench, case: Case, routes: Sequence[str], num_tried: int) -> Tuned:
    """Search by the simulator, time its best and the shipped configs, keep the fastest.

    One config serves every route, since equal configs give equal bits: the least sum of times
    wins.

    Args:
        bench: where, and how often each is timed.
        case: layer, tokens and routing.
        routes: live, replay or both.
        num_tried: configs of the simulator's ranking to time for each route.

    Raises:
        RuntimeError: if no config compiled and agreed with the reference on all routes.
    """
    return fastest(bench, case, routes, choose_tried(bench, case, routes, num_tried))[0]


def fastest(
    bench: Bench, case: Case, routes: Sequence[str], tried: dict[str, KernelConfig]
) -> tuple[Tuned, dict[str, dict[str, Timing]]]:
    """Check and time configs, and keep the one with the least sum of times.

    Args:
        bench, case, routes: as in :func:`tune`.
        tried: configs by what describes them.

    Returns:
        The entry for the table, and timing_of[route][name].

    Raises:
        RuntimeError: if no config compiled and agreed with the reference on all routes.
    """
    problem = make_problem(case, bench.device)
    timing_of = {route: time_configs(bench, problem, route, tried) for route in routes}
    ran = [name for name in tried if all(name in timing_of[route] for route in routes)]
    if not ran:
        raise RuntimeError(f"no config ran for {case.name} T={case.num_tokens}")
    median_us = {name: {route: timing_of[route][name].median for route in routes} for name in ran}
    best = min(ran, key=lambda name: sum(median_us[name].values()))
    shipped = shipped_config(case.num_assignments, case.model.num_experts)
    untuned = next((name for name in ran if replace(tried[name], max_polls=None) == shipped), "")
    where = provenance()
    entry = Tuned(
        gpu=where["gpu"],
        layer=case.layer,
        num_tokens=case.num_tokens,
        config=tried[best],
        median_us=median_us[best],
        shipped_us=median_us.get(untuned, {}),
        torch=where["torch"],
        triton=where["triton"],
        commit=where["commit"],
        date=where["date"],
    )
    return entry, timing_of


def choose_tried(
    bench: Bench, case: Case, routes: Sequence[str], num_tried: int
) -> dict[str, KernelConfig]:
    """Return the configs to time by what describes them: default, shipped, and predicted best."""
    tried = {describe(config): config for config in (case.default_config, *SHIPPED.values())}
    load_E = make_loads(case)
    for route in routes:
        ranked = search_configs(
            case.default_config, case.model, case.num_tokens, load_E, route, bench.machine
        )
        tried |= {describe(config): config for _, config in ranked[:num_tried]}
    return tried


def time_configs(
    bench: Bench, problem: Problem, route: str, configs: dict[str, KernelConfig]
) -> dict[str, Timing]:
    """Check and time configs on one problem; those that do not compile or are wrong drop out."""
    providers = [
        Provider(name, partial(configured_call, route=route, config=config))
        for name, config in configs.items()
    ]
    ready = prepare(problem, providers, bench.say)
    bench.notes += [f"{name}: {reason}" for name, reason in ready.skipped.items()]
    return bench.time(ready.calls)["graph" if bench.on_gpu else "eager"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to tune for, how many configs to time, and the table."""
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=["Qwen3-30B-A3B"])
    parser.add_argument("--tokens", type=count, nargs="+", default=TOKENS)
    parser.add_argument("--scenario", choices=SCENARIOS, default="recorded")
    parser.add_argument("--trace", type=Path, default=RECORDING, help=TRACE_HELP)
    parser.add_argument("--route", nargs="+", choices=ROUTES, default=ROUTES)
    parser.add_argument("--tried", type=count, default=12, help="best of the ranking to time (12)")
    parser.add_argument(
        "--out", type=Path, default=TABLE_PATH, help="table to enter results in (the shipped one)"
    )
    parser.add_argument("--predict", action="store_true", help="only print the ranking")


def run(arguments: argparse.Namespace) -> int:
    """Tune and enter the results in the table; 2 without a GPU."""
    cases = [
        Case(SHAPES[name], num_tokens, arguments.scenario, trace=arguments.trace)
        for name in arguments.model
        for num_tokens in arguments.tokens
    ]
    try:
        for case in cases:
            make_loads(case)
    except (ValueError, OSError) as error:
        print(f"perf tune: {error}", file=sys.stderr)
        return 2
    if arguments.predict:
        for case in cases:
            for route in arguments.route:
                print_ranking(case, route, arguments.tried)
        return 0
    if not torch.cuda.is_available():
        print(
            "perf tune: needs a GPU, since a table must come from measured times; "
            "--predict prints the simulator's ranking",
            file=sys.stderr,
        )
        return 2
    enter_all(cases, arguments.route, arguments.tried, arguments.out)
    return 0


def enter_all(cases: Sequence[Case], routes: Sequence[str], num_tried: int, table: Path) -> None:
    """Tune each case, enter it in a table and print it."""
    bench = Bench(device_here(), protocol=QUICK)
    for case in cases:
        entry = tune(bench, case, routes, num_tried)
        merge_into_table(table, [entry])  # at once: a later case may run out of time
        print(f"{case.name} T={case.num_tokens}: {describe(entry.config)}")
        for route, us in entry.median_us.items():
            shipped_us = entry.shipped_us.get(route, float("nan"))
            print(f"  {route}: {us:.0f} us, shipped config {shipped_us:.0f} us")
    print("\n".join(dict.fromkeys(bench.notes)))


def merge_into_table(path: Path, entries: Iterable[Tuned]) -> None:
    """Write entries into a table, in place of those with the same key."""
    table = {entry.key: entry for entry in (*read_table(path), *entries)}
    in_order = sorted(
        table.values(), key=lambda entry: (entry.gpu, astuple(entry.layer), entry.num_tokens)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".new")
    written.write_text(json.dumps([asdict(entry) for entry in in_order], indent=1) + "\n")
    written.replace(path)  # at once: an interrupted write must not break the import


def print_ranking(case: Case, route: str, num_shown: int) -> None:
    """Print the simulator's best configs and its figure for the default."""
    load_E, default = make_loads(case), case.default_config
    print(f"{LABEL}\n{case.name}, T = {case.num_tokens}, {route}")
    ranked = search_configs(default, case.model, case.num_tokens, load_E, route)
    for predicted_us, config in ranked[:num_shown]:
        print(f"  {predicted_us:9.0f} us predicted  {describe(config)}")
    default_us = dict((config, us) for us, config in ranked)[default]
    print(f"  {default_us:9.0f} us predicted  the default: {describe(default)}")
