"""Find the fastest KernelConfig for a model and a number of tokens, on the GPU at hand.

The simulator searches first, so that GPU minutes go to promising configs; the best of them are
checked, timed and entered in the table that moe() takes its default from. Without a GPU only
``--predict`` works, which prints the ranking and writes nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megakernel.config import SHIPPED, KernelConfig
from megakernel.launch.tuned import TABLE_PATH, Tuned
from perf.arguments import TRACE_HELP, count
from perf.measuring.measure import QUICK
from perf.problems.cases import RECORDING, SCENARIOS, SHAPES, Case, make_loads
from perf.results.record import LABEL
from perf.simulator.predict import describe, search_configs
from perf.suites.bench import Bench, device_here
from perf.suites.tuning import fastest, merge_into_table

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


def print_ranking(case: Case, route: str, num_shown: int) -> None:
    """Print the simulator's best configs and its figure for the default."""
    load_E, default = make_loads(case), case.default_config
    print(f"{LABEL}\n{case.name}, T = {case.num_tokens}, {route}")
    ranked = search_configs(default, case.model, case.num_tokens, load_E, route)
    for predicted_us, config in ranked[:num_shown]:
        print(f"  {predicted_us:9.0f} us predicted  {describe(config)}")
    default_us = dict((config, us) for us, config in ranked)[default]
    print(f"  {default_us:9.0f} us predicted  the default: {describe(default)}")
