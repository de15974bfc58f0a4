"""On the device: the times a launch keeps are those of a clock that all workers share."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megakernel.config import ROWS16
from megakernel.launch.workspace import workspace_for
from megakernel.tools.timeline import read_timeline
from tests.gpu.layers import make_layer
from tests.helpers.compare import assert_same_bits
from tests.helpers.inputs import run

pytestmark = pytest.mark.gpu

QWEN = "Qwen3-30B-A3B"
TIMED = replace(ROWS16, record_times=True)
RESOLUTION_US = 1.1  # some devices advance the global timer once a microsecond


def test_no_task_is_ready_before_those_it_waits_for_have_begun(device: torch.device) -> None:
    run(make_layer(QWEN, 96, device), config=TIMED)
    times = read_timeline(device)
    memory = workspace_for(device).latest
    schedule = replace(memory.schedule, num_tiles=int(memory.scratch.num_tiles_1))
    last_start = np.zeros(schedule.num_counters)
    for n, task in enumerate(schedule.tasks()):
        for counter, _ in schedule.waits(n):
            assert times.start_N[n] >= last_start[counter] - RESOLUTION_US
        if (counter := schedule.signal(task)) is not None:
            last_start[counter] = max(last_start[counter], times.start_N[n])


def test_a_worker_does_one_task_at_a_time(device: torch.device) -> None:
    run(make_layer(QWEN, 96, device), config=TIMED)
    times = read_timeline(device)
    assert (times.claim_N <= times.start_N).all() and (times.start_N <= times.end_N).all()
    for worker in np.unique(times.worker_N):
        own = np.flatnonzero(times.worker_N == worker)
        assert (times.claim_N[own][1:] >= times.end_N[own][:-1] - RESOLUTION_US).all()
    assert 0 < times.launch_us < 1e6


def test_the_clock_changes_no_bit_of_the_output(device: torch.device) -> None:
    inputs = make_layer(QWEN, 96, device)
    plain, timed = run(inputs, config=ROWS16), run(inputs, config=TIMED)
    assert_same_bits(actual=timed.y_TH, expected=plain.y_TH)
