"""Run suites by name: check, time or count, and write what was found.

``python -m perf run --suite S --out DIR`` writes DIR/S.csv. Suites that need a GPU say so and are
skipped without one. The exit status is 1 only when something of ours failed.
"""

import argparse
import sys
import time
from pathlib import Path

from perf.arguments import TRACE_HELP
from perf.measuring.measure import DEFAULT, QUICK
from perf.problems.cases import RECORDING, SHAPES, read_trace
from perf.problems.peers import ALL_PROVIDERS
from perf.problems.training import OURS_TRAINING
from perf.results import record, timelines
from perf.suites.bench import Bench, device_here
from perf.suites.table import SUITES

NAMES = tuple(dict.fromkeys(one.name for one in (*ALL_PROVIDERS, *OURS_TRAINING)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add which suites run, on what, for how long, and where results go."""
    parser.add_argument("--suite", nargs="+", required=True, choices=[*SUITES, "all"])
    parser.add_argument("--out", type=Path, default=Path("out/perf"), help="folder for the CSVs")
    parser.add_argument("--quick", action="store_true", help="few small cases, few rounds")
    parser.add_argument("--model", nargs="+", default=[], choices=SHAPES, help="only these")
    parser.add_argument("--provider", nargs="+", default=[], choices=NAMES, help="only these")
    parser.add_argument("--trace", type=Path, default=RECORDING, help=TRACE_HELP)
    parser.add_argument("--budget", type=float, help="seconds after which no new case starts")


def run(arguments: argparse.Namespace) -> int:
    """Run suites and return 0 unless something of ours failed; 2 when the trace is none."""
    try:
        read_trace(arguments.trace)
    except (ValueError, OSError) as error:
        print(f"perf run: --trace must be a recording: {error}", file=sys.stderr)
        return 2
    device = device_here()
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
            arguments.trace,
        )
        failures += run_suite(name, bench, arguments.out)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def run_suite(name: str, bench: Bench, out: Path, anywhere: bool = False) -> list[str]:
    """Run one suite, write its rows, say what was skipped; return its failures.

    A suite that breaks keeps the rows it has, and does not end the others.

    Args:
        name: key of SUITES.
        bench: where it runs.
        out: folder for its files.
        anywhere: whether a suite whose figures need a GPU is rehearsed without one.
    """
    suite = SUITES[name]
    if suite.needs_gpu and not (bench.on_gpu or anywhere):
        print(f"{name}: skipped, its figures need a GPU")
        return []
    start = time.monotonic()
    try:
        suite.run(bench)
        if bench.on_gpu:
            bench.add_roofs(name)
    except Exception as error:  # whatever it is, the next suite has its own cases
        bench.failures.append(f"{type(error).__name__}: {error}")
    if bench.rows:
        record.write(bench.rows, out / f"{name}.csv")
    for stem, saved in bench.timelines.items():
        timelines.save(saved, out / f"timeline_{stem}.npz")
    seconds = time.monotonic() - start
    print(f"{name}: {len(bench.rows)} figures in {seconds:.0f} s -> {out / f'{name}.csv'}")
    for note in dict.fromkeys(bench.notes):
        print(f"  {note}")
    return [f"{name}: {failure}" for failure in bench.failures]
