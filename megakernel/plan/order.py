"""The order of a launch: which task an id is, what it waits for, what it signals.

Every task waits only for tasks with lower ids, and workers claim ids in order. So the lowest
unfinished claimed task never waits for an unclaimed one, and the launch finishes for any number of
workers, resident or not.

These functions are the only home of the order. The kernel calls them on the device, and
:data:`plain` holds the same source as Python functions, for ``schedule.py``.

Tail: the FFN2 tasks of column group 0, then for each next group its FFN2 tasks, with the combine
tasks of the group before spread over their second half, then the last group's combine tasks.

How many row tiles there are is known ahead in a replay. A launch that makes its rows knows it when
its row tables are there, and everything before ``first_table_task`` has its place without it.
"""

import inspect
from types import FunctionType, SimpleNamespace

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from megakernel.plan import backward_order
from megakernel.plan.backward_order import (
    backward_signal_of,
    backward_task_of,
    backward_wait_of,
    count_backward,
    tile_of,
)
from megakernel.plan.buffers import Sizes


@triton.jit
def sizes_of(num_tokens, num_tiles, capacity, seed, COUNTED: tl.constexpr, C: tl.constexpr):
    """Return the integers of a launch, with those that tasks would work out again and again.

    FFN1 and FFN2 take several column blocks per task where that leaves enough tasks for all
    workers. Unless the row tiles are counted, one: then the list is the longest there can be.
    """
    token_tiles = tl.cdiv(num_tokens, C.block_tokens)
    combine_tiles = tl.cdiv(num_tokens, C.combine_tokens)
    shared_tiles = C.num_slices * tl.cdiv(num_tokens, C.block_rows)
    wide_ffn1 = ((num_tiles - shared_tiles) * C.i_tasks >= C.least_tasks) & COUNTED
    wide_ffn2 = (num_tiles * C.h_tasks >= C.least_tasks) & COUNTED
    return Sizes(
        num_tokens, num_tiles, capacity, seed, token_tiles, combine_tiles, shared_tiles,
        wide_ffn1, wide_ffn2,
    )  # fmt: skip


@triton.jit
def ffn1_tasks_of(size, C: tl.constexpr):
    """Return the FFN1 tasks of a routed row tile."""
    return tl.where(size.wide_ffn1, C.i_tasks, C.i_blocks)


@triton.jit
def ffn2_tasks_of(group, size, C: tl.constexpr):
    """Return the FFN2 tasks of a row tile in a column group; the last group ends evenly."""
    return tl.where(is_wide(group, size, C), C.h_tasks, C.group_blocks)


@triton.jit
def is_wide(group, size, C: tl.constexpr):
    """Whether FFN2 tasks of a column group take several blocks: never in the last one."""
    return size.wide_ffn2 & (group < C.num_column_groups - 1)


@triton.jit
def ffn1_blocks_of(size, C: tl.constexpr):
    """Return how many blocks of I an FFN1 task takes, the last of a row tile maybe fewer."""
    return tl.where(size.wide_ffn1, C.i_per_task, 1)


@triton.jit
def ffn2_blocks_of(group, size, C: tl.constexpr):
    """Return how many blocks of H an FFN2 task takes, the last of a row tile maybe fewer."""
    return tl.where(is_wide(group, size, C), C.h_per_task, 1)


@triton.jit
def ffn1_end_of(block, size, C: tl.constexpr):
    """Return the block of I past those of an FFN1 task."""
    return min(block + ffn1_blocks_of(size, C), C.i_blocks)


@triton.jit
def ffn2_end_of(block, size, C: tl.constexpr):
    """Return the block of H past those of an FFN2 task: at most ``block``, if all lie past H."""
    group = block // C.group_blocks
    end = min(block + ffn2_blocks_of(group, size, C), (group + 1) * C.group_blocks)
    return min(end, C.h_blocks)


@triton.jit
def count_counters(size, C: tl.constexpr):
    """Return how many counters the launch uses."""
    return C.first_tile_counter + C.counters_per_tile * size.num_tiles


@triton.jit
def count_of(SEGMENT: tl.constexpr, size, C: tl.constexpr):
    """Return how many tasks a segment has."""
    if C.is_backward:
        num_tasks = count_backward(SEGMENT, size, C)
    elif SEGMENT == C.PREFIX:
        num_tasks = C.prefix_blocks
    elif (SEGMENT == C.ROUTE) | (SEGMENT == C.SCATTER):
        num_tasks = size.token_tiles
    elif SEGMENT == C.SHARED_FFN1:
        num_tasks = size.shared_tiles * C.i_blocks
    elif SEGMENT == C.FFN1:
        num_tasks = (size.num_tiles - size.shared_tiles) * ffn1_tasks_of(size, C)
    elif SEGMENT == C.FFN2:
        num_tasks = size.num_tiles * all_ffn2_tasks(size, C)
    elif SEGMENT == C.COMBINE:
        num_tasks = size.combine_tiles * C.num_column_groups
    else:  # TAIL
        num_tasks = size.combine_tiles * C.num_column_groups
        num_tasks += size.num_tiles * all_ffn2_tasks(size, C)
    return num_tasks


