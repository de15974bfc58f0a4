"""The simulated queue obeys the kernel's waits, and its arithmetic can be checked by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.config import SHIPPED, KernelConfig, why_illegal
from megakernel.plan.protocol import NAMES
from perf.problems.cases import SHAPES, TINY, Case, make_loads
from perf.simulator.costs import H200, MeasuredCosts
from perf.simulator.predict import (
    make_launch,
    make_tiles,
    neighbours,
    predict,
    search_configs,
    simulate,
)

SMALL = replace(KernelConfig(), block_rows=16, block_i=16, block_h=16, step=16, block_tokens=16,
                combine_tokens=16, select_tokens=16)  # fmt: skip


def constant_costs(us=2.0):
    return MeasuredCosts(dict.fromkeys(NAMES, us))


@given(
    num_tokens=st.integers(1, 70),
    workers=st.integers(1, 40),
    groups=st.integers(1, 4),
    route=st.sampled_from(["live", "replay", "given"]),
    seed=st.integers(0, 5),
)
@settings(max_examples=25, deadline=None)
def test_no_task_starts_before_what_it_waits_for(num_tokens, workers, groups, route, seed):
    case = Case(TINY, num_tokens, "zipf", seed)
    config = replace(SMALL, num_workers=workers, column_groups=groups)
    launch = make_launch(TINY, num_tokens, make_loads(case), config, route)
    schedule = launch.schedule
    found = simulate(launch, constant_costs())
    signals: dict[int, list[float]] = {}
    for n, task in enumerate(schedule.tasks()):
        for counter, least in schedule.waits(n):
            assert len(signals[counter]) == least
            assert found.start_N[n] >= max(signals[counter])
        if (counter := schedule.signal(task)) is not None:
            signals.setdefault(counter, []).append(found.end_N[n])
    assert found.launch_us > found.end_N.max()


@given(num_tokens=st.integers(1, 70), workers=st.integers(1, 12))
@settings(max_examples=10, deadline=None)
def test_a_worker_does_one_thing_at_a_time(num_tokens, workers):
    case = Case(TINY, num_tokens, "uniform")
    config = replace(SMALL, num_workers=workers)
    launch = make_launch(TINY, num_tokens, make_loads(case), config)
    found = simulate(launch, constant_costs())
    for worker in range(workers):
        mine = np.flatnonzero(found.worker_N == worker)
        assert (found.claim_N[mine][1:] >= found.end_N[mine][:-1]).all()
    assert 0 < found.busy_share <= 1


@pytest.mark.parametrize("look_ahead", [False, True], ids=["claims-after", "claims-ahead"])
def test_one_worker_takes_the_sum_of_everything(look_ahead):
    config = replace(SMALL, num_workers=1, look_ahead=look_ahead)
    launch = make_launch(TINY, 32, np.full(8, 8), config, "replay")
    tasks = list(launch.schedule.tasks())
    found = simulate(launch, constant_costs(2.0))
    polls = sum(len(launch.schedule.waits(n)) for n in range(len(tasks)))
    signals = [launch.schedule.signal(task) is not None for task in tasks]
    hidden_us = sum(signals[:-1]) * H200.signal_us if look_ahead else 0.0
    by_hand = (
        len(tasks) * (H200.claim_us + 2.0)
        + polls * H200.poll_us
        + sum(signals) * H200.signal_us
        - hidden_us
        + H200.claim_us
        + H200.launch_us
    )
    assert found.launch_us == pytest.approx(by_hand)


def test_tiles_hold_all_rows_of_their_experts():
    tiles = make_tiles(np.array([5, 0, 33, 16]), 16)
    assert tiles.rows_of_tile.tolist() == [5, 16, 16, 1, 16]
    assert tiles.expert_of_tile.tolist() == [0, 2, 2, 2, 3]


def test_replay_is_predicted_faster_than_a_live_gate():
    model = SHAPES["OLMoE"]
    load_E = make_loads(Case(model, 512, "recorded"))
    live, replay = (
        predict(model, 512, load_E, SHIPPED["rows64"], route).launch_us
        for route in ("live", "replay")
    )
    assert replay < live


def test_a_prediction_stays_above_the_roofline():
    from perf.measuring.roofline import useful_work

    model = SHAPES["OLMoE"]
    for num_tokens in (1, 64, 512):
        load_E = make_loads(Case(model, num_tokens, "uniform"))
        found = predict(model, num_tokens, load_E, SHIPPED["rows16"])
        assert found.launch_us > H200.roofs.least_us(useful_work(model, num_tokens, load_E))


def test_the_search_tries_legal_configs_and_never_ends_worse():
    load_E = make_loads(Case(TINY, 32, "uniform"))
    ranked = search_configs(SHIPPED["rows128"], TINY, 32, load_E, "live")
    predicted_us = [us for us, _ in ranked]
    assert predicted_us == sorted(predicted_us)
    assert SHIPPED["rows128"] in [config for _, config in ranked]
    assert all(why_illegal(config) is None for config in neighbours(SHIPPED["rows128"]))
