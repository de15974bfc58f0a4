"""Results as rows of one CSV schema, each with what is needed to trust it later."""

import csv
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from perf.measuring.measure import Timing
from perf.sources import digest

ROOT = Path(__file__).parents[2]
# Stands beside every figure that a model of the machine gave.
LABEL = "PREDICTED by a model of the queue, not measured"


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        suite, case, provider, T: what was run.
        mode: graph, eager, host (a wall clock), clock (the launch's own), interpreted (a
            rehearsal), counted, or predicted by the simulator.
        metric, unit: what the figure is.
        median, p20, p80, n: its spread over n samples.
        gpu, driver, torch, triton, commit, date: where and when; see :func:`provenance`.
    """

    suite: str
    case: str
    provider: str
    T: int
    mode: str
    metric: str
    unit: str
    median: float
    p20: float
    p80: float
    n: int
    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str
    date: str

    @property
    def key(self) -> tuple:
        """What two rows must share to be compared."""
        return self.suite, self.case, self.provider, self.T, self.mode, self.metric


_Kind = TypeVar("_Kind")

COLUMNS = tuple(field.name for field in fields(Row))


def make_row(
    suite: str,
    case: str,
    provider: str,
    num_tokens: int,
    mode: str,
    metric: str,
    unit: str,
    timing: Timing,
) -> Row:
    """Return a row with this machine's provenance."""
    return Row(
        suite, case, provider, num_tokens, mode, metric, unit,
        timing.median, timing.p20, timing.p80, timing.n, **provenance(),
    )  # fmt: skip


@cache
def provenance() -> dict[str, str]:
    """Say where this process runs; ``gpu`` is "none" without one."""
    import triton  # here, so that results are read where there is none

    has_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if has_gpu else "none",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if has_gpu
        else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write(rows: Iterable[Row], path: Path) -> None:
    """Write rows to a file, a header first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def read(paths: Sequence[Path]) -> list[Row]:
    """Read the rows of files, or of all CSV files in folders.

    Raises:
        ValueError: on a file with other columns.
        FileNotFoundError: on a path that holds no results.
    """
    rows = []
    for path in paths:
        files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"no CSV file in {path}")
        for file in files:
            rows += _read_file(file)
    return rows


def pick(rows: Sequence[Row], **wanted: str) -> list[Row]:
    """Return the rows whose fields have the wanted values."""
    return [
        row for row in rows if all(getattr(row, name) == want for name, want in wanted.items())
    ]


def provenance_line(rows: Sequence[Row]) -> str:
    """Say where rows come from."""
    row = rows[0]
    gpu = "no GPU" if row.gpu == "none" else row.gpu
    return f"{gpu}, torch {row.torch}, triton {row.triton}, {row.commit}, {row.date}"


def unique(values: Iterable[_Kind]) -> list[_Kind]:
    """Return distinct values in the order they first occur."""
    return list(dict.fromkeys(values))


def _read_file(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} must have the columns {','.join(COLUMNS)}")
        try:
            return [_parse(values) for values in reader]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _parse(values: dict[str, str]) -> Row:
    kinds = {"T": int, "n": int, "median": float, "p20": float, "p80": float}
    return Row(**{name: kinds.get(name, str)(text) for name, text in values.items()})


def _commit() -> str:
    commit = _output("git", "rev-parse", "--short", "HEAD")
    if commit == "unknown":  # a plain copy: its files name it
        return f"sources-{digest()}"
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if changed else commit


def _output(*command: str) -> str:
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