@triton.jit
def all_ffn2_tasks(size, C: tl.constexpr):
    """Return the FFN2 tasks of a row tile in all column groups."""
    last = C.num_column_groups - 1
    return last * ffn2_tasks_of(0, size, C) + ffn2_tasks_of(last, size, C)


@triton.jit
def start_of(PLACE: tl.constexpr, size, C: tl.constexpr):
    """Return the first id of the segment in this place of the list, or its length."""
    start = 0
    for place in tl.static_range(PLACE):
        start += count_of(C.segments[place], size, C)
    return start


@triton.jit
def count_tasks(size, C: tl.constexpr):
    """Return the length of the list."""
    PLACES: tl.constexpr = C.num_segments
    return start_of(PLACES, size, C)


@triton.jit
def first_table_task(size, C: tl.constexpr):
    """Return the first id that needs row tables which the launch makes."""
    PLACE: tl.constexpr = C.table_segment
    return start_of(PLACE, size, C)


@triton.jit
def phase_of(task, size, C: tl.constexpr):
    """Return (segment, index within it) of a task id."""
    segment = C.segments[0]
    index = task
    start = 0
    PLACES: tl.constexpr = C.num_segments
    for place in tl.static_range(1, PLACES):
        start += count_of(C.segments[place - 1], size, C)
        segment = tl.where(task >= start, C.segments[place], segment)
        index = tl.where(task >= start, task - start, index)
    return segment, index


