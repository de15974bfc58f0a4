"""Who did what when: the times that a launch kept of its own tasks.

A launch whose config has ``record_times`` writes, for each task, which worker claimed it and when
it was claimed, ready and done. The clock is the GPU's global timer in nanoseconds, which all
multiprocessors share and which some devices advance only once a microsecond. Triton's interpreter
has no clock: there times are counts of readings, so only their order means something.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from megakernel.schedule import NAMES
from megakernel.workspace import workspace_for


@dataclass(frozen=True, eq=False)
class Timeline:
    """When each task of a launch ran, in microseconds from the launch.

    Attributes:
        launch_us: time of the whole launch.
        kind_N: kind of each task, an index into ``megakernel.schedule.NAMES``.
        worker_N: who ran it.
        claim_N, start_N, end_N: when it was claimed, was ready, and was done.
    """

    launch_us: float
    kind_N: np.ndarray
    worker_N: np.ndarray
    claim_N: np.ndarray
    start_N: np.ndarray
    end_N: np.ndarray

    @property
    def num_workers(self) -> int:
        """Workers up to the last that ran a task."""
        return int(self.worker_N.max()) + 1

    @property
    def busy_share(self) -> float:
        """Part of the workers' time that went into tasks, not into claims and waits."""
        return float((self.end_N - self.start_N).sum() / (self.num_workers * self.launch_us))

    def us_of_kind(self) -> dict[str, float]:
        """Return microseconds per worker in each kind of task, and in claims and waits."""
        spent_N = self.end_N - self.start_N
        spent = {
            name: float(spent_N[self.kind_N == kind].sum()) / self.num_workers
            for kind, name in enumerate(NAMES)
        }
        spent["wait"] = float((self.start_N - self.claim_N).sum()) / self.num_workers
        return spent


def read_timeline(device: torch.device) -> Timeline:
    """Return the times of the last launch on the current stream (synchronises).

    Args:
        device: where the layer ran.

    Raises:
        ValueError: unless that launch's config had ``record_times``.
    """
    scratch = workspace_for(device).latest
    if scratch is None or scratch.times is None:
        raise ValueError(
            "the last launch on this stream must have a config with record_times=True, "
            f"got {'no launch' if scratch is None else 'record_times=False'}"
        )
    schedule = scratch.schedule
    if scratch.rows is not None:  # a live launch counts its row tiles itself
        assert scratch.rows.num_tiles_1 is not None
        schedule = replace(schedule, num_tiles=int(scratch.rows.num_tiles_1))
    spec = schedule.spec
    times = scratch.times[1 : 1 + schedule.num_tasks].cpu().numpy()
    first = times[:, spec.CLAIMED].min()
    claim_N, start_N, end_N = (
        (times[:, event] - first) * 1e-3 for event in (spec.CLAIMED, spec.READY, spec.DONE)
    )
    kind_N = np.array([task.kind for task in schedule.tasks()])
    worker_N = times[:, spec.WORKER].copy()
    return Timeline(float(end_N.max()), kind_N, worker_N, claim_N, start_N, end_N)
