"""The backward's task list: topological, complete, and the same in Python and in the kernel."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.plan.backward_spec import BackwardSpec
from megakernel.plan.schedule import Schedule, Task
from tests.helpers.plan.lists import backward_schedules
from tests.helpers.plan.orders import assert_kernel_has_order

SCHEDULES = backward_schedules()
MAKING_ROWS = backward_schedules(("given",))


def spec_of(schedule: Schedule) -> BackwardSpec:
    """Return the spec of a backward list."""
    assert isinstance(schedule.spec, BackwardSpec)
    return schedule.spec


@given(SCHEDULES)
def test_every_wait_is_for_lower_ids_and_for_all_signals_that_there_are(schedule) -> None:
    signals: Counter[int] = Counter()
    waits: dict[int, int] = {}
    for task_id, task in enumerate(schedule.tasks()):
        for counter, least in schedule.waits(task_id):
            assert signals[counter] == least  # all of them, so nothing is read half-written
            assert waits.setdefault(counter, least) == least
        for counter in schedule.signals(task):
            assert schedule.spec.ROUTE_DONE <= counter < schedule.num_counters
            signals[counter] += 1
    assert all(signals[counter] == least for counter, least in waits.items())


def blocks_of(task: Task, spec: BackwardSpec) -> Iterator[tuple[int, ...]]:
    """Yield each piece of what a task does: its block, or its rows and columns in blocks."""
    block = task.block
    if task.kind in (spec.DX, spec.SHARED_DX):
        yield from ((h,) for h in columns_of(block, spec.dx_per_task, spec.h_blocks))
    elif task.kind in (spec.DGATE_UP, spec.SHARED_DGATE_UP):
        row, column = divmod(block, spec.dx_tasks)
        first = column * spec.dx_per_task
        yield from ((row, h) for h in columns_of(first, spec.dx_per_task, spec.h_blocks))
    elif task.kind in (spec.DDOWN, spec.SHARED_DDOWN):
        row, column = divmod(block, spec.down_columns)
        first = column * spec.down_per_task
        yield from ((row, i) for i in columns_of(first, spec.down_per_task, spec.i_blocks))
    else:
        yield (block,)


def columns_of(first: int, count: int, end: int) -> range:
    """Return the blocks of a task, none past the end."""
    return range(first, min(first + count, end))


def pieces_of(schedule: Schedule) -> dict[int, tuple[range, int]]:
    """Return by kind of task the tiles that there are, and how many pieces each has."""
    spec = spec_of(schedule)
    tiles, shared = range(schedule.shared_tiles, schedule.num_tiles), range(schedule.shared_tiles)
    tokens, asked = range(schedule.token_tiles), spec.gradients
    matrices = spec.num_slices * (asked.shared_gate + asked.shared_up)
    router = -(-spec.hidden // spec.step) * asked.router + asked.router_bias
    z, h, i = spec.z_blocks, spec.h_blocks, spec.i_blocks
    bias = asked.gate_up_bias * -(-spec.z_width // spec.block_h) + asked.down_bias * h
    return {
        spec.ROUTE: (tokens, 1), spec.PREFIX: (range(spec.prefix_blocks), 1),
        spec.SCATTER: (tokens, 1), spec.SHARED_FFN1: (shared, i), spec.FFN1: (tiles, i),
        spec.SHARED_DH: (shared, i), spec.DH: (tiles, i), spec.SHARED_DX: (shared, h),
        spec.DX: (tiles, h), spec.DS: (tokens, 1),
        spec.DX_SUM: (range(schedule.combine_tiles), spec.num_column_groups),
        spec.DROUTER: (range(-(-spec.num_experts // spec.block_experts)), router),
        spec.DGATE_UP: (range(spec.num_experts), z * h),
        spec.DDOWN: (range(spec.num_experts), h * i),
        spec.SHARED_DGATE_UP: (range(matrices), i * h),
        spec.SHARED_DDOWN: (range(spec.num_slices), h * i),
        spec.DBIAS: (range(spec.num_experts), bias), spec.DTOKEN_GATE: (range(h), 1),
    }  # fmt: skip


@given(SCHEDULES)
def test_every_piece_of_work_has_one_owner(schedule) -> None:
    spec = spec_of(schedule)
    done = Counter(
        (task.kind, task.tile, *piece)
        for task in schedule.tasks()
        for piece in blocks_of(task, spec)
    )
    assert set(done.values()) <= {1}
    found = {kind: Counter(at[1] for at in done if at[0] == kind) for kind in spec.held}
    for kind, (tiles, pieces) in pieces_of(schedule).items():
        expected = dict.fromkeys(tiles, pieces) if kind in spec.held else {}
        assert found.pop(kind, {}) == expected, kind
    assert not found


@given(SCHEDULES)
def test_blocks_cover_every_row_and_column(schedule) -> None:
    spec = spec_of(schedule)
    assert spec.dx_tasks * spec.dx_per_task * spec.block_h >= spec.hidden
    assert spec.h_blocks * spec.block_h >= spec.hidden
    assert spec.i_blocks * spec.block_i >= spec.intermediate
    assert spec.down_columns * spec.down_per_task * spec.block_i >= spec.intermediate
    assert spec.z_blocks * spec.block_i >= spec.z_width
    assert spec.num_column_groups * spec.group_blocks * spec.block_h >= spec.hidden
    assert spec.z_width == spec.intermediate * (1 + spec.expert.has_gate)


@given(MAKING_ROWS, st.integers(0, 12))
def test_what_comes_before_the_row_tables_does_not_need_their_number(schedule, more) -> None:
    other = replace(schedule, num_tiles=schedule.num_tiles + more, counted=False)
    first = schedule.first_table_task
    assert first == other.first_table_task
    assert [schedule.task(n) for n in range(first)] == [other.task(n) for n in range(first)]
    assert other.num_tasks >= schedule.num_tasks  # or a worker would leave while tasks are to come
    asked = [{counter for counter, _ in schedule.waits(n)} for n in range(schedule.num_tasks)]
    assert all(schedule.spec.SCATTER_DONE not in counters for counters in asked[:first])
    assert all(schedule.spec.SCATTER_DONE in counters for counters in asked[first:])
    dispatch = {schedule.spec.ROUTE, schedule.spec.PREFIX, schedule.spec.SCATTER}
    assert {schedule.task(n).kind for n in range(first)} == dispatch


@given(SCHEDULES)
def test_dx_is_spread_evenly_over_dDown(schedule) -> None:
    spec = spec_of(schedule)
    if not spec.is_mixed:
        return
    is_sum = [
        t.kind == spec.DX_SUM for t in schedule.tasks() if t.kind in (spec.DX_SUM, spec.DDOWN)
    ]
    places = [-1, *(place for place, found in enumerate(is_sum) if found)]
    assert {after - before for before, after in pairwise(places)} == {len(is_sum) // sum(is_sum)}


@settings(max_examples=25)
@given(SCHEDULES, st.integers(1, 9), st.randoms(use_true_random=False))
def test_any_number_of_workers_finishes_in_any_interleaving(schedule, num_workers, rng) -> None:
    waits = [schedule.waits(task_id) for task_id in range(schedule.num_tasks)]
    counters: Counter[int] = Counter()
    claimed = iter(range(schedule.num_tasks))
    held = [task for task in (next(claimed, None) for _ in range(num_workers)) if task is not None]
    finished = 0
    while held:
        ready = [task for task in held if all(counters[c] >= n for c, n in waits[task])]
        assert ready, "no worker can go on"
        done = rng.choice(ready)
        counters.update(schedule.signals(schedule.task(done)))
        held.remove(done)
        held += [task for task in [next(claimed, None)] if task is not None]
        finished += 1
    assert finished == schedule.num_tasks


@settings(max_examples=12)
@given(SCHEDULES, st.integers(0, 15))
def test_the_kernel_has_the_order_that_python_has(schedule, first) -> None:
    assert_kernel_has_order(schedule, first)


@settings(max_examples=25)
@given(SCHEDULES)
def test_every_task_and_counter_has_a_name_of_its_own(schedule) -> None:
    tasks = [schedule.describe_task(n) for n in range(schedule.num_tasks)]
    places = [text.partition(" (")[2] for text in tasks]
    assert len(set(places)) == len(places)
    counters = [schedule.describe_counter(n) for n in range(schedule.num_counters)]
    names = [text.partition(" (")[2] for text in counters]
    assert len(set(names)) == len(names)