@triton.jit
def tail_of(index, size, C: tl.constexpr):
    """Return (is_combine, column group, index within that group's FFN2 or combine tasks)."""
    last = C.num_column_groups - 1
    num_combine = size.combine_tiles
    before_last = size.num_tiles * ffn2_tasks_of(0, size, C) + num_combine
    group = min((index + num_combine) // before_last, last)
    within = index - max(group * before_last - num_combine, 0)
    num_ffn2 = size.num_tiles * ffn2_tasks_of(group, size, C)
    length = num_ffn2 + tl.where(group > 0, num_combine, 0)
    if within >= length:  # the combine of the last group
        group += 1
        within -= length
    lead = num_ffn2 // 2
    spacing = (num_ffn2 + num_combine - lead) // num_combine
    combines_before = min(max(within - lead, 0) // spacing, num_combine)
    is_mixed = (group > 0) & (group < C.num_column_groups)
    is_turn = (within >= lead) & ((within - lead) % spacing == spacing - 1)
    is_combine = (group == C.num_column_groups) | (
        is_mixed & is_turn & (combines_before < num_combine)
    )
    if is_combine:
        if is_mixed:
            within = combines_before
        group = group - 1
    elif is_mixed:
        within = within - combines_before
    return is_combine, group, within


@triton.jit
def ffn2_of(group, index, size, C: tl.constexpr):
    """Return (kind, row tile, first H block) of a column group's FFN2 task."""
    kind = C.FFN2
    tile, part = tile_of(index, size.num_tiles, ffn2_tasks_of(group, size, C), C.tile_group)
    block = part * ffn2_blocks_of(group, size, C)
    if C.num_slices > 0:  # noqa: SIM102  (known when compiling; the next is not)
        if tile < size.shared_tiles:
            kind = C.SHARED_FFN2
    return kind, tile, group * C.group_blocks + block


@triton.jit
def task_of(task, size, C: tl.constexpr):
    """Return (kind, tile, block) of a task id; what tile and block count is in protocol.KINDS."""
    kind, tile = phase_of(task, size, C)
    block = 0
    if C.is_backward:
        kind, tile, block = backward_task_of(kind, tile, size, C)
    elif C.has_tail and kind >= C.TAIL:
        is_combine, group, index = tail_of(tile, size, C)
        if is_combine:
            kind, tile, block = C.COMBINE, index, group
        else:
            kind, tile, block = ffn2_of(group, index, size, C)
    elif kind == C.FFN1:
        first = size.shared_tiles
        tile, part = tile_of(tile, size.num_tiles - first, ffn1_tasks_of(size, C), C.tile_group)
        block = part * ffn1_blocks_of(size, C)
        tile += first
    elif C.has_shared and kind == C.SHARED_FFN1:
        tile, block = tile_of(tile, size.shared_tiles, C.i_blocks, C.tile_group)
    elif C.has_ffn and not C.has_tail and kind == C.FFN2:
        per_group = size.num_tiles * ffn2_tasks_of(0, size, C)
        group = min(tile // per_group, C.num_column_groups - 1)
        kind, tile, block = ffn2_of(group, tile - group * per_group, size, C)
    elif C.has_combine and not C.has_tail and kind == C.COMBINE:
        block = tile // size.combine_tiles
        tile = tile % size.combine_tiles
    return kind, tile, block


@triton.jit
def table_wait_of(size, C: tl.constexpr):
    """Return (counter, least value) that a worker waits for ahead of its first table task."""
    counter = C.SCATTER_DONE
    return counter, size.token_tiles


@triton.jit
def wait_of(NUMBER: tl.constexpr, kind, tile, block, size, C: tl.constexpr):
    """Return (counter, least value) of a task's first or second wait; least 0 asks for nothing.

    The least value is always the number of signals that the counter gets in the whole launch: a
    smaller one would promise nothing about any particular signal. What rests on row tables is
    awaited once by each worker, see :func:`table_wait_of`. Selections, since branches on the kind
    would compile to a jump through a table.
    """
    token_tiles = size.token_tiles
    late = (kind >= C.COMBINE) & C.weighs_late
    counter = C.ROUTE_DONE
    least = tl.where(late, token_tiles, 0)
    if C.is_backward:
        counter, least = backward_wait_of(NUMBER, kind, tile, size, C)
    elif NUMBER == 0:
        is_ffn2 = (kind == C.FFN2) | ((kind == C.SHARED_FFN2) & C.has_shared)
        counter = tl.where(kind == C.SCATTER, C.PREFIX_DONE, C.ROUTE_DONE)
        counter = tl.where(is_ffn2, C.first_tile_counter + tile, counter)
        counter = tl.where(kind == C.COMBINE, C.FIRST_COLUMN_GROUP + block, counter)
        least = tl.where((kind == C.PREFIX) & C.makes_rows, token_tiles, 0)
        least = tl.where((kind == C.SCATTER) & C.makes_rows, C.prefix_blocks, least)
        ffn1_tasks = tl.where(kind == C.FFN2, ffn1_tasks_of(size, C), C.i_blocks)
        least = tl.where(is_ffn2, ffn1_tasks, least)
        after_ffn2 = (kind == C.COMBINE) & C.has_ffn
        least = tl.where(after_ffn2, size.num_tiles * ffn2_tasks_of(block, size, C), least)
    return counter, least


@triton.jit
def signal_of(NUMBER: tl.constexpr, kind, tile, block, C: tl.constexpr):
    """Return the first or second counter that a finished task adds one to, or -1."""
    if C.is_backward:
        counter = backward_signal_of(NUMBER, kind, tile, C)
    else:
        is_ffn1 = (kind == C.FFN1) | ((kind == C.SHARED_FFN1) & C.has_shared)
        is_ffn2 = (kind == C.FFN2) | ((kind == C.SHARED_FFN2) & C.has_shared)
        counter = tl.where(kind == C.ROUTE, C.ROUTE_DONE, -1)
        counter = tl.where(kind == C.PREFIX, C.PREFIX_DONE, counter)
        counter = tl.where(kind == C.SCATTER, C.SCATTER_DONE, counter)
        counter = tl.where(is_ffn1, C.first_tile_counter + tile, counter)
        counter = tl.where(is_ffn2, C.FIRST_COLUMN_GROUP + block // C.group_blocks, counter)
    return counter


@triton.jit
def takes_rows(kind, C: tl.constexpr):
    """Whether a task is for a row tile of the tables and needs to know what it holds."""
    if C.is_backward:  # noqa: SIM108  (known when compiling)
        second = (kind == C.DH) | (kind == C.DX)
    else:
        second = kind == C.FFN2
    return (kind == C.FFN1) | second


def _where(condition: bool, chosen: int, other: int) -> int:
    return chosen if condition else other


def as_python(jitted: dict[str, JITFunction | InterpretedFunction]) -> SimpleNamespace:
    """Return device functions of scalars as Python functions: the same code on integers.

    They see one another, and the few words of Triton's language that they use mean their Python.
    """
    language = SimpleNamespace(cdiv=triton.cdiv, static_range=range, where=_where)
    names: dict[str, object] = {"tl": language, "Sizes": Sizes}
    for name, function in jitted.items():
        names[name] = FunctionType(inspect.unwrap(function.fn).__code__, names, name)
    return SimpleNamespace(**names)


plain = as_python(
    {
        name: value
        for name, value in (vars(backward_order) | globals()).items()
        if isinstance(value, JITFunction | InterpretedFunction)
    }
)

# Chosen once, when Triton is imported: TRITON_INTERPRET=1.
INTERPRETED = isinstance(count_tasks, InterpretedFunction)
