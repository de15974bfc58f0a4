"""The launch in plain PyTorch: claims, waits, runs and signals as the kernel does, and checks.

Every list and every dialect of the layer, forward and backward, runs here, task by task, with the
arithmetic of the modules named ``machine_*``. What the kernel leaves in each buffer can so be
compared with what the same task list means.
"""

from collections import Counter
from collections.abc import Callable
from itertools import count
from random import Random
from typing import Any

import torch

from megakernel.plan import (
    machine_backward,
    machine_ffn,
    machine_gradients,
    machine_routing,
    machine_weighing,
)
from megakernel.plan.buffers import Buffers
from megakernel.plan.machine_memory import Memory
from megakernel.plan.order import plain
from megakernel.plan.protocol import Protocol
from megakernel.plan.schedule import Schedule
from megakernel.plan.spec import KernelSpec

TASKS: dict[int, Callable[[Memory, int, int], None]] = {
    Protocol.ROUTE: machine_routing.route,
    Protocol.PREFIX: machine_routing.prefix,
    Protocol.SCATTER: machine_routing.scatter,
    Protocol.SHARED_FFN1: machine_ffn.shared_ffn1,
    Protocol.FFN1: machine_ffn.ffn1,
    Protocol.SHARED_FFN2: machine_ffn.shared_ffn2,
    Protocol.FFN2: machine_ffn.ffn2,
    Protocol.COMBINE: machine_ffn.combine,
    Protocol.SHARED_DH: machine_backward.shared_dh,
    Protocol.DH: machine_backward.dh,
    Protocol.SHARED_DX: machine_backward.shared_dx,
    Protocol.DX: machine_backward.dx,
    Protocol.DS: machine_weighing.ds,
    Protocol.DX_SUM: machine_backward.dx_sum,
    Protocol.DROUTER: machine_weighing.drouter,
    Protocol.DGATE_UP: machine_gradients.dgate_up,
    Protocol.DDOWN: machine_gradients.ddown,
    Protocol.SHARED_DGATE_UP: machine_gradients.shared_dgate_up,
    Protocol.SHARED_DDOWN: machine_gradients.shared_ddown,
    Protocol.DBIAS: machine_gradients.dbias,
    Protocol.DTOKEN_GATE: machine_weighing.dtoken_gate,
}


