"""Times that a launch keeps: complete, in the order of the waits, and off unless asked for."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megakernel import MegakernelStall, prepare_replay
from megakernel.launch.workspace import workspace_for
from megakernel.plan.protocol import FORWARD_NAMES, NAMES
from megakernel.plan.spec import KernelSpec
from megakernel.tools.timeline import read_timeline
from tests.helpers.cases import CASES
from tests.helpers.compare import assert_same_bits
from tests.helpers.inputs import SMALL, make_inputs, run

CPU = torch.device("cpu")
TIMED = replace(SMALL, record_times=True, num_workers=3)


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(CASES[0])


@pytest.mark.parametrize("route", ["live", "replay"])
def test_every_task_is_timed_after_those_it_waits_for(inputs, route):
    replay = None
    if route == "replay":
        ids_TK = run(inputs, config=SMALL).expert_of_TK
        replay = prepare_replay(ids_TK, inputs.case.E, config=TIMED)
    run(inputs, replay=replay, config=TIMED)
    times = read_timeline(CPU)
    memory = workspace_for(CPU).latest
    schedule = memory.schedule
    if route == "live":
        schedule = replace(schedule, num_tiles=int(memory.scratch.num_tiles_1))
    tasks = list(schedule.tasks())
    assert times.kind_N.tolist() == [task.kind for task in tasks]
    assert set(times.worker_N) == {0}  # interpreted, the first worker finds all the work
    assert (times.claim_N <= times.start_N).all() and (times.start_N < times.end_N).all()
    last_signal = np.zeros(schedule.num_counters)
    for n, task in enumerate(tasks):
        for counter, _ in schedule.waits(n):
            assert times.start_N[n] > last_signal[counter]
        if (counter := schedule.signal(task)) is not None:
            last_signal[counter] = max(last_signal[counter], times.end_N[n])


def test_a_worker_asks_for_the_row_tables_once(inputs):
    run(inputs, config=TIMED)
    times = read_timeline(CPU)
    is_ffn1 = times.kind_N == NAMES.index("FFN1")
    waited_N = times.start_N > times.claim_N
    assert waited_N[is_ffn1].tolist() == [True] + [False] * (is_ffn1.sum() - 1)
    assert waited_N[times.kind_N == NAMES.index("FFN2")].all()


def test_a_workers_tasks_do_not_overlap_and_its_time_is_accounted_for(inputs):
    run(inputs, config=TIMED)
    times = read_timeline(CPU)
    for worker in np.unique(times.worker_N):
        own = np.flatnonzero(times.worker_N == worker)
        assert (times.claim_N[own][1:] > times.end_N[own][:-1]).all()
    spent = times.us_of_kind()
    assert set(spent) == {*FORWARD_NAMES, "claim", "wait"}
    assert sum(spent.values()) == pytest.approx(times.launch_us)
    assert 0 < times.busy_share <= 1


def test_the_clock_changes_no_bit_of_the_output(inputs):
    plain, timed = run(inputs, config=SMALL), run(inputs, config=TIMED)
    assert_same_bits(actual=timed.y_TH, expected=plain.y_TH)


def test_without_the_config_there_is_nothing_to_read(inputs):
    run(inputs, config=TIMED)
    run(inputs, config=SMALL)
    with pytest.raises(ValueError, match=r"record_times=True, got record_times=False$"):
        read_timeline(CPU)


def test_a_launch_that_stalled_has_no_times(inputs):
    run(inputs, config=TIMED)
    counters = workspace_for(CPU).control.counters
    counters[KernelSpec.ROUTE_DONE * KernelSpec.COUNTER_STRIDE] = -100
    with pytest.raises(MegakernelStall):
        run(inputs, config=TIMED)
    with pytest.raises(ValueError, match="got no launch"):
        read_timeline(CPU)
