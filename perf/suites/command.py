"""The suites by name, and the command that runs them.

``python -m perf run --suite S --out DIR`` writes DIR/S.csv. Suites that need a GPU say so and are
skipped without one. The exit status is 1 only when something of ours failed.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from perf.measuring.measure import DEFAULT, QUICK
from perf.problems.cases import SHAPES
from perf.problems.peers import ALL_PROVIDERS
from perf.results import record, timelines
from perf.suites import host as suites_host
from perf.suites import layer as suites_layer
from perf.suites import rank as suites_rank
from perf.suites import timeline as suites_timeline
from perf.suites.bench import Bench


@dataclass(frozen=True)
class Suite:
    """A set of cases and what is found out about them.

    Attributes:
        run: fills the bench.
        about: one line.
        needs_gpu: whether its figures mean anything only on a GPU.
    """

    run: Callable[[Bench], None]
    about: str
    needs_gpu: bool


SUITES = {
    "forward": Suite(suites_layer.forward, "models x T = 1024 ... 65536, gate included", True),
    "decode": Suite(suites_layer.decode, "T = 1 ... 256, gate included", True),
    "replay": Suite(suites_layer.replay, "live gate, replay and given routing", True),
    "skew": Suite(suites_layer.skew, "one T, balanced to one expert takes all", True),
    "planner": Suite(suites_rank.planner, "seconds, imbalance, bound, bytes", False),
    "makespan": Suite(
        suites_rank.makespan, "slowest rank under each plan; predicted without a GPU", False
    ),
    "timeline": Suite(
        suites_timeline.timeline, "times of every task, kept by the launch itself", True
    ),
    "host": Suite(suites_host.host, "launches, microseconds, allocations per call", False),
    "simulate": Suite(suites_host.simulate, "predicted launch times, steps of tuning", False),
}


NAMES = tuple(provider.name for provider in ALL_PROVIDERS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", nargs="+", required=True, choices=[*SUITES, "all"])
    parser.add_argument("--out", type=Path, default=Path("out/perf"), help="folder for the CSVs")
    parser.add_argument("--quick", action="store_true", help="few small cases, few rounds")
    parser.add_argument("--model", nargs="+", default=[], choices=SHAPES, help="only these")
    parser.add_argument("--provider", nargs="+", default=[], choices=NAMES, help="only these")
    parser.add_argument("--budget", type=float, help="seconds after which no new case starts")


def run(arguments: argparse.Namespace) -> int:
    """Run suites and return 0 unless something of ours failed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = list(SUITES) if "all" in arguments.suite else arguments.suite
    failures = []
    for name in wanted:
        bench = Bench(
            device,
            arguments.quick,
            QUICK if arguments.quick else DEFAULT,
            time.monotonic() + arguments.budget if arguments.budget else None,
            tuple(arguments.model),
            tuple(arguments.provider),
        )
        failures += run_suite(name, bench, arguments.out)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def run_suite(name: str, bench: Bench, out: Path) -> list[str]:
    """Run one suite, write its rows, say what was skipped; return its failures."""
    suite = SUITES[name]
    if suite.needs_gpu and not bench.on_gpu:
        print(f"{name}: skipped, its figures need a GPU")
        return []
    start = time.monotonic()
    suite.run(bench)
    if bench.on_gpu:
        bench.add_roofs(name)
    if bench.rows:
        record.write(bench.rows, out / f"{name}.csv")
    for stem, saved in bench.timelines.items():
        timelines.save(saved, out / f"timeline_{stem}.npz")
    seconds = time.monotonic() - start
    print(f"{name}: {len(bench.rows)} figures in {seconds:.0f} s -> {out / f'{name}.csv'}")
    for note in dict.fromkeys(bench.notes):
        print(f"  {note}")
    return [f"{name}: {failure}" for failure in bench.failures]
