"""Who did what when: the times that a launch kept of its own tasks.

A launch whose config has ``record_times`` writes, for each task, which worker claimed it and when
it was claimed, ready and done. A CUDA graph holds such a launch too, but is not heard of here:
read the times of an eager call. The clock is the GPU's global timer in nanoseconds, which all
multiprocessors share and which some devices advance only once a microsecond. Triton's interpreter
has no clock: there times are counts of readings, so only their order means something.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from megakernel.launch.workspace import workspace_for
from megakernel.plan.protocol import FORWARD_NAMES, NAMES


@dataclass(frozen=True, eq=False)
class Timeline:
    """When each task of a launch ran, in microseconds from the first claim.

    Attributes:
        launch_us: time of the whole launch; as measured, from the first claim to the last end.
        kind_N: kind of each task, an index into ``megakernel.plan.protocol.NAMES``.
        worker_N: who ran it.
        ask_N: when that worker was done with its task before, and asked for the next; as measured,
            the time of the claim for its first one.
        claim_N, start_N, end_N: when it was claimed, was ready, and was done.
    """

    launch_us: float
    kind_N: np.ndarray
    worker_N: np.ndarray
    ask_N: np.ndarray
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
        """Return microseconds per worker in each kind of task, in claims and in waits.

        Kinds of a backward are there only if there is such a task.
        """
        spent_N = self.end_N - self.start_N
        spent = {
            name: float(spent_N[self.kind_N == kind].sum()) / self.num_workers
            for kind, name in enumerate(NAMES)
            if name in FORWARD_NAMES or kind in self.kind_N
        }
        spent["claim"] = float((self.claim_N - self.ask_N).sum()) / self.num_workers
        spent["wait"] = float((self.start_N - self.claim_N).sum()) / self.num_workers
        return spent


def read_timeline(device: torch.device) -> Timeline:
    """Return the times of the last launch on the current stream (synchronises).

    Args:
        device: where the layer ran.

    Raises:
        ValueError: unless that launch's config had ``record_times``.
    """
    memory = workspace_for(device).latest
    if memory is None or memory.times is None:
        raise ValueError(
            "the last launch on this stream must have a config with record_times=True, "
            f"got {'no launch' if memory is None else 'record_times=False'}"
        )
    schedule = memory.schedule
    if memory.scratch.num_tiles_1 is not None:  # such a launch counts its row tiles itself
        schedule = replace(schedule, num_tiles=int(memory.scratch.num_tiles_1), counted=True)
    spec = schedule.spec
    times = memory.times[1 : 1 + schedule.num_tasks].cpu().numpy()
    first = times[:, spec.CLAIMED].min()
    claim_N, start_N, end_N = (
        (times[:, event] - first) * 1e-3 for event in (spec.CLAIMED, spec.READY, spec.DONE)
    )
    kind_N = np.array([task.kind for task in schedule.tasks()])
    worker_N = times[:, spec.WORKER].copy()
    ask_N = previous_end(worker_N, claim_N, end_N)
    return Timeline(float(end_N.max()), kind_N, worker_N, ask_N, claim_N, start_N, end_N)


def previous_end(worker_N: np.ndarray, claim_N: np.ndarray, end_N: np.ndarray) -> np.ndarray:
    """Return when each task's worker ended its task before; its claim if it is the first."""
    by_worker = np.lexsort((claim_N, worker_N))
    follows = np.diff(worker_N[by_worker], prepend=-1) == 0
    ask_N = claim_N.copy()
    ask_N[by_worker[follows]] = end_N[by_worker[np.flatnonzero(follows) - 1]]
    return np.minimum(ask_N, claim_N)  # a coarse clock may lag
