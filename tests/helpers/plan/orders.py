"""Whether the kernel sees the task list that Python sees."""

from dataclasses import astuple

import torch
import triton
import triton.language as tl

from megakernel.plan.order import (
    count_tasks,
    first_table_task,
    signal_of,
    sizes_of,
    table_wait_of,
    task_of,
    wait_of,
)
from megakernel.plan.schedule import Schedule

WORDS = 9  # kind, tile, block, two waits, two signals


@triton.jit
def list_kernel(ids, num_ids, out, num_tokens, num_tiles, WORDS: tl.constexpr, C: tl.constexpr):
    """Write the length of the list, where the row tables come in, and what some task ids are."""
    size = sizes_of(num_tokens, num_tiles, 0, 0, True, C)
    tl.store(out, count_tasks(size, C))
    if C.makes_rows:
        counter, least = table_wait_of(size, C)
        tl.store(out + 1, first_table_task(size, C))
        tl.store(out + 2, counter)
        tl.store(out + 3, least)
    for n in range(0, num_ids):
        place = out + (n + 1) * WORDS
        kind, tile, block = task_of(tl.load(ids + n), size, C)
        tl.store(place, kind)
        tl.store(place + 1, tile)
        tl.store(place + 2, block)
        for number in tl.static_range(2):
            counter, least = wait_of(number, kind, tile, block, size, C)
            tl.store(place + 3 + 2 * number, counter)
            tl.store(place + 4 + 2 * number, least)
            tl.store(place + 7 + number, signal_of(number, kind, tile, block, C))


def assert_kernel_has_order(schedule: Schedule, first: int) -> None:
    """Fail unless device functions and Python agree on the list.

    Args:
        schedule: the list.
        first: id of the first task that is compared; about eight are, evenly spread.
    """
    spec = schedule.spec
    ids = range(first, schedule.num_tasks, max(1, schedule.num_tasks // 8))
    out = torch.zeros(1 + len(ids), WORDS, dtype=torch.int32)
    ids_tensor = torch.tensor([*ids, -1], dtype=torch.int32)
    sizes = schedule.num_tokens, schedule.num_tiles
    list_kernel[(1,)](ids_tensor, len(ids), out, *sizes, WORDS=WORDS, C=spec)
    (num_tasks, first_table, *table_wait), *rows = out.tolist()
    assert num_tasks == schedule.num_tasks
    if spec.makes_rows:
        assert first_table == schedule.first_table_task
    for task_id, row in zip(ids, rows, strict=True):
        task = schedule.task(task_id)
        assert row[:3] == [*astuple(task)]
        asked = [tuple(row[3:5]), tuple(row[5:7])]
        if spec.makes_rows and task_id >= first_table:
            asked.insert(0, tuple(table_wait[:2]))
        assert [wait for wait in asked if wait[1] > 0] == schedule.waits(task_id)
        signalled = [counter for counter in row[7 : 7 + spec.num_signals] if counter >= 0]
        assert signalled == schedule.signals(task)
