"""Write down what the programs of a launch do to memory, and which task does it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from triton.runtime.interpreter import TensorHandle

from tests.helpers.race.events import (
    ATOMIC,
    LOAD,
    STORE,
    Event,
    Names,
    RaceError,
    Unit,
    order_of,
)
from tests.helpers.race.grid import builder, replaced

NO_TASK = 1 << 30  # what a claim returns to a worker that shall leave

# The value that a number is known to have reached once a comparison came out as it did.
REACHED: dict[str, Callable[[int, int], int | None]] = {
    "LT": lambda seen, other: other if seen >= other else None,
    "GE": lambda seen, other: other if seen >= other else None,
    "LE": lambda seen, other: other + 1 if seen > other else None,
    "GT": lambda seen, other: other + 1 if seen > other else None,
    "EQ": lambda seen, other: other if seen == other else None,
    "NE": lambda seen, other: other if seen == other else None,
}
MIRRORED = {"LT": "GT", "GE": "LE", "LE": "GE", "GT": "LT", "EQ": "EQ", "NE": "NE"}
COMPARISONS = {
    f"create_icmp{sign}{name}": name
    for name in REACHED
    for sign in ("S", "U")
    if hasattr(builder, f"create_icmp{sign}{name}")
} | {f"create_icmp{name}": name for name in ("EQ", "NE")}


class Dealing(Protocol):
    """Says which claims may take a task."""

    def __call__(self, worker: int, num_claimed: int) -> bool:
        """Whether a worker that has run so many tasks may have another."""


@dataclass
class Recorder:
    """The events of one launch, in the order in which the interpreter ran them."""

    names: Names
    claim_address: Callable[[], int]
    may_claim: Dealing
    one_unit: bool = False  # whether all that a worker does belongs to the one task it gets
    polls_fail: bool = False  # whether the first poll of every wait comes too early
    is_inside: Callable[[np.ndarray, int], bool] = lambda addresses, size: True
    events: list[Event] = field(default_factory=list)
    unit_of_worker: dict[int, Unit] = field(default_factory=dict)
    claimed: dict[int, Unit] = field(default_factory=dict)  # units that have done nothing yet
    polled: set[tuple[int, int]] = field(default_factory=set)  # (worker, address) that shall retry
    num_claimed: dict[int, int] = field(default_factory=dict)
    barriers: dict[int, int] = field(default_factory=dict)
    returned: dict[int, tuple[TensorHandle, Event]] = field(default_factory=dict)
    in_descriptor: bool = False
    outside: str | None = None  # what was refused before it happened

    @property
    def worker(self) -> int:
        """The program that is running."""
        return builder.grid_idx[0]

    def recording(self) -> AbstractContextManager[None]:
        """Watch the interpreter's operations."""
        comparisons = {
            name: self.comparing(getattr(builder, name), comparison)
            for name, comparison in COMPARISONS.items()
        }
        return replaced(
            {
                "create_masked_load": self.loading(builder.create_masked_load),
                "create_masked_store": self.storing(builder.create_masked_store),
                "create_descriptor_load": self.through_descriptor(builder.create_descriptor_load),
                "create_descriptor_store": self.through_descriptor(
                    builder.create_descriptor_store
                ),
                "create_atomic_rmw": self.changing(builder.create_atomic_rmw),
                "create_atomic_cas": self.exchanging(builder.create_atomic_cas),
                "create_barrier": self.passing_a_barrier,
                **comparisons,
            }
        )

    def log(self, kind: str, pointers: Any, mask: Any, **more: Any) -> Event | None:
        """Add an event; none if the mask is false everywhere."""
        addresses = pointers.data
        if mask is not None:
            # A scalar's comparison, spread over a tile, has integers for truth values.
            held = np.broadcast_to(np.asarray(mask.data, bool), addresses.shape)
            addresses = addresses[held]
        if not addresses.size:
            return None
        unit = self.unit_of(is_signal=more.get("order") == "RELEASE" and more.get("added") != 0)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = addresses.astype(np.int64).ravel()
        event = Event(
            len(self.events), unit, kind, addresses, size, self.barriers.get(unit.worker, 0),
            self.in_descriptor, **more,
        )  # fmt: skip
        self.events.append(event)
        if not self.is_inside(addresses, size):
            self.outside = f"{self.names.unit(unit)} {kind}s outside every tensor of the launch"
            raise RaceError([self.outside])  # before it ends the process
        return event

    def unit_of(self, is_signal: bool) -> Unit:
        """Return what the running worker is at.

        A signal belongs to the task whose work came before it, even if the next is claimed by
        then: a claim's unit starts with the first event that is no signal.
        """
        worker = self.worker
        if worker in self.claimed and not is_signal:
            self.unit_of_worker[worker] = self.claimed.pop(worker)
        return self.unit_of_worker.setdefault(worker, Unit(worker))

    def loading(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``load``, followed."""

        def follow(pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            self.log(LOAD, pointers, mask)
            return load(pointers, mask, *rest, **named)

        return follow

    def storing(self, store: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``store``, followed."""

        def follow(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.log(STORE, pointers, mask)
            return store(pointers, value, mask, *rest)

        return follow

    def through_descriptor(self, move: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``move``, its accesses marked as the copy engine's."""

        def follow(*args: Any, **named: Any) -> Any:
            self.in_descriptor = True
            try:
                return move(*args, **named)
            finally:
                self.in_descriptor = False

        return follow

    def changing(self, change: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``change``, followed; a claim that gets no task changes nothing."""

        def follow(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            order = order_of(*rest)
            added = int(value.data.sum()) if operation.name == "ADD" else None
            is_claim = int(pointers.data.flat[0]) == self.claim_address() and added == 1
            if is_claim and not self.may_claim(self.worker, self.num_claimed.get(self.worker, 0)):
                return self.claim(TensorHandle(np.array([NO_TASK], np.int32), value.dtype.scalar))
            if order.startswith("ACQUIRE") and added == 0 and self.comes_early(pointers):
                return TensorHandle(np.zeros_like(value.data), value.dtype.scalar)
            event = self.log(ATOMIC, pointers, mask, order=order, added=added)
            handle = change(operation, pointers, value, mask, *rest)
            return self.claim(handle) if is_claim else self.remember(handle, event)

        return follow

    def comes_early(self, pointers: Any) -> bool:
        """Whether a poll shall see what its counter held at first: every other one does."""
        place = self.worker, int(pointers.data.flat[0])
        if not self.polls_fail or place in self.polled:
            self.polled.discard(place)
            return False
        self.polled.add(place)
        return True

    def claim(self, taken: TensorHandle) -> TensorHandle:
        """Start the worker's next unit with what its claim got."""
        worker, task = self.worker, int(taken.data.flat[0])
        self.num_claimed[worker] = self.num_claimed.get(worker, 0) + 1
        unit = self.unit_of_worker.setdefault(worker, Unit(worker))
        if not self.one_unit:
            unit.is_last = False
            self.claimed[worker] = Unit(worker, task)
        elif unit.task is None:
            unit.task = task
        return taken

    def exchanging(self, exchange: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``exchange``, followed."""

        def follow(pointers: Any, expected: Any, value: Any, *rest: Any) -> Any:
            self.log(ATOMIC, pointers, None, order=order_of(*rest), added=None)
            return exchange(pointers, expected, value, *rest)

        return follow

    def passing_a_barrier(self) -> None:
        """Count it: what threads of a worker did before is then visible to all of them."""
        self.barriers[self.worker] = self.barriers.get(self.worker, 0) + 1

    def remember(self, handle: TensorHandle, event: Event | None) -> TensorHandle:
        """Keep what an atomic returned, to see what it is compared with."""
        if event is not None and event.is_scalar and event.order.startswith("ACQUIRE"):
            self.returned[id(handle)] = handle, event
        return handle

    def comparing(self, compare: Callable[..., Any], comparison: str) -> Callable[..., Any]:
        """Return ``compare``, which says what the value that a wait saw has reached."""

        def follow(left: TensorHandle, right: TensorHandle) -> Any:
            self.find(left, right, REACHED[comparison])
            self.find(right, left, REACHED[MIRRORED[comparison]])
            return compare(left, right)

        return follow

    def find(
        self, seen: TensorHandle, other: TensorHandle, reached: Callable[[int, int], int | None]
    ) -> None:
        """Keep the least of what the comparisons of one returned value say."""
        handle, event = self.returned.get(id(seen), (None, None))
        if event is None or handle is not seen:
            return
        value = reached(int(seen.data.flat[0]), int(other.data.flat[0]))
        if event.compared:
            known = (event.awaited, value)
            event.awaited = None if None in known else min(known)
        else:
            event.compared, event.awaited = True, value
