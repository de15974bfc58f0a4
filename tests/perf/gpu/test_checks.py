"""What the GPU's tests and the ladder check with: right, sparing with memory, and telling."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megakernel.config import ROWS16, ROWS128, KernelConfig
from tests.gpu import checks
from tests.gpu.checks import (
    assert_gate_is_right,
    assert_within,
    describe_difference,
    fitting,
    times_eager_error,
)
from tests.gpu.layers import make_layer, truth_of_tokens
from tests.helpers.cases import SHAPES
from tests.helpers.inputs import make_inputs, run, truth

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Largest(TorchDispatchMode):
    """Remembers the largest float64 tensor that was made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run an operation and look at what it returns."""
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            self.numel = max(self.numel, out.numel())
        return out


def test_the_truth_of_some_tokens_is_that_of_all() -> None:
    inputs = make_inputs(SHAPES[0])
    out = run(inputs)
    tokens = torch.tensor([0, 7, 39])
    expected_TH = truth(inputs, out.expert_of_TK)[tokens]
    assert torch.allclose(truth_of_tokens(inputs, out, tokens), expected_TH, rtol=1e-12)


def test_one_expert_at_a_time_is_brought_to_float64() -> None:
    """Those of 8 tokens of DeepSeek-V3 would take 22 GB beside weights of as much."""
    inputs = make_layer("OLMoE", 64, CPU)
    out = run(inputs, config=fitting(ROWS16))
    with Largest() as largest:
        truth_of_tokens(inputs, out, torch.tensor([0, 1]))
    assert largest.numel <= max(
        inputs.experts.gate_up_E2IH[0].numel(), inputs.router_EH.numel(), inputs.x_TH.numel()
    )


def test_only_the_float32_of_a_gpu_gets_more_room() -> None:
    """Its exponential is an approximation; nothing else may be worse than twice eager PyTorch."""
    room = {
        (dtype, device.type): times_eager_error(dtype, device)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for device in (CPU, GPU)
    }
    assert room.pop((torch.float32, "cuda")) == 4.0
    assert set(room.values()) == {2.0}


def test_a_difference_is_counted_and_placed() -> None:
    expected = torch.ones(3, 4)
    actual = expected.clone()
    actual[1, 2], actual[2, 0] = 1.5, torch.nan
    text = describe_difference(actual, expected)
    assert text == (
        "1 of 12 values are off by over 1 %, 1 are not finite, worst at (2, 0): nan instead of 1"
    )


@pytest.mark.parametrize("bad", [1.5, torch.nan, torch.inf])
def test_an_error_over_its_bound_fails_with_the_place(bad: float) -> None:
    expected = torch.ones(3, 4)
    actual = expected.clone()
    assert assert_within("y", actual, expected, 0.0) == 0
    actual[1, 2] = bad
    with pytest.raises(AssertionError, match=r"y: error .* over 1.0e-03; .*\(1, 2\)"):
        assert_within("y", actual, expected, 1e-3)


@pytest.mark.parametrize("name", ["logits_TE", "expert_of_TK", "load_E", "gate_TK"])
def test_a_gate_that_is_wrong_in_one_place_is_seen(name: str) -> None:
    inputs = make_inputs(SHAPES[0])
    out = run(inputs)
    assert_gate_is_right(inputs, out)
    getattr(out, name).view(-1)[-1] += 1
    with pytest.raises(AssertionError, match=r"logits:|ids:|loads:|weights:"):
        assert_gate_is_right(inputs, out)


def test_a_config_for_a_gpu_is_cut_down_for_the_interpreter_alone(monkeypatch) -> None:
    assert fitting(ROWS128).step == 32 and fitting(ROWS16) is ROWS16
    monkeypatch.setattr(checks, "INTERPRETED", False)
    assert fitting(ROWS128) == ROWS128 == KernelConfig()
