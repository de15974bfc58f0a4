"""Refuse a launch in which an access is not ordered after the one it depends on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from tests.helpers.race.events import ATOMIC, LOAD, STORE, Event, Names, RaceError
from tests.helpers.race.memory import Memory
from tests.helpers.race.order import Order

WORD_BYTES = 4


@dataclass
class Check:
    """All rules, over the events of one launch.

    Attributes:
        memory: the tensors of the launch.
        events: what happened, in order.
        names: for people.
        findings: what is wrong.
        dropped: addresses of 32-bit words that may be read though nobody wrote there, for what is
            found is dropped.
    """

    memory: Memory
    events: list[Event]
    names: Names
    findings: list[str] = field(default_factory=list)
    dropped: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        """Find out who touches which units of memory."""
        self.order = Order(self.events)
        self.touched = [self.memory.units(event.addresses, event.size) for event in self.events]
        self.is_counter = np.zeros(self.memory.num_units, bool)
        for event, units in self._with_units():
            if event.kind == ATOMIC:
                self.is_counter[units] = True

    def _with_units(self) -> Iterator[tuple[Event, np.ndarray]]:
        return zip(self.events, self.touched, strict=True)

    def run(self) -> None:
        """Apply every rule.

        Raises:
            RaceError: if one is broken.
        """
        self.check_stores_hit_once()
        self.check_after_writes()
        self.check_before_overwrites()
        self.check_counters()
        if self.findings:
            raise RaceError(self.findings)

    def check_stores_hit_once(self) -> None:
        """Two threads of one store may not write one place."""
        for event, units in self._with_units():
            if event.kind == STORE and len(np.unique(units)) < len(units):
                counts = np.bincount(units - units.min())
                place = int(counts.argmax() + units.min())
                name = self.names.unit(event.unit)
                self.findings.append(
                    f"{name}: one store writes {self.memory.describe(place)} {counts.max()} times"
                )

    def check_after_writes(self) -> None:
        """Reads and overwrites follow the latest write; nothing is read that nobody wrote."""
        latest = np.full(self.memory.num_units, -1, np.int32)
        unfilled = self.memory.unfilled()
        unfilled[self.memory.units(self.dropped, WORD_BYTES)] = False
        for number, (event, units) in enumerate(self._with_units()):
            units = units[~self.is_counter[units]]
            earlier = latest[units]
            if event.kind == LOAD:
                self._check_filled(event, units[(earlier < 0) & unfilled[units]])
            self._check_pairs(earlier, units, lambda other, event=event: (other, event))
            if event.kind == STORE:
                latest[units] = number

    def _check_filled(self, event: Event, units: np.ndarray) -> None:
        if units.size:
            self.findings.append(
                f"{self.names.unit(event.unit)} reads {self.memory.describe(int(units[0]))}, "
                "which nobody has written"
            )

    def check_before_overwrites(self) -> None:
        """Reads precede the next overwrite."""
        following = np.full(self.memory.num_units, -1, np.int32)
        for number in range(len(self.events) - 1, -1, -1):
            event, units = self.events[number], self.touched[number]
            units = units[~self.is_counter[units]]
            if event.kind == LOAD:
                self._check_pairs(
                    following[units], units, lambda other, event=event: (event, other)
                )
            elif event.kind == STORE:
                following[units] = number

    def _check_pairs(
        self,
        others: np.ndarray,
        units: np.ndarray,
        in_order: Callable[[Event], tuple[Event, Event]],
    ) -> None:
        """Refuse each (event, unit) of which the one is not ordered before the other."""
        numbers, places = np.unique(others, return_index=True)
        for number, place in zip(numbers.tolist(), places.tolist(), strict=True):
            if number >= 0:
                first, second = in_order(self.events[number])
                self._check_pair(first, second, int(units[place]))

    def _check_pair(self, first: Event, second: Event, unit: int) -> None:
        if not self.order.is_ordered(first, second):
            self.findings.append(self.explain(first, second, unit))
        elif second.by_descriptor and first.kind == STORE:
            reader, writer = self.names.unit(second.unit), self.names.unit(first.unit)
            self.findings.append(
                f"{reader} reads {self.memory.describe(unit)} through a descriptor, but {writer} "
                "wrote it in this launch with a store"
            )

    def check_counters(self) -> None:
        """Where atomics work, a plain load or store is ordered against each of them."""
        history: dict[int, list[Event]] = {}
        for event, units in self._with_units():
            for unit in units[self.is_counter[units]].tolist():
                self._check_counter(history.setdefault(unit, []), event, unit)

    def _check_counter(self, before: list[Event], event: Event, unit: int) -> None:
        for earlier in before:
            if (earlier.kind, event.kind) not in ((ATOMIC, ATOMIC), (LOAD, LOAD)):
                self._check_pair(earlier, event, unit)
        before.append(event)

    def explain(self, first: Event, second: Event, unit: int) -> str:
        """Say what is not ordered, and what the later one waited for."""
        verbs = {LOAD: "reads", STORE: "writes", ATOMIC: "changes"}
        text = (
            f"{self.names.unit(second.unit)} {verbs[second.kind]} {self.memory.describe(unit)}, "
            f"which {self.names.unit(first.unit)} {verbs[first.kind]}: "
        )
        partial = [
            f"{self.names.counter(wait.address)}, {wait.awaited} of {wait.total}"
            for wait in self.order.waits[second.worker]
            if not wait.is_guarantee
        ]
        waits = f" (waits for a part: {', '.join(partial)})" if partial else ""
        return text + self.order.why_unordered(first, second) + waits
