"""The Python machine for a call, and what it leaves beside what the kernel does."""

from random import Random

import torch
from torch import Tensor

from megakernel.launch.call import Call, make_spec
from megakernel.launch.run import kernel_arguments, launch
from megakernel.launch.workspace import workspace_for
from megakernel.plan.buffers import flatten
from megakernel.plan.machine import Machine
from megakernel.plan.machine_memory import ADDED, UNWRITTEN
from megakernel.plan.schedule import count_row_tiles
from tests.helpers.compare import assert_same_bits, relative_error

# The most that the kernel, which sums in float32, may be off the machine, which sums in float64,
# in units of the buffer's rounding step: in the root mean square of a buffer, and in the greatest.
# Logits of 20 cost most: their rounding is as much in the exponent of a weight.
MOST_STEPS, MOST_STEPS_OF_ONE = 4.0, 8.0


def machine_of(call: Call, exact: bool = False) -> Machine:
    """Return the machine for a call, told what the kernel is told."""
    spec, num_tokens = make_spec(call), len(call.tokens)
    given = None if spec.makes_rows else call.num_tiles
    num_tiles = count_row_tiles(spec, num_tokens, given)
    numbers = num_tokens, num_tiles, call.capacity, call.seed
    return Machine(call.buffers, spec, *numbers, exact=exact, is_added=bool(call.is_added))


def kernel_buffers(call: Call, names: set[str]) -> dict[str, Tensor]:
    """Launch, and return what lies in the named tensors, which held what the machine's did."""
    workspace = workspace_for(call.tokens.device)
    tensors = flatten(kernel_arguments(call, make_spec(call), workspace)[0])
    for name in names - {*(ADDED if call.is_added else ())}:
        tensors[name].fill_(torch.nan if tensors[name].is_floating_point() else UNWRITTEN)
    launch(call)
    return {name: tensors[name] for name in names}


def assert_close(
    name: str, *, actual: Tensor, expected: Tensor, written: Tensor, step: float
) -> None:
    """Fail unless the kernel wrote the same cells, and numbers within MOST_STEPS roundings."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
    assert torch.equal(~actual.isnan(), written), f"{name}: other cells are written"
    actual, expected = actual[written].double(), expected[written].double()
    if expected.count_nonzero():
        assert relative_error(actual=actual, expected=expected) <= MOST_STEPS * step, name
        greatest_error = float((actual - expected).abs().max() / expected.abs().max())
        assert greatest_error <= MOST_STEPS_OF_ONE * step, name
    else:
        assert torch.equal(actual, expected), name


def step_of(call: Call, tensor: Tensor) -> float:
    """Return a rounding step of a tensor.

    What a backward keeps in float32 comes from what was rounded to the dtype of the tokens.
    """
    step = torch.finfo(tensor.dtype).eps
    is_backward = call.rule.stages == "backward"
    return max(step, torch.finfo(call.tokens.dtype).eps) if is_backward else step


def assert_same_buffers(call: Call) -> None:
    """Fail unless machine and kernel leave the same in every buffer that they write."""
    machine = machine_of(call)
    machine.run()
    memory = machine.memory
    for name, found in kernel_buffers(call, set(memory.writer)).items():
        expected, written = memory.values[name], memory.written(name)
        if found.is_floating_point():
            step = step_of(call, found)
            assert_close(name, actual=found, expected=expected, written=written, step=step)
        else:
            assert_same_bits(actual=found, expected=expected)


def assert_any_order_leaves_the_same(call: Call) -> None:
    """Fail unless any number of workers, in any order, leaves what one of them does."""
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
