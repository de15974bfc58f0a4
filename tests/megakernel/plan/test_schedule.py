"""The task list: topological, complete, and the same in Python and in the kernel."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.plan.forward import SEGMENTS
from megakernel.plan.order import plain
from megakernel.plan.schedule import Schedule, Task, bound_tiles
from megakernel.plan.spec import KernelSpec
from tests.helpers.plan.orders import assert_kernel_has_order
from tests.helpers.specs import PLAIN_SPEC


@st.composite
def schedules(draw: st.DrawFn, lists=tuple(SEGMENTS)) -> Schedule:
    """Draw a list, shapes, tiles and a number of row tiles, from none to many."""
    small = st.integers(1, 5)
    stages, route = draw(st.sampled_from(lists))
    widths = [0] if stages == "combine" else [0, 24, 70]
    spec = replace(
        PLAIN_SPEC,
        stages=stages,
        route=route,
        num_experts=draw(st.integers(1, 70)),
        hidden=draw(st.integers(1, 200)),
        intermediate=draw(st.integers(10, 100)),
        shared_width=draw(st.sampled_from(widths)),
        block_i=draw(st.sampled_from([16, 32])),
        block_h=draw(st.sampled_from([16, 64])),
        combine_tokens=draw(st.sampled_from([1, 8, 16])),
        column_groups=draw(small),
        tile_group=draw(small),
        blocks_per_task=draw(small),
        least_tasks=draw(st.sampled_from([1, 20])),
    )
    num_tokens = draw(st.integers(1, 80))
    num_shared = Schedule(spec, num_tokens, 0).shared_tiles
    return Schedule(spec, num_tokens, num_shared + draw(st.integers(0, 12)))


MAKING_ROWS = tuple(key for key in SEGMENTS if key[1] != "replay")


@given(schedules())
def test_every_wait_is_satisfied_by_lower_ids_and_by_no_fewer_signals_than_exist(schedule):
    signals: Counter = Counter()
    waits: dict[int, int] = {}
    for task_id, task in enumerate(schedule.tasks()):
        for counter, target in schedule.waits(task_id):
            assert signals[counter] == target  # all of them, so nothing is read half-written
            waits[counter] = target
        counter = schedule.signal(task)
        assert counter is None or counter < schedule.num_counters
        signals[counter] += counter is not None
    assert all(signals[counter] == target for counter, target in waits.items())


def blocks_of(task: Task, schedule: Schedule) -> range:
    """Return the blocks that a task does one after the other."""
    spec, end = schedule.spec, task.block + 1
    if task.kind == spec.FFN1:
        end = plain.ffn1_end_of(task.block, schedule.size, spec)
    elif task.kind in (spec.FFN2, spec.SHARED_FFN2):
        end = plain.ffn2_end_of(task.block, schedule.size, spec)
    return range(task.block, end)


@given(schedules())
def test_every_piece_of_work_appears_exactly_once(schedule):
    spec, held = schedule.spec, schedule.spec.held
    done = Counter(
        (task.kind, task.tile, block)
        for task in schedule.tasks()
        for block in blocks_of(task, schedule)
    )
    assert set(done.values()) <= {1} and {kind for kind, _, _ in done} <= held
    by_kind = Counter(kind for kind, _, _ in done)
    assert by_kind[spec.ROUTE] == schedule.token_tiles * (spec.ROUTE in held)
    assert by_kind[spec.PREFIX] == spec.prefix_blocks * spec.makes_rows
    assert by_kind[spec.SCATTER] == schedule.token_tiles * spec.makes_rows
    for tile in range(schedule.num_tiles if spec.has_ffn else 0):
        shared = tile < schedule.shared_tiles
        own = (spec.SHARED_FFN1, spec.SHARED_FFN2) if shared else (spec.FFN1, spec.FFN2)
        blocks = [{block for kind, at, block in done if kind == k and at == tile} for k in own]
        assert blocks[0] == set(range(spec.i_blocks))
        assert blocks[1] == set(range(spec.h_blocks))
    groups, tiles = range(spec.num_column_groups), range(schedule.combine_tiles)
    combines = {(tile, block) for kind, tile, block in done if kind == spec.COMBINE}
    assert combines == {(tile, group) for tile in tiles for group in groups if spec.has_combine}
    by_ffn = 2 * schedule.num_tiles if spec.has_ffn else 0
    assert by_ffn == len({(kind, tile) for kind, tile, _ in done if 3 <= kind <= 6})


@given(schedules())
def test_blocks_and_tiles_cover_every_column_and_token(schedule):
    spec = schedule.spec
    assert spec.i_blocks * spec.block_i >= spec.intermediate
    assert spec.num_column_groups * spec.group_blocks * spec.block_h >= spec.hidden
    assert schedule.combine_tiles * spec.combine_tokens >= schedule.num_tokens
    assert schedule.token_tiles * spec.block_tokens >= schedule.num_tokens
    slices = -(-spec.shared_width // spec.intermediate)
    assert schedule.shared_tiles == slices * -(-schedule.num_tokens // spec.block_rows)


@given(schedules(MAKING_ROWS), st.integers(0, 12))
def test_tasks_before_the_row_tables_have_their_place_without_the_number_of_tiles(schedule, more):
    """Workers run these while they still believe in the most tiles there could be."""
    other = replace(schedule, num_tiles=schedule.shared_tiles + more)
    first, spec = schedule.first_table_task, schedule.spec
    assert first == other.first_table_task <= schedule.num_tasks
    assert [schedule.task(n) for n in range(first)] == [other.task(n) for n in range(first)]
    asked = [{counter for counter, _ in schedule.waits(n)} for n in range(schedule.num_tasks)]
    assert all(spec.SCATTER_DONE not in counters for counters in asked[:first])
    assert all(spec.SCATTER_DONE in counters for counters in asked[first:])
    needing = {spec.FFN1, spec.FFN2, spec.COMBINE}
    assert all(schedule.task(n).kind not in needing for n in range(first))


@given(schedules(MAKING_ROWS), st.integers(0, 12))
def test_before_the_row_tiles_are_counted_the_list_is_the_longest_there_can_be(schedule, more):
    """Or a worker would leave while tasks are to come: wide tasks are fewer than narrow ones."""
    room = replace(schedule, num_tiles=schedule.num_tiles + more, counted=False)
    assert room.num_tasks >= schedule.num_tasks
    first = schedule.first_table_task
    assert first == room.first_table_task
    assert [schedule.task(n) for n in range(first)] == [room.task(n) for n in range(first)]


def wide_spec(route: str, least_tasks: int) -> KernelSpec:
    """Return eight blocks of I, two groups of four of H, tasks of at most three."""
    return replace(
        PLAIN_SPEC, route=route, intermediate=8 * PLAIN_SPEC.block_i, column_groups=2,
        hidden=8 * PLAIN_SPEC.block_h, blocks_per_task=3, least_tasks=least_tasks,
    )  # fmt: skip


def test_room_for_tiles_enough_for_wide_tasks_still_counts_narrow_ones():
    """Nine tiles are too few for wide tasks, and have more of them than ten."""
    spec = wide_spec("live", least_tasks=30)
    nine, ten = (Schedule(spec, 40, tiles).num_tasks for tiles in (9, 10))
    assert ten < nine <= Schedule(spec, 40, 10, counted=False).num_tasks


def test_beside_a_shared_expert_tasks_stay_narrow():
    spec = replace(wide_spec("replay", least_tasks=1), shared_width=16)
    tasks = list(Schedule(spec, num_tokens=40, num_tiles=10).tasks())
    assert sum(task.kind == spec.FFN1 for task in tasks) == 8 * (10 - 3)


@pytest.mark.parametrize(
    ("least_tasks", "ffn1", "ffn2"),
    [(1, [3, 3, 2], [[2, 2], [1, 1, 1, 1]]), (31, [1] * 8, [[1] * 4] * 2), (30, [3, 3, 2], None)],
    ids=["several blocks", "too few tasks would be left", "just enough are left for FFN1"],
)
def test_tasks_take_several_blocks_where_enough_of_them_are_left(least_tasks, ffn1, ffn2):
    """Ten tiles, eight blocks of I, two groups of four blocks of H; the last group ends evenly."""
    spec = wide_spec("replay", least_tasks)
    schedule = Schedule(spec, num_tokens=40, num_tiles=10)
    sizes = {
        kind: [len(blocks_of(task, schedule)) for task in schedule.tasks()
               if (task.kind, task.tile) == (kind, 0)]
        for kind in (spec.FFN1, spec.FFN2)
    }  # fmt: skip
    assert sizes[spec.FFN1] == ffn1
    first, last = ffn2 or [[1] * 4] * 2  # 20 tasks of several blocks would be too few
    assert sizes[spec.FFN2] == first + last


@given(schedules(), st.integers(1, 9), st.randoms(use_true_random=False))
def test_any_number_of_workers_finishes_in_any_interleaving(schedule, num_workers, rng):
    """Workers hold one claimed task each; steps go to a random worker, as on an unfair device."""
    waits = [schedule.waits(task_id) for task_id in range(schedule.num_tasks)]
    counters: Counter = Counter()
    claimed = iter(range(schedule.num_tasks))
    held = [next(claimed, None) for _ in range(num_workers)]
    finished = 0
    while any(task_id is not None for task_id in held):
        ready = [
            worker
            for worker, task_id in enumerate(held)
            if task_id is not None and all(counters[c] >= least for c, least in waits[task_id])
        ]
        assert ready, "no worker can go on"
        worker = rng.choice(ready)
        counters[schedule.signal(schedule.task(held[worker]))] += 1
        held[worker] = next(claimed, None)
        finished += 1
    assert finished == schedule.num_tasks


@settings(max_examples=25)
@given(schedules(), st.integers(0, 15))
def test_the_kernel_has_the_order_that_python_has(schedule, first):
    assert_kernel_has_order(schedule, first)


def test_combine_of_a_group_is_spread_over_the_second_half_of_the_next_groups_ffn2():
    spec = replace(PLAIN_SPEC, hidden=512, block_h=64, column_groups=4, blocks_per_task=1)
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


def test_descriptions_name_the_task_and_the_counter():
    schedule = Schedule(PLAIN_SPEC, 40, 8)
    ffn2 = next(i for i, t in enumerate(schedule.tasks()) if t.kind == PLAIN_SPEC.FFN2)
    assert schedule.describe_task(ffn2) == f"task {ffn2} (FFN2, row tile 0, H block 0)"
    counter = PLAIN_SPEC.first_tile_counter
    assert schedule.describe_counter(counter) == f"counter {counter} (FFN1 of row tile 0)"
    assert schedule.describe_counter(PLAIN_SPEC.SCATTER_DONE) == "counter 4 (scatter tasks)"
