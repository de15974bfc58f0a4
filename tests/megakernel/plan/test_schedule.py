"""The task list: topological, complete, the same in Python, in the runner and in the kernel."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megakernel.device.kernel import Routing
from megakernel.launch.run import NO_SLOTS, Layer, make_spec
from megakernel.launch.workspace import workspace_for
from megakernel.plan.rules import GateRule
from megakernel.plan.schedule import Schedule, bound_tiles
from megakernel.plan.spec import KernelSpec
from tests.helpers.cases import SHAPES, name_of
from tests.helpers.compare import assert_same_bits, relative_error
from tests.helpers.inputs import SMALL, Inputs, make_inputs, run
from tests.helpers.task_runner import TaskRunner


def spec_of(inputs: Inputs, config=SMALL) -> KernelSpec:
    """Return the spec the layer would launch with."""
    ids_TK = torch.empty(inputs.case.T, inputs.case.K, dtype=torch.int32)
    layer = Layer(
        inputs.x_TH,
        inputs.router_EH,
        inputs.experts.gate_up_E2IH,
        inputs.experts.down_EHI,
        Routing(ids_TK, ids_TK, None, None),
        NO_SLOTS,
        None,
        inputs.x_TH,
    )
    return make_spec(layer, "live", "one", GateRule(), config)


PLAIN_SPEC = spec_of(make_inputs(SHAPES[0]))


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Draw shapes, tiles and a number of row tiles, from none to many."""
    small = st.integers(1, 5)
    spec = replace(
        PLAIN_SPEC,
        route=draw(st.sampled_from(["live", "given", "replay"])),
        num_experts=draw(st.integers(1, 70)),
        hidden=draw(st.integers(1, 200)),
        intermediate=draw(st.integers(1, 100)),
        shared_width=draw(st.sampled_from([0, 24, 130])),
        block_i=draw(st.sampled_from([16, 32])),
        block_h=draw(st.sampled_from([16, 64])),
        combine_tokens=draw(st.sampled_from([1, 8, 16])),
        column_groups=draw(small),
        tile_group=draw(small),
    )
    num_tokens = draw(st.integers(1, 100))
    num_shared = Schedule(spec, num_tokens, 0).shared_tiles
    return Schedule(spec, num_tokens, num_shared + draw(st.integers(0, 12)))


@given(schedules())
def test_every_wait_is_satisfied_by_lower_ids_and_by_no_fewer_signals_than_exist(schedule):
    signals: Counter = Counter()
    waits: dict[int, int] = {}
    for task in schedule.tasks():
        for counter, target in schedule.waits(task):
            assert signals[counter] == target  # all of them, so nothing is read half-written
            waits[counter] = target
        counter = schedule.signal(task)
        assert counter is None or counter < schedule.num_counters
        signals[counter] += counter is not None
    assert all(signals[counter] == target for counter, target in waits.items())


@given(schedules())
def test_every_piece_of_work_appears_exactly_once(schedule):
    spec = schedule.spec
    done = Counter((task.kind, task.tile, task.block) for task in schedule.tasks())
    assert set(done.values()) <= {1}
    by_kind = Counter(kind for kind, _, _ in done)
    assert by_kind[spec.GATE] == schedule.token_tiles
    assert by_kind[spec.PREFIX] == (0 if spec.replay else spec.prefix_blocks)
    assert by_kind[spec.SCATTER] == (0 if spec.replay else schedule.token_tiles)
    for tile in range(schedule.num_tiles):
        ffn1 = {block for kind, at, block in done if kind == spec.FFN1 and at == tile}
        ffn2 = {block for kind, at, block in done if kind == spec.FFN2 and at == tile}
        assert ffn1 == set(range(spec.i_blocks)) and len(ffn1) * spec.block_i >= spec.intermediate
        assert ffn2 == set(range(spec.num_groups * spec.group_blocks))
    combines = {(tile, block) for kind, tile, block in done if kind == spec.COMBINE}
    groups, tiles = range(spec.num_groups), range(schedule.combine_tiles)
    assert combines == {(tile, group) for tile in tiles for group in groups}
    assert spec.num_groups * spec.group_blocks * spec.block_h >= spec.hidden
    assert schedule.combine_tiles * spec.combine_tokens >= schedule.num_tokens


@given(schedules(), st.integers(0, 12))
def test_tasks_before_the_row_tables_have_their_place_without_the_number_of_tiles(schedule, more):
    """Workers run these while they still believe in the most tiles there could be."""
    schedule = replace(schedule, spec=replace(schedule.spec, route="live"))
    other = replace(schedule, num_tiles=schedule.shared_tiles + more)
    first = schedule.first_table_task
    assert first == other.first_table_task <= schedule.num_tasks
    before = [schedule.task(n) for n in range(first)]
    assert before == [other.task(n) for n in range(first)]
    asked = {counter for task in before for counter, _ in schedule.waits(task)}
    assert schedule.spec.SCATTER_DONE not in asked


