"""All that the race check knows about this project's kernel."""

from dataclasses import replace

import numpy as np
import torch

from megakernel.launch.workspace import Workspace, workspace_for
from megakernel.plan.protocol import Protocol
from megakernel.plan.schedule import Schedule

COUNTER_BYTES = 4 * Protocol.COUNTER_STRIDE


def workspace() -> Workspace:
    """Return the memory that launches on the CPU share."""
    return workspace_for(torch.device("cpu"))


def share_report() -> None:
    """Move the error words to shared memory ahead of a launch that other processes run.

    The workspace looks at them through numpy, which would go on looking at the memory they left.
    """
    space = workspace()
    space.control.report.untyped_storage().share_memory_()
    space.report = space.control.report.numpy()


def claim_address() -> int:
    """Where workers claim their tasks."""
    return workspace().control.counters.data_ptr() + Protocol.CLAIM * COUNTER_BYTES


def latest_schedule() -> Schedule:
    """Return the task list of the last launch, with the row tiles it really had."""
    memory = workspace().latest
    assert memory is not None
    schedule = memory.schedule
    if memory.scratch.num_tiles_1 is None:
        return schedule
    num_tiles = int(memory.scratch.num_tiles_1)
    is_known = 0 <= num_tiles <= schedule.num_tiles  # scatter has written it
    return replace(schedule, num_tiles=num_tiles, counted=True) if is_known else schedule


def padding() -> np.ndarray:
    """Return the addresses of assignment_of_C, made by the last launch, that hold no assignment.

    FFN1 reads them with the others and drops what it finds.
    """
    memory, schedule = workspace().latest, latest_schedule()
    assert memory is not None
    assignment_of_C, rows_of_tile = memory.rows.assignment_of_C, memory.rows.rows_of_tile
    if assignment_of_C is None or rows_of_tile is None:
        return np.zeros(0, np.int64)
    num_tiles = schedule.num_tiles - schedule.shared_tiles
    row = torch.arange(num_tiles * schedule.spec.block_rows).view(num_tiles, -1)
    filled = row % schedule.spec.block_rows < rows_of_tile[:num_tiles, None]
    return assignment_of_C.data_ptr() + 4 * row[~filled].numpy()


def name_task(task: int) -> str | None:
    """Name a task of the last launch; None past the end of its list."""
    schedule = latest_schedule()
    return schedule.describe_task(task) if task < schedule.num_tasks else None


def name_counter(address: int) -> str:
    """Name the counter at an address."""
    counters = workspace().control.counters
    number, rest = divmod(address - counters.data_ptr(), COUNTER_BYTES)
    if rest or not 0 <= address - counters.data_ptr() < 4 * counters.numel():
        return f"the word at {address:#x}"
    return latest_schedule().describe_counter(number)


def counters_left() -> list[str]:
    """Name the counters that are not zero."""
    counters = workspace().control.counters
    return [name_counter(counters.data_ptr() + 4 * int(word)) for word in counters.nonzero()]
