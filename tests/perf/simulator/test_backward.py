"""The backward's queue obeys both signals of a task, and its costs follow what they claim."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.config import KernelConfig
from megakernel.plan.protocol import NAMES
from megakernel.plan.schedule import Task
from perf.measuring.roofline import backward_work
from perf.problems.cases import SHAPES, TINY, Case, make_loads
from perf.simulator.backward import make_backward_launch, predict_backward
from perf.simulator.backward_costs import BackwardCosts
from perf.simulator.costs import H100, H200
from perf.simulator.predict import simulate

SMALL = replace(KernelConfig(), block_rows=16, block_i=16, block_h=16, step=16, block_tokens=16,
                combine_tokens=16, select_tokens=16)  # fmt: skip
QWEN = SHAPES["Qwen3-30B-A3B"]


def costs_of(load_E, model=QWEN, save="preactivations", **options):
    num_tokens = -(-int(load_E.sum()) // model.top_k)
    launch = make_backward_launch(model, num_tokens, load_E, KernelConfig(), "live", save)
    given = launch.schedule.spec, num_tokens, launch.tiles, launch.num_workers
    return launch, BackwardCosts(*given, **options)


@given(
    num_tokens=st.integers(1, 70),
    workers=st.integers(1, 40),
    route=st.sampled_from(["live", "replay"]),
    save=st.sampled_from(["preactivations", "nothing"]),
    seed=st.integers(0, 5),
)
@settings(max_examples=20, deadline=None)
def test_no_task_starts_before_what_it_waits_for(num_tokens, workers, route, save, seed):
    load_E = make_loads(Case(TINY, num_tokens, "zipf", seed))
    config = replace(SMALL, num_workers=workers)
    launch = make_backward_launch(TINY, num_tokens, load_E, config, route, save)
    schedule = launch.schedule
    costs = BackwardCosts(schedule.spec, num_tokens, launch.tiles, workers)
    found = simulate(launch, costs)
    signals: dict[int, list[float]] = {}
    for n, task in enumerate(schedule.tasks()):
        for counter, least in schedule.waits(n):
            assert len(signals[counter]) == least
            assert found.start_N[n] >= max(signals[counter])
        for counter in schedule.signals(task):
            signals.setdefault(counter, []).append(found.end_N[n])


@pytest.mark.parametrize("save", ["preactivations", "nothing"])
def test_every_kind_of_task_costs_something(save):
    launch, costs = costs_of(np.full(128, 64), save=save)
    tasks = list(launch.schedule.tasks())
    again = {"FFN1"} if save == "nothing" else set()
    assert {NAMES[task.kind] for task in tasks} == again | {
        "route", "prefix", "scatter", "dH", "dX", "dS", "dx", "dRouter", "dGateUp", "dDown",
    }  # fmt: skip
    assert all(demand.fixed_us + demand.steps_us > 0 for demand in costs(tasks))


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("FFN1", 2 * 128 * 256 * 2048),
        ("DH", 2 * 128 * 128 * 2048),
        ("DX", 4 * 2 * 128 * 256 * 1536),
        ("DGATE_UP", 4 * 2 * 128 * 256 * 512),
        ("DDOWN", 3 * 2 * 256 * 128 * 512),
    ],
    ids=["FFN1-again", "dH", "dX-of-4-blocks", "dGateUp-of-4-blocks", "dDown-of-3-blocks"],
)
def test_a_task_costs_at_least_its_products(kind, flops):
    _, costs = costs_of(np.full(128, 512), save="nothing")
    demand = costs.demand(Task(getattr(costs.spec, kind), 0, 0))
    least_us = 1e6 * flops / (H200.roofs.dense_flops_per_s / H200.num_sms)
    assert least_us <= demand.steps_us < 3 * least_us


def test_products_of_a_whole_list_are_those_of_the_layer():
    """Nothing is left out and nothing done twice: 12·A·H·I where every row tile is full."""
    launch, costs = costs_of(np.full(128, 128))
    spec = costs.spec
    done = dict.fromkeys((spec.DH, spec.DX, spec.DGATE_UP, spec.DDOWN), 0)
    for task in launch.schedule.tasks():
        if task.kind == spec.DH:
            done[task.kind] += 128 * spec.block_i * 2048
        elif task.kind == spec.DX:
            blocks = min(spec.dx_per_task, spec.h_blocks - task.block)
            done[task.kind] += blocks * 128 * spec.block_h * 1536
        elif task.kind in done:
            blocks = costs._weight_blocks(task)
            done[task.kind] += blocks * spec.block_i * spec.block_h * 128
    per_product = 128 * 128 * 2048 * 768
    assert list(done.values()) == [per_product, 2 * per_product, 2 * per_product, per_product]
    flops = backward_work(QWEN, 2048, np.full(128, 128)).flops
    assert 2 * sum(done.values()) == flops


def test_an_expert_without_rows_is_zeroed_or_left_alone():
    load_E = np.full(128, 64)
    load_E[3] = 0
    for gradients, moved in (("bfloat16", 2), ("float32", 4), ("added", 0)):
        _, costs = costs_of(load_E, gradients=gradients)
        demand = costs.demand(Task(costs.spec.DGATE_UP, 3, 0))
        assert demand.moved_bytes == moved * 4 * 128 * 256
        assert demand.steps_us == 0


def test_a_gradient_that_is_added_to_is_read_and_written():
    demands = {}
    for gradients in ("bfloat16", "float32", "added"):
        _, costs = costs_of(np.full(128, 512), gradients=gradients)
        demands[gradients] = costs.demand(Task(costs.spec.DDOWN, 0, 0))
    area = 3 * 256 * 128
    written = demands["float32"].moved_bytes - demands["bfloat16"].moved_bytes
    read = demands["added"].moved_bytes - demands["float32"].moved_bytes
    assert (written, read) == (2 * area, 4 * area)
    fixed = [demand.fixed_us for demand in demands.values()]
    assert fixed == sorted(set(fixed))


def test_z_comes_from_memory_unless_it_was_just_made_again():
    task = Task(9, 0, 0)  # dH
    _, kept = costs_of(np.full(128, 128))
    _, again = costs_of(np.full(128, 128), save="nothing")
    assert task.kind == kept.spec.DH
    again.demand(Task(again.spec.FFN1, 0, 0))
    assert kept.demand(task).moved_bytes - again.demand(task).moved_bytes == 128 * 256 * 2


def test_predictions_are_ordered_as_the_work_is_and_stay_above_the_roofline():
    model = replace(SHAPES["OLMoE"], num_experts=16)
    load_E = make_loads(Case(model, 256, "uniform"))
    layer = model, 256, load_E, KernelConfig()
    us = {
        save: [
            predict_backward(*layer, save=save, gradients=gradients).launch_us
            for gradients in ("bfloat16", "float32", "added")
        ]
        for save in ("preactivations", "nothing")
    }
    for save, found in us.items():
        assert found == sorted(set(found))
        work = backward_work(model, 256, load_E, "bfloat16", save)
        assert found[0] > H200.roofs.least_us(work)
    assert us["nothing"][0] > us["preactivations"][0]
    replayed = predict_backward(*layer, route="replay").launch_us
    assert replayed < us["preactivations"][0]
    assert predict_backward(*layer, machine=H100).launch_us >= us["preactivations"][0]
