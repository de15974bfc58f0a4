"""Find out on an H100 or H200 what a CPU cannot say: is the layer right there, and how fast.

Nothing but this machine's own Python is needed: torch, Triton, numpy, pytest. ``first`` takes at
most 220 s: versions, roofs, a ladder of ever larger checks that ends where one breaks, and first
times. ``second`` takes at most 400 s: the GPU's tests, suites against every installed peer, and
levers. Each leaves three files in --out: VERB.log, VERB.verdict.txt and VERB.tgz, also when it
fails or is told to end.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from perf.gpu.archive import CACHE, unpack_cache
from perf.gpu.child import FAULTS
from perf.gpu.plans import PLANS, rehearsed
from perf.gpu.process import Setting
from perf.gpu.run import run_plan

# Triton notes absolute paths of what it compiled, so both runs work in the same place.
WORK = Path(tempfile.gettempdir()) / "moe-megakernel-gpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a plan; 0 when all of it passed, 2 on arguments that are none."""
    given = make_parser().parse_args(argv)
    plan = rehearsed(PLANS[given.verb]) if given.rehearse else PLANS[given.verb]
    unknown = {name for _, name in given.plant} - {step.name for step in plan.steps}
    if unknown:
        print(f"perf.gpu: --plant must name a step of {given.verb}, got {sorted(unknown)}",
              file=sys.stderr)  # fmt: skip
        return 2
    work = fresh(given.work / given.verb)
    cache = given.work / CACHE
    cache.mkdir(parents=True, exist_ok=True)
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        if given.cache is not None:
            print(f"{unpack_cache(given.cache, cache)} files of compiled kernels taken over")
    except ValueError as error:
        print(f"perf.gpu: {error}", file=sys.stderr)
        return 2
    faults = {name: fault for fault, name in given.plant}
    return run_plan(plan, Setting(work, cache, given.rehearse, faults), given.out)


def fresh(folder: Path) -> Path:
    """Return an empty folder of that name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m perf.gpu", description=__doc__)
    parser.add_argument("verb", choices=PLANS, help="which run")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of its files")
    parser.add_argument("--cache", type=Path, help="archive of a run whose kernels to take over")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for everything else")
    parser.add_argument(
        "--rehearse", action="store_true", help="run every step on the CPU, on tiny shapes"
    )
    parser.add_argument("--plant", type=fault_at, action="append", default=[],
                        help=argparse.SUPPRESS)  # fmt: skip
    return parser


def fault_at(text: str) -> tuple[str, str]:
    """A fault and the step it is planted in, such as hang@smallest."""
    fault, _, name = text.partition("@")
    if fault not in FAULTS or not name:
        raise argparse.ArgumentTypeError(f"must be one of {FAULTS} @ a step, got {text!r}")
    return fault, name


if __name__ == "__main__":
    sys.exit(main())
