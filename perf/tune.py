"""Find the fastest KernelConfig for a model and a number of tokens, on the GPU at hand.

The simulator searches first, so that GPU minutes go to promising configs; the best of them are
checked, timed and entered in the table that moe() takes its default from. Without a GPU only
``--predict`` works, which prints the ranking and writes nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from megakernel import Experts, Router, moe, prepare_replay
from megakernel.config import SHIPPED, KernelConfig, shipped_config
from megakernel.launch.tuned import TABLE_PATH, Tuned, merge_into_table
from perf.arguments import count
from perf.measuring.measure import QUICK, Timing
from perf.problems.cases import SCENARIOS, SHAPES, Case, make_loads
from perf.problems.providers import Call, Problem, Provider, make_problem, prepare
from perf.results.record import provenance
from perf.simulator.predict import LABEL, describe, search_configs
from perf.suites.bench import Bench

TOKENS = (1, 16, 64, 256, 1024, 4096, 8192, 32768)
MODES = ("live", "replay")


def tune(bench: Bench, case: Case, modes: Sequence[str], num_tried: int) -> Tuned:
    """Search by the simulator, time its best and the shipped configs, keep the fastest.

    One config serves every mode, since equal configs give equal bits: the least sum of times wins.
    """
    tried = {describe(config): config for config in (case.default_config, *SHIPPED.values())}
    for mode in modes:
        ranked = search_configs(
            case.default_config, case.model, case.num_tokens, make_loads(case), mode, bench.machine
        )
        tried |= {describe(config): config for _, config in ranked[:num_tried]}
    problem = make_problem(case, bench.device)
    timing_of = {mode: time_configs(bench, problem, mode, tried) for mode in modes}
    ran = [name for name in tried if all(name in timing_of[mode] for mode in modes)]
    if not ran:
        raise RuntimeError(f"no config ran for {case.name} T={case.num_tokens}")

    def median_us(name: str) -> dict[str, float]:
        return {mode: timing_of[mode][name].median for mode in modes}

    best = min(ran, key=lambda name: sum(median_us(name).values()))
    untuned = describe(shipped_config(case.num_assignments, case.model.num_experts))
    where = provenance()
    return Tuned(
        where["gpu"],
        case.layer,
        case.num_tokens,
        tried[best],
        median_us(best),
        median_us(untuned) if untuned in ran else {},
        where["torch"],
        where["triton"],
        where["commit"],
        where["date"],
    )


def time_configs(
    bench: Bench, problem: Problem, mode: str, configs: dict[str, KernelConfig]
) -> dict[str, Timing]:
    """Check and time configs on one problem; those that do not compile or are wrong drop out."""
    providers = [
        Provider(name, partial(configured_call, mode=mode, config=config))
        for name, config in configs.items()
    ]
    ready = prepare(problem, providers)
    bench.notes += [f"{name}: {reason}" for name, reason in ready.skipped.items()]
    return bench.time(ready.calls)["graph" if bench.on_gpu else "eager"]


def configured_call(problem: Problem, mode: str, config: KernelConfig) -> Call:
    """Return our call with a config."""
    experts = Experts(problem.gate_up_E2IH, problem.down_EHI)
    replay = None
    if mode == "replay":
        replay = prepare_replay(problem.expert_of_TK, experts.num_experts, config=config)
    router = Router(problem.top_k)
    return lambda: (
        moe(problem.x_TH, problem.router_EH, experts, router, replay=replay, config=config).y_TH
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=["Qwen3-30B-A3B"])
    parser.add_argument("--tokens", type=count, nargs="+", default=TOKENS)
    parser.add_argument("--scenario", choices=SCENARIOS, default="recorded")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--tried", type=count, default=12, help="best of the ranking to time (12)")
    parser.add_argument(
        "--out", type=Path, default=TABLE_PATH, help="table to enter results in (the shipped one)"
    )
    parser.add_argument("--predict", action="store_true", help="only print the ranking")


def run(arguments: argparse.Namespace) -> int:
    """Tune and enter the results in the table; 2 without a GPU."""
    cases = [
        Case(SHAPES[name], num_tokens, arguments.scenario)
        for name in arguments.model
        for num_tokens in arguments.tokens
    ]
    try:
        for case in cases:
            make_loads(case)
    except ValueError as error:
        print(f"perf tune: {error}", file=sys.stderr)
        return 2
    if arguments.predict:
        for case in cases:
            for mode in arguments.mode:
                print_ranking(case, mode, arguments.tried)
        return 0
    if not torch.cuda.is_available():
        print(
            "perf tune: needs a GPU, since a table must come from measured times; "
            "--predict prints the simulator's ranking",
            file=sys.stderr,
        )
        return 2
    bench = Bench(torch.device("cuda"), protocol=QUICK)
    for case in cases:
        entry = tune(bench, case, arguments.mode, arguments.tried)
        merge_into_table(arguments.out, [entry])  # at once: a later case may run out of time
        print(f"{case.name} T={case.num_tokens}: {describe(entry.config)}")
        for mode, us in entry.median_us.items():
            shipped_us = entry.shipped_us.get(mode, float("nan"))
            print(f"  {mode}: {us:.0f} us, shipped config {shipped_us:.0f} us")
    print("\n".join(dict.fromkeys(bench.notes)))
    return 0


def print_ranking(case: Case, mode: str, num_shown: int) -> None:
    """Print the simulator's best configs and its figure for the default."""
    load_E, default = make_loads(case), case.default_config
    print(f"{LABEL}\n{case.name}, T = {case.num_tokens}, {mode}")
    ranked = search_configs(default, case.model, case.num_tokens, load_E, mode)
    for predicted_us, config in ranked[:num_shown]:
        print(f"  {predicted_us:9.0f} us predicted  {describe(config)}")
    default_us = dict((config, us) for us, config in ranked)[default]
    print(f"  {default_us:9.0f} us predicted  the default: {describe(default)}")
