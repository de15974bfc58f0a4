"""Claim, wait, signal, leave: how workers share one task list without a grid barrier.

Memory order on Hopper, Triton 3.6: only thread 0 of a worker performs a scalar atomic, so a
release needs a barrier before it (or other threads' stores may still be on their way), and a
poll must be an atomic (a plain load in a loop is hoisted out or deleted).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from megakernel.plan.order import (
    count_counters,
    signal_of,
    table_wait_of,
    takes_rows,
    task_of,
    wait_of,
)

_NEVER = tl.constexpr(1 << 30)


@triton.jit
def claim(control, C: tl.constexpr):
    """Take the next task id. Order: none needed, ids carry no data."""
    return tl.atomic_add(control.counters + C.CLAIM * C.COUNTER_STRIDE, 1, sem="relaxed")


@triton.jit
def clock(control, C: tl.constexpr):
    """Return the time: the GPU's nanoseconds, or in the interpreter how often it was asked."""
    if C.interpreted:  # noqa: SIM108  (known when compiling)
        now = tl.atomic_add(control.times, 1, sem="relaxed")
    else:
        now = globaltimer()
    return now


@triton.jit
def stamp(control, task, EVENT: tl.constexpr, C: tl.constexpr):
    """Write when something happened to a task, if the launch is timed."""
    if C.timed:
        # The line before the first task's holds the interpreter's count.
        place = control.times + (task + 1).to(tl.int64) * C.NUM_TIMES
        tl.store(place + EVENT, clock(control, C))


@triton.jit
def begin(control, task, C: tl.constexpr):
    """Write who claimed a task and when, if the launch is timed; without a wait it is ready."""
    if C.timed:
        place = control.times + (task + 1).to(tl.int64) * C.NUM_TIMES
        now = clock(control, C)
        tl.store(place + C.WORKER, tl.program_id(0).to(tl.int64))
        tl.store(place + C.CLAIMED, now)
        tl.store(place + C.READY, now)


@triton.jit
def signal(control, counter, C: tl.constexpr):
    """Publish everything this worker stored, then add one to ``counter``."""
    tl.debug_barrier()
    tl.atomic_add(control.counters + counter * C.COUNTER_STRIDE, 1, sem="release")


@triton.jit
def record_error(control, AT: tl.constexpr, flag, first, second, third, fourth, fifth):
    """Keep the first error of its kind in this launch."""
    if tl.atomic_cas(control.error + AT, 0, flag) == 0:
        tl.store(control.error + AT + 1, first)
        tl.store(control.error + AT + 2, second)
        tl.store(control.error + AT + 3, third)
        tl.store(control.error + AT + 4, fourth)
        tl.store(control.error + AT + 5, fifth)


@triton.jit
def wait(control, counter, least, task, num_tiles, max_polls, C: tl.constexpr):
    """Poll ``counter`` until it reaches ``least``; return whether it did.

    Order: the acquire makes everything published before those signals visible to this worker.
    Limits: gives up after ``max_polls`` polls, or as soon as another worker has; then the claim
    counter jumps past the list, so that all workers drain.
    """
    place = control.counters + counter * C.COUNTER_STRIDE
    seen = tl.atomic_add(place, 0, sem="acquire")
    polls = 1
    while (seen < least) & (polls < max_polls):
        seen = tl.atomic_add(place, 0, sem="acquire")
        polls += 1
        if tl.atomic_add(control.error + C.STALL_AT, 0, sem="relaxed") != 0:
            polls = max_polls
    if seen < least:
        record_error(control, C.STALL_AT, 1, task, counter, seen, least, num_tiles)
        tl.atomic_max(control.counters + C.CLAIM * C.COUNTER_STRIDE, _NEVER, sem="relaxed")
    stamp(control, task, C.READY, C)
    return seen >= least


@triton.jit
def count_made_tiles(task, b, size, max_polls, C: tl.constexpr):
    """Wait for the row tables that this launch makes; return its row tiles, or -1 if it stalls."""
    counter, least = table_wait_of(size, C)
    num_tiles = -1
    if wait(b.control, counter, least, task, size.num_tiles, max_polls, C):
        num_tiles = tl.load(b.scratch.num_tiles_1)
    return num_tiles


