"""Python's view of a launch's task list: the same order, as tasks with waits and signals."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from megakernel.plan.buffers import Sizes
from megakernel.plan.order import plain
from megakernel.plan.protocol import KINDS
from megakernel.plan.spec import KernelSpec


@dataclass(frozen=True)
class Task:
    """One entry of the list; what ``tile`` and ``block`` count is in protocol.KINDS."""

    kind: int
    tile: int
    block: int = 0


@dataclass(frozen=True)
class Schedule:
    """The task list of one launch.

    Attributes:
        spec: shapes and tiles.
        num_tokens: T, at least 1.
        num_tiles: row tiles, those of the shared expert among them.
        counted: whether the row tables have so many, not only room for them.
    """

    spec: KernelSpec
    num_tokens: int
    num_tiles: int
    counted: bool = True

    @cached_property
    def size(self) -> Sizes:
        """The integers that the order depends on."""
        return plain.sizes_of(self.num_tokens, self.num_tiles, 0, 0, self.counted, self.spec)

    @property
    def token_tiles(self) -> int:
        """Route tasks, and scatter tasks."""
        return self.size.token_tiles

    @property
    def combine_tiles(self) -> int:
        """Combine tasks per column group."""
        return self.size.combine_tiles

    @property
    def shared_tiles(self) -> int:
        """Row tiles of the shared expert: the first ones."""
        return self.size.shared_tiles

    @property
    def num_tasks(self) -> int:
        """Length of the list."""
        return plain.count_tasks(self.size, self.spec)

    @property
    def first_table_task(self) -> int:
        """First id that needs row tables made by the launch; past the list if it makes none."""
        if not self.spec.makes_rows:
            return self.num_tasks
        return plain.first_table_task(self.size, self.spec)

    @property
    def num_counters(self) -> int:
        """Counters the launch uses."""
        return plain.count_counters(self.size, self.spec)

    def task(self, task_id: int) -> Task:
        """Decode a task id exactly as the kernel does."""
        return Task(*plain.task_of(task_id, self.size, self.spec))

    def tasks(self) -> Iterator[Task]:
        """Yield the whole list in order."""
        return map(self.task, range(self.num_tasks))

    def waits(self, task_id: int) -> list[tuple[int, int]]:
        """Return the (counter, least value) pairs that are reached before a task runs."""
        asked = []
        if task_id >= self.first_table_task:
            asked.append(plain.table_wait_of(self.size, self.spec))
        task = self.task(task_id)
        for number in range(self.spec.num_waits):
            place = (task.kind, task.tile, task.block)
            asked.append(plain.wait_of(number, *place, self.size, self.spec))
        return [(counter, least) for counter, least in asked if least > 0]

    def signal(self, task: Task) -> int | None:
        """Return the first of :meth:`signals`, the only one of a forward list."""
        return next(iter(self.signals(task)), None)

    def signals(self, task: Task) -> list[int]:
        """Return the counters that a finished task adds one to."""
        numbers = range(self.spec.num_signals)
        place = task.kind, task.tile, task.block
        counters = [plain.signal_of(number, *place, self.spec) for number in numbers]
        return [counter for counter in counters if counter >= 0]

    def describe_task(self, task_id: int) -> str:
        """Name a task for an error message."""
        task = self.task(task_id)
        name, place = KINDS[task.kind]
        return f"task {task_id} ({name}, {place.format(tile=task.tile, block=task.block)})"

    def describe_counter(self, counter: int) -> str:
        """Name a counter for an error message."""
        spec = self.spec
        if counter >= spec.first_tile_counter:
            tile, kind = divmod(counter - spec.first_tile_counter, spec.counters_per_tile)
            return f"counter {counter} ({('FFN1', 'dH')[kind]} of row tile {tile})"
        if spec.is_backward and counter >= spec.DH_DONE:
            name = ("dH tasks", "dX tasks", "dS tasks")[counter - spec.DH_DONE]
            return f"counter {counter} ({name})"
        if counter >= spec.FIRST_COLUMN_GROUP:
            group = counter - spec.FIRST_COLUMN_GROUP
            return f"counter {counter} (FFN2 of column group {group})"
        names = ("claims", "exits", "route tasks", "prefix tasks", "scatter tasks")
        return f"counter {counter} ({names[counter]})"


def bound_tiles(num_assignments: int, num_slots: int, block_rows: int) -> int:
    """Return the most row tiles any routing can need.

    A slot with n rows takes 1 + (n - 1) // block_rows tiles, so the sum is largest when as many
    slots as possible hold a row.
    """
    used = min(num_slots, num_assignments)
    return used + (num_assignments - used) // block_rows


def count_row_tiles(spec: KernelSpec, num_tokens: int, routed_tiles: int | None) -> int:
    """Return the row tiles of a launch, those of the shared expert among them.

    Args:
        spec: shapes and tiles.
        num_tokens: T.
        routed_tiles: those that a replay's rows fill; None for the most there can be.
    """
    if routed_tiles is None:
        routed_tiles = bound_tiles(num_tokens * spec.top_k, spec.num_slots, spec.block_rows)
    return routed_tiles + spec.num_slices * -(-num_tokens // spec.block_rows)
