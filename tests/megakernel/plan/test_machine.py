"""The kernel leaves in every buffer what the Python machine does, in every list and dialect."""

import pytest
from _pytest.mark import ParameterSet

from megakernel.launch.call import make_spec
from megakernel.plan.forward import SEGMENTS
from megakernel.plan.schedule import Schedule
from tests.helpers.cases import SHAPES, Case, name_of
from tests.helpers.dialects import DIALECTS, Dialect, make_dialect
from tests.helpers.inputs import make_inputs
from tests.helpers.plan.machines import (
    assert_any_order_leaves_the_same,
    assert_same_buffers,
    machine_of,
)
from tests.helpers.specs import live_call

# In `make test` one dialect of each sort; `make test-all` runs every one.
SAMPLE = {
    "live", "given-even", "given-slot", "replay-even", "odd-widths", "deepseek", "capacity-even",
    "gshard", "gpt-oss", "bfloat16", "shared-live", "rows-replay", "rows-given", "combine",
}  # fmt: skip


def sampled(dialects: list[Dialect]) -> list[ParameterSet]:
    """Return the dialects as parameters, those outside of the sample marked slow."""
    return [
        pytest.param(one, id=one.name, marks=[] if one.name in SAMPLE else pytest.mark.slow)
        for one in dialects
    ]


def test_the_sample_is_of_dialects() -> None:
    assert {one.name for one in DIALECTS} >= SAMPLE


def test_every_list_has_a_dialect() -> None:
    assert {(one.stages, one.route) for one in DIALECTS} == SEGMENTS.keys()
    assert all(one.reason for one in DIALECTS)


@pytest.mark.parametrize("dialect", sampled(DIALECTS))
def test_the_kernel_leaves_in_every_buffer_what_the_machine_does(dialect: Dialect) -> None:
    assert_same_buffers(make_dialect(dialect))


@pytest.mark.parametrize("case", SHAPES, ids=name_of)
def test_and_so_it_does_for_every_shape(case: Case) -> None:
    assert_same_buffers(live_call(make_inputs(case)))


def test_dialects_that_drop_choices_do() -> None:
    dropped = {}
    for name in ("live", "capacity", "capacity-even", "random-second", "gshard"):
        machine = machine_of(make_dialect(next(one for one in DIALECTS if one.name == name)))
        ids_TK = machine.run().routing.expert_of_TK
        assert ids_TK is not None
        dropped[name] = int((ids_TK < 0).sum())
    assert dropped.pop("live") == 0
    assert all(0 < count < 2 * 37 for count in dropped.values()), dropped


# Kinds of counter that a list waits for: where all ids are -1, there is too little to read.
NUM_AWAITED = {
    ("layer", "live"): 5,
    ("layer", "given"): 5,
    ("layer", "replay"): 3,
    ("rows", "given"): 4,
    ("rows", "replay"): 1,
}
WAITING = [one for one in DIALECTS if one.stages != "combine" and one.skip != "all"]


@pytest.mark.parametrize("dialect", sampled(WAITING))
def test_no_wait_can_be_left_out(dialect: Dialect, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker runs the list in order, and still the machine sees each missing wait."""
    call = make_dialect(dialect)
    spec, waits = make_spec(call), Schedule.waits

    def kind_of(counter: int) -> int:
        return min(counter, spec.FIRST_COLUMN_GROUP) + (counter >= spec.first_tile_counter)

    whole = machine_of(call)
    whole.run()
    kinds = {kind_of(counter) for counter in whole.awaited}
    assert len(kinds) == NUM_AWAITED[spec.stages, spec.route]
    for left_out in kinds:
        monkeypatch.setattr(
            Schedule,
            "waits",
            lambda schedule, task_id, left_out=left_out: [
                wait for wait in waits(schedule, task_id) if kind_of(wait[0]) != left_out
            ],
        )
        with pytest.raises(RuntimeError, match="without waiting for task"):
            machine_of(call).run()


@pytest.mark.parametrize("dialect", sampled(DIALECTS))
def test_any_number_of_workers_in_any_order_leaves_the_same_buffers(dialect: Dialect) -> None:
    call = make_dialect(dialect)
    assert_any_order_leaves_the_same(call)
