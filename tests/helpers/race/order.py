"""What happens before what, by guarantee: signals that a wait must have seen, and no others."""

from collections import defaultdict
from dataclasses import dataclass, field

from tests.helpers.race.events import ATOMIC, LOAD, Event, Unit

# Sets of signals are integers with one bit for each.


@dataclass(frozen=True)
class Wait:
    """A value that a worker waited for, and how much reached that counter in the launch."""

    event: Event
    address: int
    awaited: int
    total: int | None  # without what the wait itself added; None if not only added to

    @property
    def is_guarantee(self) -> bool:
        """Whether every signal must have been there."""
        return self.total is not None and self.awaited >= self.total


@dataclass
class Order:
    """The order of a launch's events, once all of them are known.

    A task's own accesses are ordered before another's by a chain of signals and waits that must
    have happened whichever worker ran which task. What a worker has once acquired stays acquired.
    """

    events: list[Event]
    totals: dict[int, int | None] = field(default_factory=dict)
    waits: dict[int, list[Wait]] = field(default_factory=lambda: defaultdict(list))
    signals: dict[Unit, list[Event]] = field(default_factory=lambda: defaultdict(list))
    last_unit: dict[int, Unit] = field(default_factory=dict)
    first_unit: dict[int, Unit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Count what reached each counter, then follow what each worker knows."""
        for event in self.events:
            self.first_unit.setdefault(event.worker, event.unit)
            if event.unit.is_last:
                self.last_unit[event.worker] = event.unit
            if event.kind == ATOMIC:
                self._count(event)
        self._follow()

    def _count(self, event: Event) -> None:
        for address in event.addresses.tolist():
            total = self.totals.get(address, 0)
            self.totals[address] = None if None in (total, event.added) else total + event.added

    def _follow(self) -> None:
        known: dict[int, int] = defaultdict(int)  # by each worker
        at_counter: dict[int, int] = defaultdict(int)  # everything its signals published
        num_signals = 0
        for event in self.events:
            if event.kind == ATOMIC and event.is_scalar:
                address = int(event.addresses[0])
                seen = at_counter[address]
                if event.order.endswith("RELEASE") and event.added != 0:
                    signal = 1 << num_signals
                    num_signals += 1
                    event.signal = signal
                    self.signals[event.unit].append(event)
                    at_counter[address] |= known[event.worker] | signal
                if event.awaited is not None and self._waited(event, address):
                    known[event.worker] |= seen
            event.known = known[event.worker]

    def _waited(self, event: Event, address: int) -> bool:
        total = self.totals[address]
        rest = None if None in (total, event.added) else total - event.added
        wait = Wait(event, address, event.awaited, rest)
        self.waits[event.worker].append(wait)
        return wait.is_guarantee

    def published(self, event: Event) -> int:
        """Return the signals that publish an event: itself, or after a barrier by its unit.

        The last unit of a worker also publishes what the worker's tasks did, for the worker leaves
        after all of them, whichever they were.
        """
        units = {event.unit, self.last_unit.get(event.worker, event.unit)}
        return event.signal | sum(
            signal.signal
            for unit in units
            for signal in self.signals[unit]
            if signal.barriers > event.barriers
        )

    def why_unordered(self, first: Event, second: Event) -> str:
        """Say what is missing where ``first`` is not ordered before ``second``."""
        signals = self.signals[first.unit]
        seen = [signal for signal in signals if signal.signal & second.known]
        if first.unit is second.unit:
            return "no barrier lies between"
        if any(signal.number > first.number for signal in seen):
            return "no barrier lies before its signal"
        if seen:
            return "its signal comes too early"
        if not signals:
            return "it signals nothing"
        return "no wait is sure to see its signal"

    def is_ordered(self, first: Event, second: Event) -> bool:
        """Whether ``first``, which ran before, always does."""
        if first.worker == second.worker and self.in_program_order(first.unit, second.unit):
            return first.barriers < second.barriers or by_the_same_threads(first, second)
        return bool(self.published(first) & second.known)

    def in_program_order(self, first: Unit, second: Unit) -> bool:
        """Whether a worker does the one before the other, whatever tasks it gets."""
        worker = first.worker
        return first is second or first is self.first_unit[worker] or second.is_last


def by_the_same_threads(first: Event, second: Event) -> bool:
    """Whether each element is touched by one thread, so that its program's order is enough.

    Scalars are stored and changed by the first thread. A tensor of addresses has one layout, so
    what is overwritten through the very addresses it was read from is overwritten by its reader.
    """
    if first.compared:  # its result reached all threads before any of them could go on
        return True
    if second.kind == LOAD:
        return False
    if first.is_scalar and second.is_scalar and first.kind != LOAD:
        return True
    return first.addresses.shape == second.addresses.shape and bool(
        (first.addresses == second.addresses).all()
    )
