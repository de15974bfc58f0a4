"""What ``make gpu`` runs: the GPU's tests, then every suite, in under nine minutes.

Each part has a budget of seconds; a suite starts no new case past its own, and none starts past
the whole. Results and pictures go to a folder named after the date and the GPU.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from megakernel.tools.compile_cases import layer_cases
from megakernel.tools.compile_check import compile_case
from perf.measuring.measure import DEFAULT, QUICK, Protocol
from perf.problems.providers import OURS, PLAIN
from perf.results import timelines
from perf.results.record import ROOT, provenance
from perf.results.report import draw_all, read_or_none
from perf.suites.bench import Bench
from perf.suites.command import run_suite

TOTAL_SECONDS = 520.0
TEST_SECONDS = 160.0
# In the order they run: what the goals are about first.
SECONDS_OF_SUITE = {
    "forward": 110.0,
    "decode": 60.0,
    "replay": 35.0,
    "timeline": 20.0,
    "skew": 40.0,
    "makespan": 25.0,
    "host": 15.0,
    "planner": 15.0,
    "simulate": 10.0,
}
REPORT_SECONDS = 20.0


@dataclass
class Clock:
    """Seconds left of the whole run.

    Attributes:
        end: ``time.monotonic()`` at which it must be over.
    """

    end: float

    def budget(self, wanted: float) -> float:
        """Return the seconds a part may take: what it wants, or what is left."""
        return max(0.0, min(wanted, self.end - time.monotonic() - REPORT_SECONDS))


def main(argv: list[str] | None = None) -> int:
    """Run everything; 0 when nothing failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m perf.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS)
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results")
    parser.add_argument("--full", action="store_true", help="50 rounds instead of 10")
    parser.add_argument("--no-peers", action="store_true", help="only ours and plain PyTorch")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("perf.gpu: no GPU here; `make test` covers everything else", file=sys.stderr)
        return 2
    clock = Clock(time.monotonic() + arguments.seconds)
    out = arguments.out / f"{provenance()['date']}-{provenance()['gpu'].replace(' ', '-')}"
    names = tuple(one.name for one in (*OURS, *PLAIN)) if arguments.no_peers else ()
    with precompile():
        failures = run_tests(clock)
    failures += run_suites(clock, out, DEFAULT if arguments.full else QUICK, names)
    draw_all(read_or_none([out]), out)
    timelines.draw_saved([out], out)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


@contextmanager
def precompile() -> Iterator[None]:
    """Fill Triton's cache on the idle cores meanwhile: compiling would eat the suites' budgets."""
    spare_cores = max((os.cpu_count() or 1) - 2, 1)
    with ProcessPoolExecutor(spare_cores, mp_context=get_context("spawn")) as pool:
        # The suites run every model as a plain layer in its own slots.
        plain = [replace(case, kind="plain") for case in layer_cases()]
        done = [pool.submit(compile_case, case) for case in plain]
        yield
        errors = [error for one in done if (error := one.exception())]
    if errors:
        print(f"{len(errors)} of {len(done)} configs did not compile, first: {errors[0]}")


def run_tests(clock: Clock) -> list[str]:
    """Run the tests that need a GPU in a process of their own."""
    budget = clock.budget(TEST_SECONDS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu and not slow",
        "--maxfail=5",
        "tests/gpu",
    ]
    try:
        status = subprocess.run(command, cwd=ROOT, timeout=budget).returncode
    except subprocess.TimeoutExpired:
        return [f"tests: not done after {budget:.0f} s"]
    return [f"tests: pytest exited with {status}"] if status else []


def run_suites(
    clock: Clock, out: Path, protocol: Protocol, providers: tuple[str, ...] = ()
) -> list[str]:
    """Run every suite within its budget; one that breaks does not stop the others."""
    failures, roofs = [], None
    for name, wanted in SECONDS_OF_SUITE.items():
        budget = clock.budget(wanted)
        if not budget:
            print(f"{name}: skipped, no time left")
            continue
        deadline = time.monotonic() + budget
        bench = Bench(
            torch.device("cuda"),
            protocol=protocol,
            deadline=deadline,
            providers=providers,
            known_roofs=roofs,
        )
        try:
            failures += run_suite(name, bench, out)
            roofs = bench.roofs
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
    return failures


if __name__ == "__main__":
    sys.exit(main())
