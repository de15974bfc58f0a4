"""Compare two results and fail when something of ours got slower.

``python -m perf compare BEFORE AFTER --fail 5%``: files or folders of CSVs from one kind of GPU. A
figure fails when its median is worse by more than the limit and the 20-80 % bands do not overlap.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from perf.results import record
from perf.results.record import Row

# Units in which less is better; rates and ratios say the same again.
GATED_UNITS = ("us", "s", "launches", "tensors", "max/mean", "MB")
OUR_NAMES = ("ours", "our plan", "this planner")


@dataclass(frozen=True)
class Change:
    """One figure in both results.

    Attributes:
        before, after: equal in their keys.
    """

    before: Row
    after: Row

    @property
    def growth(self) -> float:
        """after / before - 1, infinite from zero."""
        if not self.before.median:
            return float("inf") if self.after.median else 0.0
        return self.after.median / self.before.median - 1

    @property
    def overlaps(self) -> bool:
        """Whether the bands of 20 to 80 % have a value in common."""
        return self.after.p20 <= self.before.p80 and self.before.p20 <= self.after.p80

    def __str__(self) -> str:
        row = self.after
        name = f"{row.suite} {row.case} {row.provider} T={row.T} {row.mode} {row.metric}"
        return (
            f"{name}: {self.before.median:.4g} -> {row.median:.4g} {row.unit} ({self.growth:+.1%})"
        )


@dataclass(frozen=True)
class Comparison:
    """What changed between two results.

    Attributes:
        changes: figures in both, the worst first.
        worse: those of ours that got worse by more than the limit.
        lost: figures of ours that the second result lacks.
    """

    changes: list[Change]
    worse: list[Change]
    lost: list[Row]


def compare(before: Iterable[Row], after: Iterable[Row], limit: float) -> Comparison:
    """Match figures and find the ones that got worse by more than ``limit``.

    Raises:
        ValueError: if the results come from different GPUs.
    """
    before_of = {row.key: row for row in before if row.unit in GATED_UNITS}
    after_of = {row.key: row for row in after if row.unit in GATED_UNITS}
    gpus = {row.gpu for row in (*before_of.values(), *after_of.values())}
    if len(gpus) > 1:
        raise ValueError(f"both results must come from one kind of GPU, got {sorted(gpus)}")
    changes = [Change(row, after_of[key]) for key, row in before_of.items() if key in after_of]
    changes.sort(key=lambda change: -change.growth)
    worse = [
        change
        for change in changes
        if is_ours(change.after) and change.growth > limit and not change.overlaps
    ]
    lost = [row for key, row in before_of.items() if key not in after_of and is_ours(row)]
    return Comparison(changes, worse, lost)


def is_ours(row: Row) -> bool:
    """Whether a figure is about this project's code: only those can fail."""
    return row.mode == "predicted" or row.provider.startswith(OUR_NAMES)


def parse_percent(text: str) -> float:
    """Read "5%" or "0.05"."""
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two results, the limit, and how much to print."""
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--fail", type=parse_percent, default=0.05, metavar="5%%")
    parser.add_argument("--show", type=int, default=10, help="changes to print (10)")


def run(arguments: argparse.Namespace) -> int:
    """Print the largest changes; 1 when ours got worse, 2 when there is nothing to compare."""
    try:
        found = compare(
            record.read([arguments.before]), record.read([arguments.after]), arguments.fail
        )
    except (ValueError, OSError) as error:
        print(f"perf compare: {error}", file=sys.stderr)
        return 2
    if not found.changes:
        print("perf compare: the results have no figure in common", file=sys.stderr)
        return 2
    print(f"{len(found.changes)} figures in both; the worst changes:")
    for change in found.changes[: arguments.show]:
        print(f"  {change}{'  (bands overlap)' if change.overlaps else ''}")
    for change in found.worse:
        print(f"FAILED {change}", file=sys.stderr)
    for row in found.lost:
        print(f"FAILED lost: {' '.join(map(str, row.key))}", file=sys.stderr)
    return 1 if found.worse or found.lost else 0
