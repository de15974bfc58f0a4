"""The kernel leaves in every buffer what the Python machine does, in every list and dialect."""

from random import Random

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from megakernel.launch.call import Call, make_spec
from megakernel.launch.run import kernel_arguments, launch
from megakernel.launch.workspace import workspace_for
from megakernel.plan.buffers import flatten
from megakernel.plan.forward import SEGMENTS
from megakernel.plan.machine import Machine
from megakernel.plan.machine_memory import UNWRITTEN
from megakernel.plan.schedule import Schedule, count_row_tiles
from tests.helpers.cases import SHAPES, Case, name_of
from tests.helpers.compare import assert_same_bits, relative_error
from tests.helpers.dialects import DIALECTS, Dialect, make_dialect
from tests.helpers.inputs import make_inputs
from tests.helpers.specs import live_call

# The most that the kernel, which sums in float32, may be off the machine, which sums in float64,
# in units of the buffer's rounding step: in the root mean square of a buffer, and in the greatest.
# Logits of 20 cost most: their rounding is as much in the exponent of a weight.
MOST_STEPS, MOST_STEPS_OF_ONE = 4.0, 8.0


def machine_of(call: Call) -> Machine:
    """Return the machine for a call, told what the kernel is told."""
    spec, num_tokens = make_spec(call), len(call.tokens)
    given = None if spec.makes_rows else call.num_tiles
    num_tiles = count_row_tiles(spec, num_tokens, given)
    return Machine(call.buffers, spec, num_tokens, num_tiles, call.capacity, call.seed)


def kernel_buffers(call: Call, names: set[str]) -> dict[str, Tensor]:
    """Launch, and return what lies in the named tensors, which were filled as the machine's."""
    workspace = workspace_for(call.tokens.device)
    tensors = flatten(kernel_arguments(call, make_spec(call), workspace)[0])
    for name in names:
        tensors[name].fill_(torch.nan if tensors[name].is_floating_point() else UNWRITTEN)
    launch(call)
    return {name: tensors[name] for name in names}


def assert_close(name: str, *, actual: Tensor, expected: Tensor, written: Tensor) -> None:
    """Fail unless the kernel wrote the same cells, and numbers within MOST_STEPS roundings."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
    assert torch.equal(~actual.isnan(), written), f"{name}: other cells are written"
    step = torch.finfo(actual.dtype).eps
    actual, expected = actual[written].double(), expected[written].double()
    if expected.count_nonzero():
        assert relative_error(actual=actual, expected=expected) <= MOST_STEPS * step, name
        greatest_error = float((actual - expected).abs().max() / expected.abs().max())
        assert greatest_error <= MOST_STEPS_OF_ONE * step, name
    else:
        assert torch.equal(actual, expected), name


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


def assert_same_buffers(call: Call) -> None:
    """Fail unless machine and kernel leave the same in every buffer that they write."""
    machine = machine_of(call)
    machine.run()
    memory = machine.memory
    for name, found in kernel_buffers(call, set(memory.writer)).items():
        expected, written = memory.values[name], memory.written(name)
        if found.is_floating_point():
            assert_close(name, actual=found, expected=expected, written=written)
        else:
            assert_same_bits(actual=found, expected=expected)


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
    alone = machine_of(call)
    alone.run()
    for num_workers in (2, 7, 50):
        machine = machine_of(call)
        machine.run(num_workers, Random(num_workers))
        assert sorted(machine.finished) == alone.finished
        for name in machine.memory.writer:
            assert_same_bits(
                actual=machine.memory.values[name], expected=alone.memory.values[name]
            )