class Machine:
    """One launch: memory, counters and a task list.

    Attributes:
        spec: shapes and tiles.
        schedule: the list as it is known at the start; where the launch makes its rows, with the
            most row tiles that there can be.
        tables_from: first id that needs row tables which the launch makes.
        table_wait: (counter, least value) that says they are there.
        values: of the router, which the list does not depend on.
        memory: every buffer.
        signals: value of each counter.
        awaited: of each counter that a task has waited for, the value it waited for.
        came_before: for each counter, bit n says that task n precedes its signals or gave one.
        finished: ids of the tasks that ran, in the order in which they did.
        made: the list with the row tiles that the launch made, once a worker knows them.
        asked: waits of each task that has been looked at.
    """

    def __init__(
        self,
        arguments: Buffers,
        spec: KernelSpec,
        num_tokens: int,
        num_tiles: int,
        capacity: int = 0,
        seed: int = 0,
        wide: torch.dtype = torch.float64,
        exact: bool = False,
        is_added: bool = False,
    ) -> None:
        """Fill every buffer that the launch writes with what no task may leave behind.

        Args:
            arguments: a call's tensors; the given outputs only say dtype and shape.
            spec: shapes and tiles.
            num_tokens: T.
            num_tiles: row tiles as the kernel is told them, those of the shared expert among them.
            capacity, seed: of the router, 0 where it has none.
            wide: dtype of all arithmetic.
            exact: whether what is written keeps it too, whatever dtype the launch would round to.
            is_added: whether a backward adds gradients of expert weights to what is there.
        """
        self.spec = spec
        counted = not spec.makes_rows
        self.schedule = Schedule(spec, num_tokens, num_tiles, counted)
        self.tables_from = self.schedule.first_table_task
        self.table_wait = plain.table_wait_of(self.schedule.size, spec)
        self.values: dict[str, Any] = {"capacity": capacity, "seed": seed}
        size = self.schedule.size._replace(**self.values)
        self.memory = Memory(arguments, self.schedule, size, wide, exact, is_added)
        self.signals: Counter[int] = Counter()
        self.awaited: dict[int, int] = {}
        self.came_before: Counter[int] = Counter()
        self.finished: list[int] = []
        self.made: Schedule | None = None
        self.asked: dict[int, list[tuple[int, int]]] = {}

    def run(self, num_workers: int = 1, random: Random | None = None) -> Buffers:
        """Run the whole list and return every buffer.

        Args:
            num_workers: each holds one claimed task.
            random: whose turn it is among the workers that can go on; None for the first of them.

        Raises:
            RuntimeError: if no worker can go on, if a counter gets another number of signals than
                was waited for, or if a task reads what it may not: see Memory.
        """
        claims = count()
        held = [next(claims) for _ in range(num_workers)]
        while held:
            turns = random.sample(range(len(held)), len(held)) if random else range(len(held))
            worker = next((turn for turn in turns if self.is_ready(held[turn])), None)
            if worker is None:
                raise RuntimeError("; ".join(map(self.describe_wait, held)))
            if self.step(held[worker]):
                held[worker] = next(claims)
            else:
                del held[worker]
        for counter, least in self.awaited.items():
            self._check_signals(counter, least)
        return self.memory.buffers()

    def known_list(self, task_id: int) -> Schedule | None:
        """Return the list as a worker knows it that holds a task, None while it must wait for it.

        From the first task that needs the row tables on, a launch that makes them knows how many
        row tiles they have.
        """
        if task_id < self.tables_from or not self.spec.makes_rows:
            return self.schedule
        counter, least = self.table_wait
        if self.signals[counter] < least:
            return None
        if self.made is None:
            self.memory.begin(task_id, self.came_before[counter])
            num_tiles = int(self.memory.read("scratch.num_tiles_1"))
            self.made = Schedule(self.spec, self.schedule.num_tokens, num_tiles)
        return self.made

    def waits(self, task_id: int, known: Schedule) -> list[tuple[int, int]]:
        """Return the waits of a task in the list as its worker knows it; none past the end."""
        if task_id not in self.asked:
            inside = task_id < known.num_tasks
            self.asked[task_id] = known.waits(task_id) if inside else []
        return self.asked[task_id]

    def is_ready(self, task_id: int) -> bool:
        """Whether all counters that a task waits for have come far enough."""
        known = self.known_list(task_id)
        if known is None:
            return False
        return all(self.signals[at] >= least for at, least in self.waits(task_id, known))

    def step(self, task_id: int) -> bool:
        """Run a task that is ready; return whether it is in the list."""
        known = self.known_list(task_id)
        assert known is not None
        if task_id >= known.num_tasks:
            return False
        seen = 0
        for counter, least in self.waits(task_id, known):
            self._check_signals(counter, least)
            self.awaited[counter] = least
            seen |= self.came_before[counter]
        task = known.task(task_id)
        self.memory.size = known.size._replace(**self.values)
        self.memory.begin(task_id, seen)
        TASKS[task.kind](self.memory, task.tile, task.block)
        self.finished.append(task_id)
        for signalled in known.signals(task):
            self.signals[signalled] += 1
            self.came_before[signalled] |= seen | 1 << task_id
        return True

    def _check_signals(self, counter: int, least: int) -> None:
        if self.signals[counter] != least:
            raise RuntimeError(
                f"{self.schedule.describe_counter(counter)} was awaited up to {least} and has got "
                f"{self.signals[counter]} signals"
            )

    def describe_wait(self, task_id: int) -> str:
        """Say what a task that is not ready waits for."""
        known = self.known_list(task_id)
        if known is None:
            return f"task {task_id} waits for the row tables"
        asked = [
            f"{known.describe_counter(counter)} to reach {least}, which is {self.signals[counter]}"
            for counter, least in self.waits(task_id, known)
        ]
        return f"{known.describe_task(task_id)} waits for {', '.join(asked)}"
