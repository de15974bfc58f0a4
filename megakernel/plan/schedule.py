"""What the launch does and in which order: one list of tasks, as arithmetic.

Every task waits only for tasks with lower ids, and workers claim ids in order. So the lowest
unfinished claimed task never waits for an unclaimed one, and the launch finishes for any number
of workers, resident or not.

The functions marked ``@triton.jit`` are the only home of the order: the kernel calls them
on the device, :class:`Schedule` calls the same source as plain Python.

Live order:   gate* · prefix* · scatter* · shared FFN1* · FFN1* · tail
Replay order: shared FFN1* · FFN1* · gate* · tail
Tail:         the FFN2 tasks of column group 0, then for each next group its FFN2 tasks, with the
              combine tasks of the group before spread over their second half, then the last
              group's combine tasks.

How many row tiles there are is known ahead in a replay. A live launch knows it when its row tables
are there, and everything before ``first_table_task`` has its place without that number.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import triton
import triton.language as tl

from megakernel.plan.spec import KernelSpec


@triton.jit
def count_shared_tiles(num_tokens, C: tl.constexpr):
    """Return the row tiles of the shared expert, which come before all others."""
    return C.num_slices * ((num_tokens + C.block_rows - 1) // C.block_rows)


@triton.jit
def count_tasks(num_tokens, num_tiles, C: tl.constexpr):
    """Return the length of the list."""
    token_tiles = (num_tokens + C.block_tokens - 1) // C.block_tokens
    num_combine = (num_tokens + C.combine_tokens - 1) // C.combine_tokens
    num_tasks = token_tiles + C.num_groups * num_combine
    num_tasks += num_tiles * (C.i_blocks + C.num_groups * C.group_blocks)
    if not C.replay:
        num_tasks += C.prefix_blocks + token_tiles
    return num_tasks


@triton.jit
def phase_of(task, num_tokens, num_tiles, C: tl.constexpr):
    """Return (kind, index within the kind) of a task id; FFN2 and combine share the kind TAIL."""
    token_tiles = (num_tokens + C.block_tokens - 1) // C.block_tokens
    num_ffn1 = num_tiles * C.i_blocks
    if C.replay:
        gate_start = num_ffn1
        ffn1_start = 0
        scatter_start = num_ffn1 + token_tiles
        tail_start = scatter_start
    else:
        gate_start = 0
        scatter_start = token_tiles + C.prefix_blocks
        ffn1_start = scatter_start + token_tiles
        tail_start = ffn1_start + num_ffn1
    kind = C.TAIL
    index = task - tail_start
    if task < tail_start:
        if (task >= gate_start) & (task < gate_start + token_tiles):
            kind = C.GATE
            index = task - gate_start
        elif task >= ffn1_start:
            kind = C.FFN1
            index = task - ffn1_start
        elif task >= scatter_start:
            kind = C.SCATTER
            index = task - scatter_start
        else:
            kind = C.PREFIX
            index = task - token_tiles
    return kind, index


@triton.jit
def first_table_task(num_tokens, shared_tiles, C: tl.constexpr):
    """Return the first id of a live launch that needs the row tables."""
    token_tiles = (num_tokens + C.block_tokens - 1) // C.block_tokens
    return 2 * token_tiles + C.prefix_blocks + shared_tiles * C.i_blocks


@triton.jit
def segment_of(index, num_tiles, shared_tiles, C: tl.constexpr):
    """Return (first tile, tiles, index within them) of an FFN1 index: shared tiles lie apart."""
    first_tile = 0
    if C.num_slices > 0:
        num_shared = shared_tiles * C.i_blocks
        if index < num_shared:
            num_tiles = shared_tiles
        else:
            first_tile = shared_tiles
            num_tiles = num_tiles - shared_tiles
            index = index - num_shared
    return first_tile, num_tiles, index


@triton.jit
def tile_of(index, num_tiles, num_blocks, tile_group):
    """Return (row tile, column block): ``tile_group`` tiles pass before the next weight block."""
    group_size = tile_group * num_blocks
    first_tile = index // group_size * tile_group
    height = min(num_tiles - first_tile, tile_group)
    within = index % group_size
    return first_tile + within % height, within // height


@triton.jit
def tail_of(index, num_tokens, num_tiles, C: tl.constexpr):
    """Return (is_combine, column group, index within that group's FFN2 or combine tasks)."""
    num_ffn2 = num_tiles * C.group_blocks
    num_combine = (num_tokens + C.combine_tokens - 1) // C.combine_tokens
    segment = num_ffn2 + num_combine
    group = (index + num_combine) // segment
    within = index - max(group * segment - num_combine, 0)
    lead = num_ffn2 // 2
    spacing = (segment - lead) // num_combine
    combines_before = min(max(within - lead, 0) // spacing, num_combine)
    is_mixed = (group > 0) & (group < C.num_groups)
    is_turn = (within >= lead) & ((within - lead) % spacing == spacing - 1)
    is_combine = (group == C.num_groups) | (is_mixed & is_turn & (combines_before < num_combine))
    if is_combine:
        if is_mixed:
            within = combines_before
        group = group - 1
    elif is_mixed:
        within = within - combines_before
    return is_combine, group, within


@dataclass(frozen=True)
class Task:
    """One entry of the list.

    ``tile`` is a token tile (gate, scatter, combine), a block of bins (prefix) or a row tile
    (FFN1, FFN2). ``block`` is a block of I (FFN1) or of H (FFN2), or a column group (combine).
    """

    kind: int
    tile: int
    block: int = 0


NAMES = ("gate", "prefix", "scatter", "FFN1", "FFN2", "combine")


@dataclass(frozen=True)
class Schedule:
    """The task list of one launch.

    Attributes:
        spec: shapes and tiles.
        num_tokens: T, at least 1.
        num_tiles: row tiles, those of the shared expert among them.
    """

    spec: KernelSpec
    num_tokens: int
    num_tiles: int

    @property
    def token_tiles(self) -> int:
        """Gate tasks, and scatter tasks of a live launch."""
        return -(-self.num_tokens // self.spec.block_tokens)

    @property
    def combine_tiles(self) -> int:
        """Combine tasks per column group."""
        return -(-self.num_tokens // self.spec.combine_tokens)

    @property
    def shared_tiles(self) -> int:
        """Row tiles of the shared expert: the first ones."""
        return count_shared_tiles.fn(self.num_tokens, self.spec)

    @property
    def num_tasks(self) -> int:
        """Length of the list."""
        return count_tasks.fn(self.num_tokens, self.num_tiles, self.spec)

    @property
    def first_table_task(self) -> int:
        """First id of a live launch that needs the row tables."""
        return first_table_task.fn(self.num_tokens, self.shared_tiles, self.spec)

    @property
    def num_counters(self) -> int:
        """Counters the launch uses."""
        return self.spec.first_tile_counter + self.num_tiles

    def task(self, task_id: int) -> Task:
        """Decode a task id exactly as the kernel does."""
        spec = self.spec
        kind, index = phase_of.fn(task_id, self.num_tokens, self.num_tiles, spec)
        if kind == spec.FFN1:
            first, tiles, index = segment_of.fn(index, self.num_tiles, self.shared_tiles, spec)
            tile, block = tile_of.fn(index, tiles, spec.i_blocks, spec.tile_group)
            return Task(kind, first + tile, block)
        if kind != spec.TAIL:
            return Task(kind, index)
        is_combine, group, index = tail_of.fn(index, self.num_tokens, self.num_tiles, spec)
        if is_combine:
            return Task(spec.COMBINE, index, group)
        tile, block = tile_of.fn(index, self.num_tiles, spec.group_blocks, spec.tile_group)
        return Task(spec.FFN2, tile, group * spec.group_blocks + block)

    def tasks(self) -> Iterator[Task]:
        """Yield the whole list in order."""
        return map(self.task, range(self.num_tasks))

    def waits(self, task: Task) -> list[tuple[int, int]]:
        """Return the (counter, least value) pairs a task needs before it runs."""
        spec = self.spec
        if task.kind == spec.PREFIX:
            return [(spec.GATE_DONE, self.token_tiles)]
        if task.kind == spec.SCATTER:
            return [(spec.PREFIX_DONE, spec.prefix_blocks)]
        if task.kind == spec.FFN1:
            has_tables = spec.replay or task.tile < self.shared_tiles
            return [] if has_tables else [(spec.SCATTER_DONE, self.token_tiles)]
        if task.kind == spec.FFN2:
            return [(spec.first_tile_counter + task.tile, spec.i_blocks)]
        if task.kind == spec.COMBINE:
            group = (spec.FIRST_GROUP + task.block, self.num_tiles * spec.group_blocks)
            return [group, (spec.GATE_DONE, self.token_tiles)] if spec.replay else [group]
        return []

    def signal(self, task: Task) -> int | None:
        """Return the counter a finished task adds one to."""
        spec = self.spec
        if task.kind == spec.FFN1:
            return spec.first_tile_counter + task.tile
        if task.kind == spec.FFN2:
            return spec.FIRST_GROUP + task.block // spec.group_blocks
        return (spec.GATE_DONE, spec.PREFIX_DONE, spec.SCATTER_DONE, None, None, None)[task.kind]

    def describe_task(self, task_id: int) -> str:
        """Name a task for an error message."""
        task = self.task(task_id)
        place = {
            self.spec.FFN1: f"row tile {task.tile}, I block {task.block}",
            self.spec.FFN2: f"row tile {task.tile}, H block {task.block}",
            self.spec.COMBINE: f"token tile {task.tile}, column group {task.block}",
            self.spec.PREFIX: f"block of bins {task.tile}",
        }.get(task.kind, f"token tile {task.tile}")
        return f"task {task_id} ({NAMES[task.kind]}, {place})"

    def describe_counter(self, counter: int) -> str:
        """Name a counter for an error message."""
        spec = self.spec
        if counter >= spec.first_tile_counter:
            return f"counter {counter} (FFN1 of row tile {counter - spec.first_tile_counter})"
        if counter >= spec.FIRST_GROUP:
            return f"counter {counter} (FFN2 of column group {counter - spec.FIRST_GROUP})"
        names = ("claims", "exits", "gate tasks", "prefix tasks", "scatter tasks")
        return f"counter {counter} ({names[counter]})"


def bound_tiles(num_assignments: int, num_slots: int, block_rows: int) -> int:
    """Return the most row tiles any routing can need.

    A slot with n rows takes 1 + (n - 1) // block_rows tiles, so the sum is largest when as many
    slots as possible hold a row.
    """
    used = min(num_slots, num_assignments)
    return used + (num_assignments - used) // block_rows
