"""What one launch did to memory: its events, who did them, and how findings name them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

SHOWN = 5  # findings in the text of an error
LOAD, STORE, ATOMIC = "load", "store", "change"


def order_of(semantic: Any, scope: Any) -> str:
    """Name the order of an atomic among the workers of a launch."""
    return "RELAXED" if scope.name == "CTA" else semantic.name


@dataclass(eq=False)
class Unit:
    """What a worker did between two claims: nothing orders it against its other units."""

    worker: int
    task: int | None = None  # None before the first claim
    is_last: bool = True  # whether the worker claimed nothing after it


@dataclass(eq=False)
class Event:
    """One operation on memory, by all threads of a worker.

    ``awaited`` is the least of the values that what an atomic returned was found to have reached.
    """

    number: int  # in the order in which the interpreter ran them
    unit: Unit
    kind: str
    addresses: np.ndarray
    size: int
    barriers: int  # how many the worker had passed
    by_descriptor: bool = False
    order: str = "plain"  # of an atomic: RELAXED, ACQUIRE, RELEASE or ACQUIRE_RELEASE
    added: int | None = 0  # None if an atomic did something else than add
    awaited: int | None = None
    compared: bool = False
    signal: int = 0  # see order.py
    known: int = 0

    @property
    def worker(self) -> int:
        """The program it belongs to."""
        return self.unit.worker

    @property
    def is_scalar(self) -> bool:
        """Whether one thread did it, if it is no load."""
        return self.addresses.size == 1


class RaceError(AssertionError):
    """A launch whose result depends on luck; ``findings`` says where."""

    def __init__(self, findings: list[str]) -> None:
        """Show the first few."""
        self.findings = findings
        more = [f"and {len(findings) - SHOWN} more"] if len(findings) > SHOWN else []
        super().__init__("\n".join([f"{len(findings)} findings", *findings[:SHOWN], *more]))


@dataclass(frozen=True)
class Names:
    """How findings name a task (None past the end of the list) and a counter."""

    task: Callable[[int], str | None]
    counter: Callable[[int], str]

    def unit(self, unit: Unit) -> str:
        """Name the task, or the worker beside its tasks."""
        if unit.task is None:
            return f"worker {unit.worker} before its first task"
        return self.task(unit.task) or f"worker {unit.worker} after its last task"