@triton.jit
def content_of(kind, tile, b, size, C: tl.constexpr):
    """Return (expert, filled rows) of the row tile that a task is for."""
    expert, filled = 0, 0
    if C.has_ffn:
        routed_tile = tile - size.shared_tiles
        takes = takes_rows(kind, C)
        expert = tl.load(b.rows.expert_of_tile + routed_tile, mask=takes, other=0)
        filled = tl.load(b.rows.rows_of_tile + routed_tile, mask=takes, other=0)
    return expert, filled


@triton.jit
def ready_task(task, num_tasks, b, size, max_polls, C: tl.constexpr):
    """Decode a task and wait for all it needs; return (kind, tile, block, its row tile's content).

    Kind is -1 for nothing to do: past the end of the list, and where a wait gave up. A row tile's
    content is in tables that no task of the tile's has to wait for any more.
    """
    NUMBERS: tl.constexpr = C.num_waits
    kind, tile, block = task_of(tl.where(task < num_tasks, task, 0), size, C)
    kind = tl.where(task < num_tasks, kind, -1)
    if C.reads_ahead:
        content = content_of(kind, tile, b, size, C)
    for number in tl.static_range(NUMBERS):
        counter, least = wait_of(number, kind, tile, block, size, C)
        if least > 0:  # noqa: SIM102  (one may be known when compiling)
            if not wait(b.control, counter, least, task, size.num_tiles, max_polls, C):
                kind = -1
    if not C.reads_ahead:
        content = content_of(kind, tile, b, size, C)
    return kind, tile, block, content


@triton.jit
def signal_task(kind, tile, block, b, C: tl.constexpr):
    """Say that a task is done, if any other waits for it."""
    NUMBERS: tl.constexpr = C.num_signals
    for number in tl.static_range(NUMBERS):
        counter = signal_of(number, kind, tile, block, C)
        if counter >= 0:
            signal(b.control, counter, C)


@triton.jit
def leave(control, num_workers, schedule_id, size, C: tl.constexpr):
    """Count this worker out; the last one zeroes the counters and hands errors to the host.

    Order: acquire and release on the exit counter, so the last worker's zeroes come after every
    other worker's last poll.
    """
    tl.debug_barrier()
    place = control.counters + C.EXIT * C.COUNTER_STRIDE
    if tl.atomic_add(place, 1, sem="acq_rel") == num_workers - 1:
        word = tl.arange(0, C.ERROR_WORDS)
        error = tl.load(control.error + word)
        # A worker that gave up has no row tiles; whoever said so first knew of all there can be.
        stalled_tiles = tl.sum(tl.where(word == C.STALL_AT + 5, error, 0), 0)
        more_tiles = max(stalled_tiles - size.num_tiles, 0)
        num_counters = count_counters(size, C) + C.counters_per_tile * more_tiles
        for start in range(0, num_counters, 128):
            counter = start + tl.arange(0, 128)
            tl.store(control.counters + counter * C.COUNTER_STRIDE, 0, mask=counter < num_counters)
        if tl.max(tl.where(error != 0, 1, 0), 0) != 0:
            tl.debug_barrier()  # each warp has read them for itself, and all go the same way
            tl.store(control.error + word, 0)
            error = tl.where(word == C.SCHEDULE_AT, schedule_id, error)
            hand_over(control, C.STALL_AT, error, C)
            hand_over(control, C.INPUT_AT, error, C)


@triton.jit
def hand_over(control, AT: tl.constexpr, error, C: tl.constexpr):
    """Report the error of a kind, unless the host has not read the last one yet.

    Order: the flag is released to the host behind the words that belong to it. The host clears it
    when it has read them, and that is acquired before they are written again.
    """
    word = tl.arange(0, C.ERROR_WORDS)
    flag = tl.sum(tl.where(word == AT, error, 0), 0)
    if flag != 0:  # noqa: SIM102  (the host's memory is far: looked at only when needed)
        if tl.atomic_add(control.report + AT, 0, sem="acquire", scope="sys") == 0:
            belongs = (word > AT) & (word < AT + C.ERROR_WORDS // 2)
            tl.store(control.report + word, error, mask=belongs)
            tl.debug_barrier()
            tl.atomic_xchg(control.report + AT, flag, sem="release", scope="sys")
