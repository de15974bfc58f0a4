"""Claim, wait, signal, leave: how workers share one task list without a grid barrier.

Memory order on Hopper, Triton 3.6: only thread 0 of a worker performs a scalar atomic, so a
release needs a barrier before it (or other threads' stores may still be on their way), and a
poll must be an atomic (a plain load in a loop is hoisted out or deleted).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

# Words of the error buffer. A stall is (1, task, counter, value seen, value awaited, row tiles); a
# refused input is (reason, token, choice, value). The host's copy also says which schedule ran.
STALL_AT = 0
SCHEDULE_AT = 7
INPUT_AT = 8
ERROR_WORDS = 16

_STALL_AT = tl.constexpr(STALL_AT)
_SCHEDULE_AT = tl.constexpr(SCHEDULE_AT)
_INPUT_AT = tl.constexpr(INPUT_AT)
_ERROR_WORDS = tl.constexpr(ERROR_WORDS)
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
def record_bad_input(control, reason, token, choice, value):
    """Report an assignment that the launch skips."""
    record_error(control, _INPUT_AT, reason, token, choice, value, 0, 0)


@triton.jit
def wait(control, counter, target, task, num_tiles, max_polls, C: tl.constexpr):
    """Poll ``counter`` until it reaches ``target``; return whether it did.

    Order: the acquire makes everything published before those signals visible to this worker.
    Limits: gives up after ``max_polls`` polls, or as soon as another worker has; then the claim
    counter jumps past the list, so that all workers drain.
    """
    place = control.counters + counter * C.COUNTER_STRIDE
    seen = tl.atomic_add(place, 0, sem="acquire")
    polls = 1
    while (seen < target) & (polls < max_polls):
        seen = tl.atomic_add(place, 0, sem="acquire")
        polls += 1
        if tl.atomic_add(control.error + _STALL_AT, 0, sem="relaxed") != 0:
            polls = max_polls
    if seen < target:
        record_error(control, _STALL_AT, 1, task, counter, seen, target, num_tiles)
        tl.atomic_max(control.counters + C.CLAIM * C.COUNTER_STRIDE, _NEVER, sem="relaxed")
    stamp(control, task, C.READY, C)
    return seen >= target


@triton.jit
def leave(control, num_workers, num_counters, schedule_id, C: tl.constexpr):
    """Count this worker out; the last one zeroes the counters and hands errors to the host.

    Order: acquire and release on the exit counter, so the last worker's zeroes come after every
    other worker's last poll.
    """
    tl.debug_barrier()
    place = control.counters + C.EXIT * C.COUNTER_STRIDE
    if tl.atomic_add(place, 1, sem="acq_rel") == num_workers - 1:
        for start in range(0, num_counters, 128):
            counter = start + tl.arange(0, 128)
            tl.store(control.counters + counter * C.COUNTER_STRIDE, 0, mask=counter < num_counters)
        word = tl.arange(0, _ERROR_WORDS)
        error = tl.load(control.error + word)
        if tl.max(tl.where(error != 0, 1, 0), 0) != 0:
            tl.store(control.report + word, tl.where(word == _SCHEDULE_AT, schedule_id, error))
            tl.store(control.error + word, 0)
