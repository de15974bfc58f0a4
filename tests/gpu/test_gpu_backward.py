"""On the device: gradients are right, the same whatever the way, and cost one launch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megakernel.config import ROWS64
from tests.gpu.checks import fitting
from tests.gpu.gradients import (
    WEIGHTS,
    Way,
    assert_buffers_are_kept,
    assert_right,
    assert_same_gradients,
    make_leaves,
    train,
    upstream,
)
from tests.gpu.layers import make_layer
from tests.gpu.test_gpu_launch import device_work
from tests.helpers.cases import SHAPES
from tests.helpers.inputs import SMALL, Inputs, make_inputs, run

# The warnings of torch's own machinery are not ours to fix.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

QWEN = "Qwen3-30B-A3B"
PLAIN = SHAPES[0]
# Those of the ladder that comes before, and some whose tiles are cut in other ways.
NAMES = ("plain", "one-token", "odd-widths", "many-experts", "empty-experts")
SMALL_LAYERS = [
    *((name, dtype) for name in NAMES for dtype in (torch.float32, torch.bfloat16)),
    ("odd-widths", torch.float16),
]


@pytest.mark.parametrize(("name", "dtype"), SMALL_LAYERS, ids=str)
def test_gradients_of_small_layers(name: str, dtype: torch.dtype, device: torch.device) -> None:
    shape = next(case for case in SHAPES if case.name == name)
    inputs = make_inputs(replace(shape, dtype=dtype), device)
    assert_right(name, inputs, train(inputs, SMALL))


def test_gradients_of_a_real_layer(device: torch.device) -> None:
    inputs = make_layer(QWEN, 512, device)
    assert_right("rows64", inputs, train(inputs, fitting(ROWS64)))


def test_a_given_routing_has_gradients_of_its_weights(device: torch.device) -> None:
    inputs = make_inputs(PLAIN, device)
    live = train(inputs, SMALL)
    given = train(inputs, SMALL, Way("given"), live)
    assert "routing.gate_TK" in given.gradients
    assert_right("given", inputs, given)
    assert_same_gradients("given", given, live, WEIGHTS)


def test_float32_buffers_are_overwritten_or_added_to(device: torch.device) -> None:
    inputs = make_inputs(replace(PLAIN, dtype=torch.bfloat16), device)
    assert_buffers_are_kept("plain", inputs, SMALL, train(inputs, SMALL))


def step_of(inputs: Inputs) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Return an output with its graph, the leaves, and the gradient that comes in."""
    leaves = make_leaves(inputs, Way(), None)
    experts = replace(inputs.experts, gate_up_E2IH=leaves[WEIGHTS[0]], down_EHI=leaves[WEIGHTS[1]])
    own = Inputs(inputs.case, leaves["x_TH"], leaves["router.weight_EH"], experts)
    return run(own).y_TH, list(leaves.values()), upstream(inputs)


def test_a_warm_backward_is_exactly_one_kernel(cuda: torch.device, tmp_path: Path) -> None:
    y_TH, leaves, dy_TH = step_of(make_inputs(PLAIN, cuda))

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y_TH, leaves, dy_TH, retain_graph=True)

    backward()
    assert device_work(backward, tmp_path / "call.json") == ["backward_kernel"]


def test_a_warm_backward_allocates_its_gradients_only(cuda: torch.device) -> None:
    y_TH, leaves, dy_TH = step_of(make_inputs(PLAIN, cuda))
    torch.autograd.grad(y_TH, leaves, dy_TH, retain_graph=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats(cuda)["allocation.all.allocated"]
    torch.autograd.grad(y_TH, leaves, dy_TH, retain_graph=True)
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats(cuda)["allocation.all.allocated"]
    assert after - before == len(leaves)


def test_a_warm_backward_never_synchronises(cuda: torch.device) -> None:
    y_TH, leaves, dy_TH = step_of(make_inputs(PLAIN, cuda))
    torch.autograd.grad(y_TH, leaves, dy_TH, retain_graph=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = torch.autograd.grad(y_TH, leaves, dy_TH, retain_graph=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(found) == len(leaves)
