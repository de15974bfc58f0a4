"""The suites by name: a table that imports nothing, so that listing and refusing are quick."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perf.suites.bench import Bench

Run = Callable[["Bench"], None]


@dataclass(frozen=True)
class Suite:
    """A set of cases and what is found out about them.

    Attributes:
        run: fills the bench.
        about: one line.
        needs_gpu: whether its figures mean anything only on a GPU.
    """

    run: Run
    about: str
    needs_gpu: bool


def later(module: str, function: str) -> Run:
    """Return a suite's function, whose module is imported when it runs."""

    def run(bench: "Bench") -> None:
        getattr(import_module(f"perf.suites.{module}"), function)(bench)

    return run


SUITES = {
    "forward": Suite(
        later("layer", "forward"), "models x T = 1024 ... 65536, router included", True
    ),
    "decode": Suite(later("layer", "decode"), "T = 1 ... 256, router included", True),
    "replay": Suite(later("layer", "replay"), "routes compared: live, replay and given", True),
    "skew": Suite(later("layer", "skew"), "one T, balanced to one expert takes all", True),
    "backward": Suite(
        later("training", "backward"), "gradients of everything, the forward before it", True
    ),
    "train": Suite(later("training", "train"), "forward and backward, router included", True),
    "planner": Suite(later("rank", "planner"), "seconds, imbalance, bound, bytes", False),
    "makespan": Suite(
        later("rank", "makespan"), "slowest rank under each plan; predicted without a GPU", False
    ),
    "timeline": Suite(
        later("timeline", "timeline"), "times of every task, kept by the launch itself", True
    ),
    "host": Suite(later("host", "host"), "launches, microseconds, allocations per call", False),
    "simulate": Suite(later("host", "simulate"), "predicted launch times, steps of tuning", False),
}