@given(schedules(), st.integers(1, 9), st.randoms(use_true_random=False))
def test_any_number_of_workers_finishes_in_any_interleaving(schedule, num_workers, rng):
    """Workers hold one claimed task each; steps go to a random worker, as on an unfair device."""
    counters: Counter = Counter()
    claimed = iter(range(schedule.num_tasks))
    held = [next(claimed, None) for _ in range(num_workers)]
    finished = 0
    while any(task is not None for task in held):
        ready = [
            worker
            for worker, task in enumerate(held)
            if task is not None
            and all(counters[c] >= n for c, n in schedule.waits(schedule.task(task)))
        ]
        assert ready, "no worker can go on"
        worker = rng.choice(ready)
        counters[schedule.signal(schedule.task(held[worker]))] += 1
        held[worker] = next(claimed, None)
        finished += 1
    assert finished == schedule.num_tasks


def test_combine_of_a_group_is_spread_over_the_second_half_of_the_next_groups_ffn2():
    spec = replace(PLAIN_SPEC, hidden=512, block_h=64, column_groups=4)
    schedule = Schedule(spec, num_tokens=64, num_tiles=10)
    tail = [task for task in schedule.tasks() if task.kind in (spec.FFN2, spec.COMBINE)]
    second = tail[20 : 20 + 20 + schedule.combine_tiles]  # 10 tiles x 2 blocks, then group 1
    kinds = [task.kind for task in second]
    assert kinds[:10] == [spec.FFN2] * 10
    assert {task.block for task in second if task.kind == spec.COMBINE} == {0}
    assert kinds[10:].count(spec.COMBINE) == schedule.combine_tiles
    assert kinds[10:14] == [spec.FFN2, spec.COMBINE] * 2


@pytest.mark.parametrize(
    ("assignments", "slots", "expected"),
    [(0, 4, 0), (3, 4, 3), (16, 4, 4), (20, 4, 5), (64, 4, 7), (64, 1, 4)],
    ids=["none", "one-row-each", "one-full", "one-over", "four-full", "one-slot"],
)
def test_bound_tiles_is_the_worst_case(assignments, slots, expected):
    assert bound_tiles(assignments, slots, 16) == expected


@given(st.lists(st.integers(0, 90), min_size=1, max_size=9))
def test_no_load_needs_more_tiles_than_the_bound(rows_of_slot):
    needed = sum(-(-rows // 16) for rows in rows_of_slot)
    assert needed <= bound_tiles(sum(rows_of_slot), len(rows_of_slot), 16)


@pytest.mark.parametrize("case", SHAPES, ids=name_of)
def test_the_runner_executes_the_list_and_agrees_with_the_kernel(case):
    inputs = make_inputs(case)
    out = run(inputs)
    spec = spec_of(inputs)
    num_tiles = int((-(-out.load_E // spec.block_rows)).sum())
    schedule = Schedule(spec, case.T, num_tiles)
    runner = TaskRunner(inputs, schedule)
    y_TH = runner.run()
    scratch = workspace_for(inputs.x_TH.device).latest
    rows = scratch.rows
    assert int(rows.num_tiles_1) == num_tiles <= scratch.schedule.num_tiles
    assert_same_bits(actual=out.expert_of_TK, expected=runner.expert_of_TK.int())
    assert_same_bits(actual=rows.row_of_TK, expected=runner.row_of_TK.int())
    for name in ("rows_of_tile", "expert_of_tile"):
        table = getattr(rows, name)[:num_tiles]
        assert_same_bits(actual=table, expected=getattr(runner, name).int())
    assert relative_error(actual=out.y_TH, expected=y_TH) < 1e-6


def test_descriptions_name_the_task_and_the_counter():
    schedule = Schedule(PLAIN_SPEC, 40, 8)
    ffn2 = next(i for i, t in enumerate(schedule.tasks()) if t.kind == PLAIN_SPEC.FFN2)
    assert schedule.describe_task(ffn2) == f"task {ffn2} (FFN2, row tile 0, H block 0)"
    counter = PLAIN_SPEC.first_tile_counter
    assert schedule.describe_counter(counter) == f"counter {counter} (FFN1 of row tile 0)"
    assert schedule.describe_counter(PLAIN_SPEC.SCATTER_DONE) == "counter 4 (scatter tasks)"
