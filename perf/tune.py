"""Find the fastest KernelConfig for a model and a number of tokens, on the GPU at hand.

The simulator searches first, so that GPU minutes go to promising configs; the best of them are
checked, timed and written to a table. Without a GPU only ``--predict`` works, which prints the
ranking and writes nothing.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from megakernel import Experts, Router, moe, prepare_replay
from megakernel.config import SHIPPED, KernelConfig, default_height
from perf.bench import Bench
from perf.cases import SCENARIOS, SHAPES, Case, make_loads
from perf.measure import QUICK, Timing
from perf.providers import Call, Problem, Provider, make_problem, prepare
from perf.record import provenance
from perf.simulate import LABEL, describe, search_configs

TOKENS = (1, 16, 64, 256, 1024, 4096, 8192, 32768)
MODES = ("live", "replay")


@dataclass(frozen=True)
class Tuned:
    """One entry of the table: the fastest config measured, and how far the default is."""

    gpu: str
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    num_tokens: int
    mode: str
    config: dict[str, int | None]
    median_us: float
    default_us: float
    commit: str


def tune(bench: Bench, case: Case, mode: str, num_tried: int) -> Tuned:
    """Search by the simulator, time its best and the shipped configs, keep the fastest."""
    model = case.model
    ranked = search_configs(
        default_of(case), model, case.num_tokens, make_loads(case), mode, bench.machine
    )
    tried = {describe(config): config for config in SHIPPED.values()}
    tried |= {describe(config): config for _, config in ranked[:num_tried]}
    timing_of = time_configs(bench, make_problem(case, bench.device), mode, tried)
    if not timing_of:
        raise RuntimeError(f"no config ran for {case.name} T={case.num_tokens}")
    best = min(timing_of, key=lambda name: timing_of[name].median)
    shipped_us = min(
        timing_of[name].median for name in map(describe, SHIPPED.values()) if name in timing_of
    )
    return Tuned(
        provenance()["gpu"],
        model.num_experts,
        model.top_k,
        model.hidden,
        model.intermediate,
        case.num_tokens,
        mode,
        asdict(tried[best]),
        timing_of[best].median,
        shipped_us,
        provenance()["commit"],
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
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--scenario", choices=SCENARIOS, default="recorded")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--tried", type=int, default=12, help="best of the ranking to time (12)")
    parser.add_argument("--out", type=Path, default=Path("perf/results/tuned.json"))
    parser.add_argument("--predict", action="store_true", help="only print the ranking")


def run(arguments: argparse.Namespace) -> int:
    """Tune and write the table; 2 without a GPU."""
    cases = [
        Case(SHAPES[name], num_tokens, arguments.scenario)
        for name in arguments.model
        for num_tokens in arguments.tokens
    ]
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
    table = [tune(bench, case, mode, arguments.tried) for case in cases for mode in arguments.mode]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps([asdict(entry) for entry in table], indent=1) + "\n")
    for entry in table:
        print(
            f"T={entry.num_tokens} {entry.mode}: {entry.median_us:.0f} us, "
            f"best shipped {entry.default_us:.0f} us"
        )
    print("\n".join(dict.fromkeys(bench.notes)))
    return 0


def print_ranking(case: Case, mode: str, num_shown: int) -> None:
    """Print the simulator's best configs and its figures for the shipped ones."""
    load_E = make_loads(case)
    print(f"{LABEL}\n{case.name}, T = {case.num_tokens}, {mode}")
    default = default_of(case)
    ranked = search_configs(default, case.model, case.num_tokens, load_E, mode)
    for predicted_us, config in ranked[:num_shown]:
        print(f"  {predicted_us:9.0f} us predicted  {describe(config)}")
    default_us = dict((config, us) for us, config in ranked)[default]
    print(f"  {default_us:9.0f} us predicted  the default: {describe(default)}")


def default_of(case: Case) -> KernelConfig:
    """Return the shipped config that moe() takes for a case on a GPU."""
    return SHIPPED[default_height(case.num_assignments, case.model.num_experts)]
