"""The discrete-event part of the simulator: workers claim ids, wait, and share the memory.

A task that is ready takes its fixed time, then computes for its steps while its bytes come, and is
done with both. Tasks whose bytes are on the way share the memory's bandwidth equally, none faster
than one multiprocessor can read.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import count

import numpy as np

from megakernel.plan.schedule import Schedule, Task
from megakernel.tools.timeline import Timeline
from perf.simulator.costs import Demand, Machine


class Play:
    """One launch while it is played; all times in microseconds.

    Equal sharing is played in bytes instead of time: every task on the way receives the same, so
    each is done when what one has received since the start passes a figure known when it begins.
    """

    def __init__(
        self,
        schedule: Schedule,
        tasks: Sequence[Task],
        demands: Sequence[Demand],
        num_workers: int,
        machine: Machine,
    ) -> None:
        self.schedule, self.tasks, self.demands, self.machine = schedule, tasks, demands, machine
        self.now = 0.0
        self.next_task = 0
        self.signals = [0] * schedule.num_counters
        self.blocked: dict[int, list[tuple[int, Callable[[], None]]]] = defaultdict(list)
        self.has_tables: set[int] = set()  # workers that need not ask for the row tables again
        self.order = count()  # events at one time happen in the order they were planned
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.received = 0.0  # bytes each task on the way has received since the start
        self.on_the_way: list[tuple[float, int]] = []  # (received when complete, task)
        self.parts_left = [0] * len(tasks)
        self.worker_N = np.zeros(len(tasks), np.int64)
        self.ask_N, self.claim_N, self.start_N, self.end_N = np.zeros((4, len(tasks)))
        for worker in range(num_workers):
            self.plan(machine.launch_us / 2, lambda worker=worker: self.claim(worker))  # type: ignore[misc]

    def run(self) -> Timeline:
        """Play until the last task is done."""
        while self.events or self.on_the_way:
            bytes_per_us = self.bytes_per_us
            memory_at = np.inf
            if self.on_the_way:
                memory_at = self.now + (self.on_the_way[0][0] - self.received) / bytes_per_us
            next_at = min(memory_at, self.events[0][0] if self.events else np.inf)
            self.received += (next_at - self.now) * bytes_per_us
            self.now = next_at
            if next_at == memory_at:
                self.finish_part(heapq.heappop(self.on_the_way)[1])
            else:
                heapq.heappop(self.events)[2]()
        if any(self.blocked.values()) or self.next_task < len(self.tasks):
            raise RuntimeError("a task waits for signals that never come")
        kind_N = np.array([task.kind for task in self.tasks])
        last = float(self.end_N.max()) + self.machine.claim_us + self.machine.launch_us / 2
        times_N = self.ask_N, self.claim_N, self.start_N, self.end_N
        return Timeline(last, kind_N, self.worker_N, *times_N)

    @property
    def bytes_per_us(self) -> float:
        """What each task on the way receives."""
        shared = self.machine.roofs.copy_bytes_per_s / max(len(self.on_the_way), 1)
        return 1e-6 * min(shared, self.machine.sm_bytes_per_s)

    def plan(self, time: float, event: Callable[[], None]) -> None:
        """Let an event happen at a time, after those already planned for it."""
        heapq.heappush(self.events, (time, next(self.order), event))

    def claim(self, worker: int, sent_us: float = 0.0) -> None:
        """Take the next id, if there is one, and ask for what it waits for.

        Args:
            worker: who claims.
            sent_us: how long ago it sent the claim off.
        """
        if self.next_task == len(self.tasks):
            return
        n = self.next_task
        self.next_task += 1
        self.worker_N[n], self.ask_N[n] = worker, self.now
        self.claim_N[n] = self.now + max(self.machine.claim_us - sent_us, 0.0)
        self.plan(self.claim_N[n], lambda: self.ask(n, self.waits_of(n, worker)))

    def waits_of(self, n: int, worker: int) -> list[tuple[int, int]]:
        """Return what a worker polls for a task: for the row tables once, with its first need."""
        waits = self.schedule.waits(n)
        if n >= self.schedule.first_table_task:
            if worker in self.has_tables:
                return waits[1:]
            self.has_tables.add(worker)
        return waits

    def ask(self, n: int, waits: Sequence[tuple[int, int]]) -> None:
        """Wait for the first counter of a list, poll it, and go on with the rest."""
        if not waits:
            self.begin(n)
            return
        (counter, least), rest = waits[0], waits[1:]

        def poll() -> None:
            self.plan(self.now + self.machine.poll_us, lambda: self.ask(n, rest))

        if self.signals[counter] >= least:
            poll()
        else:
            self.blocked[counter].append((least, poll))

    def begin(self, n: int) -> None:
        """Start a task: its fixed time, then its steps and its bytes side by side."""
        self.start_N[n] = self.now
        self.plan(self.now + self.demands[n].fixed_us, lambda: self.work(n))

    def work(self, n: int) -> None:
        """Let a task's steps and its bytes begin."""
        demand = self.demands[n]
        self.parts_left[n] = 1
        if demand.moved_bytes > 0:
            self.parts_left[n] = 2
            heapq.heappush(self.on_the_way, (self.received + demand.moved_bytes, n))
        self.plan(self.now + demand.steps_us, lambda: self.finish_part(n))

    def finish_part(self, n: int) -> None:
        """Note that steps or bytes are done; the last of them lets the task signal."""
        self.parts_left[n] -= 1
        if self.parts_left[n]:
            return
        counters = self.schedule.signals(self.tasks[n])
        # A second signal follows the first at once: the stores have drained, nobody waits for it.
        signal_us = self.machine.signal_us if counters else 0.0
        self.plan(self.now + signal_us, lambda: self.end(n, counters))

    def end(self, n: int, counters: Sequence[int]) -> None:
        """Finish a task: wake those whose wait its signals end, claim the next."""
        self.end_N[n] = self.now
        for counter in counters:
            self.count(counter)
        ahead = bool(counters) and self.schedule.spec.look_ahead
        self.claim(int(self.worker_N[n]), self.machine.signal_us if ahead else 0.0)

    def count(self, counter: int) -> None:
        """Add one to a counter, and wake those who waited for no more than it has now."""
        self.signals[counter] += 1
        waiting, self.blocked[counter] = self.blocked[counter], []
        for least, poll in waiting:
            if self.signals[counter] >= least:
                poll()
            else:
                self.blocked[counter].append((least, poll))
