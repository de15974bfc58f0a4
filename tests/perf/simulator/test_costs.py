"""The cost model's parts, each against what it claims to follow."""

from dataclasses import astuple, replace

import numpy as np
import pytest

from megakernel.config import KernelConfig
from megakernel.plan.protocol import FORWARD_NAMES, NAMES
from megakernel.plan.schedule import Task
from perf.problems.cases import SHAPES, TINY
from perf.simulator.costs import COMMON_NAMES, H200, MeasuredCosts, Product, RooflineCosts
from perf.simulator.predict import make_launch

QWEN = SHAPES["Qwen3-30B-A3B"]


def costs_of(model=QWEN, load_E=None, route="live", **changes):
    load_E = np.full(model.num_experts, 64) if load_E is None else load_E
    num_tokens = -(-int(load_E.sum()) // model.top_k)
    config = replace(KernelConfig(), **changes)
    launch = make_launch(model, num_tokens, load_E, config, route)
    spec = launch.schedule.spec
    return launch, RooflineCosts(spec, num_tokens, launch.tiles, launch.num_workers)


def test_every_kind_of_task_costs_something():
    launch, costs = costs_of()
    tasks = list(launch.schedule.tasks())
    demands = costs(tasks)
    assert {NAMES[task.kind] for task in tasks} == set(COMMON_NAMES)
    assert all(demand.fixed_us + demand.steps_us > 0 for demand in demands)


def test_a_full_tile_costs_at_least_its_product_and_its_reads():
    _, costs = costs_of(load_E=np.full(128, 128))
    task = Task(costs.spec.FFN1, 0, 0)
    rows, columns = costs.spec.gate_up.acc_tile
    flops = 2 * rows * columns * 2048
    least_us = 1e6 * flops / (H200.roofs.dense_flops_per_s / costs.num_workers)
    read_us = 1e6 * (rows + columns) * 2048 * 2 / (H200.roofs.l2_bytes_per_s / costs.num_workers)
    assert costs.demand(task).steps_us >= max(least_us, read_us) * 0.999


def test_weights_come_from_memory_once_while_they_stay_cached():
    _, costs = costs_of(load_E=np.full(128, 256))
    first, again = (costs.demand(Task(costs.spec.FFN1, tile, 0)) for tile in (0, 1))
    weight_bytes = costs.spec.gate_up.acc_tile[1] * 2048 * 2
    assert first.moved_bytes - again.moved_bytes == weight_bytes * costs.spec.i_per_task


def test_weights_come_from_memory_again_after_a_cache_full_of_others():
    _, costs = costs_of()
    costs.read(("up", 0, 0), 1.0)
    costs.write(("h", 0), H200.cache_bytes + 1)
    assert costs.read(("up", 0, 0), 1.0) == 1.0
    assert costs.read(("up", 0, 0), 1.0) == 0.0


def test_a_tile_of_fitting_height_costs_its_own_product():
    """With an L2 so fast that the product is what a tile waits for."""
    _, costs = costs_of(load_E=np.full(128, 70))
    roofs = replace(H200.roofs, l2_bytes_per_s=1e15)
    machine = replace(H200, roofs=roofs, latency_us=0.0, sm_bytes_per_s=1e15)
    tall, fitting = (
        replace(costs, machine=machine, heights=heights)
        .gemm(Product(64, 256, 2048, 1, 0.0), 0, 0, 0, 132)
        .steps_us
        for heights in ((128,), (16, 32, 64, 128))
    )
    assert fitting == pytest.approx(tall / 2)


def test_a_half_empty_tile_costs_half_a_product_where_the_kernel_does_so():
    whole, half = (
        costs_of(load_E=np.full(128, 64), half_tails=low)[1].heights for low in (False, True)
    )
    assert whole == (128,) and half == (64, 128)


def test_blocks_of_one_task_share_lookups_and_the_fill_of_the_pipeline():
    costs = [costs_of(load_E=np.full(128, 512), blocks_per_task=n)[1] for n in (1, 3)]
    one, three = (cost.demand(Task(cost.spec.FFN1, 0, 0)) for cost in costs)
    assert three.steps_us == pytest.approx(3 * one.steps_us)
    shared_us = H200.table_us + H200.latency_us
    assert three.fixed_us - shared_us == pytest.approx(3 * (one.fixed_us - shared_us))


def test_what_is_done_ahead_and_by_one_instruction_costs_less():
    def fixed_us(kind: str, **changes: bool) -> float:
        costs = costs_of(load_E=np.full(128, 64), **changes)[1]
        return costs.demand(Task(getattr(costs.spec, kind), 0, 0)).fixed_us

    for kind in ("FFN1", "FFN2"):
        saved_us = fixed_us(kind, look_ahead=False) - fixed_us(kind)
        assert saved_us == pytest.approx(H200.table_us)
    quicker_us = fixed_us("FFN1", fast_sigmoid=False) - fixed_us("FFN1")
    assert quicker_us == pytest.approx(H200.activate_us - H200.quick_activate_us)


def test_loading_all_choices_at_once_makes_a_combine_shorter():
    _, costs = costs_of()
    one_by_one = replace(costs, choices_in_flight=1)
    assert one_by_one.combine().steps_us == 4 * 8 * 2 * H200.latency_us
    assert costs.combine().steps_us < one_by_one.combine().steps_us / 4


@pytest.mark.parametrize(
    ("top_k", "rounds"),
    [(1, 1), (8, 1), (9, 2), (17, 3)],
    ids=["one choice", "all at once", "one too many", "two loops and a rest"],
)
def test_a_combine_loads_as_many_choices_at_once_as_the_kernel(top_k, rounds):
    model = replace(QWEN, top_k=top_k)
    _, costs = costs_of(model, np.full(128, 1))  # so few tokens that only latency counts
    assert costs.combine().steps_us == pytest.approx(4 * rounds * 2 * H200.latency_us)


def test_more_stages_hide_more_of_the_gates_latency():
    (_, two), (_, three) = (costs_of(num_stages=stages) for stages in (2, 3))
    assert three.route_us() < two.route_us()


def test_a_replayed_gate_selects_nothing_and_costs_less():
    (_, live), (_, replay), (_, given) = (costs_of(route=r) for r in ("live", "replay", "given"))
    assert live.route_us() > replay.route_us() > given.route_us()


def test_measured_costs_are_looked_up_by_kind():
    costs = MeasuredCosts({name: float(us) for us, name in enumerate(FORWARD_NAMES, start=1)})
    demands = costs([Task(kind, 0) for kind in range(len(FORWARD_NAMES))])
    assert [demand.fixed_us for demand in demands] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_measured_costs_must_know_every_kind():
    with pytest.raises(ValueError, match=r"us_of_kind must have every kind.*'combine'"):
        MeasuredCosts({name: 1.0 for name in FORWARD_NAMES[:-1]})


def test_a_tiny_model_has_costs_too():
    launch, costs = costs_of(TINY, np.full(8, 4), block_rows=16)
    demands = costs(list(launch.schedule.tasks()))
    assert np.isfinite([astuple(demand) for demand in demands]).all()
