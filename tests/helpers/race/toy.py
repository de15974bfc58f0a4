"""Two small kernels that do right what the race check has rules about; tests spoil them."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.helpers.race.events import Names
from tests.helpers.race.record import Recorder
from tests.helpers.race.watch import watch

LANES = 16
SPACING = 32  # words between counters
WRITTEN, READ, TURN, CLAIMS, EXITS = range(5)  # counters


@triton.jit
def await_(counters, COUNTER: tl.constexpr, least):
    """Poll a counter until it reaches ``least``, or for a while."""
    seen = tl.atomic_add(counters + COUNTER * 32, 0, sem="acquire")
    polls = 1
    while (seen < least) & (polls < 9):
        seen = tl.atomic_add(counters + COUNTER * 32, 0, sem="acquire")
        polls += 1


@triton.jit
def signal(counters, COUNTER: tl.constexpr):
    """Publish what this worker stored."""
    tl.debug_barrier()
    tl.atomic_add(counters + COUNTER * 32, 1, sem="release")


@triton.jit
def relay(handed, own, counters, given, out):
    """Workers 0 and 1 write, worker 2 reads and turns around, worker 3 then overwrites."""
    worker = tl.program_id(0)
    lane = tl.arange(0, 16)
    if worker < 2:
        tl.store(handed + worker * 16 + lane, lane)
        signal(counters, 0)
    if worker == 2:
        await_(counters, 0, 2)
        total = tl.load(handed + lane) + tl.load(handed + 16 + lane) + given.load([0])
        tl.store(own + lane, total)
        tl.debug_barrier()
        tl.store(out + lane, tl.load(own + 15 - lane))
        signal(counters, 1)
    if worker == 3:
        await_(counters, 1, 1)
        tl.store(handed + lane, lane)


@triton.jit
def queue(handed, own, counters, given, out):
    """Task 0 writes, task 1 reads: whoever claims them."""
    lane = tl.arange(0, 16)
    task = tl.atomic_add(counters + 3 * 32, 1, sem="relaxed")
    while task < 2:
        if task == 0:
            tl.store(handed + lane, lane)
            signal(counters, 0)
        if task == 1:
            await_(counters, 0, 1)
            tl.store(out + lane, tl.load(handed + 15 - lane))
        task = tl.atomic_add(counters + 3 * 32, 1, sem="relaxed")


def assert_toy_clean(
    kernel: Callable[[], Any], num_workers: int, tasks_per_worker: int | None = None
) -> None:
    """Watch one launch of a toy.

    Args:
        kernel: returns it, as it is while a test has spoiled it.
        num_workers: programs.
        tasks_per_worker: see ``launch.assert_no_race``.

    Raises:
        RaceError: if something in it is left to luck.
    """
    counters = torch.zeros(5 * SPACING, dtype=torch.int32)
    scratch = [torch.full((3 * LANES,), -1, dtype=torch.int32) for _ in range(2)]
    given = TensorDescriptor.from_tensor(torch.ones(LANES, dtype=torch.int32), [LANES])
    recorder = Recorder(
        Names(name_task, lambda address: f"counter {(address - counters.data_ptr()) // 128}"),
        lambda: counters.data_ptr() + 4 * CLAIMS * SPACING,
        lambda worker, claimed: tasks_per_worker is None or claimed < tasks_per_worker,
        one_unit=tasks_per_worker == 1,
    )

    def call() -> Tensor:
        out = torch.empty(LANES, dtype=torch.int32)
        kernel()[(num_workers,)](*scratch, counters, given, out)
        return out

    _, check = watch(call, recorder, lambda: scratch)
    check.run()


def name_task(task: int) -> str | None:
    """Name a task of the queue."""
    return f"task {task}" if task < 2 else None
