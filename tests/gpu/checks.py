"""What an output must be, and in which words it is told what it is instead."""

from dataclasses import replace

import torch
from torch import Tensor

import reference
from megakernel import MoEOutput
from megakernel.config import KernelConfig
from megakernel.plan.order import INTERPRETED
from tests.helpers.compare import relative_error
from tests.helpers.inputs import Inputs

# Against float64, whatever eager PyTorch achieves. Rounding h, y and the sum to bfloat16 costs
# about 2e-3; float32 has only its sums.
MOST_ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
# Tensor cores add float32 partial sums in order and truncate, where float64 truth does neither.
MOST_LOGIT_ERROR = 5e-5
# Against eager PyTorch in bfloat16, which rounds every partial sum over k: its own error is most
# of this bound.
MOST_ROW_ERROR = 3e-2


def times_eager_error(dtype: torch.dtype, device: torch.device) -> float:
    """Return how many times the error of eager PyTorch an output's may be.

    Twice, since sums run in another order; a GPU's float32 four times, for the exponential alone:
    the kernel's silu takes ex2.approx and div.full, 2 ulp each, where eager takes an exact one.
    Sums, which are all that 16-bit outputs feel, get no more room.
    """
    return 4.0 if dtype == torch.float32 and device.type == "cuda" else 2.0


def fitting(config: KernelConfig) -> KernelConfig:
    """Return the config, with tiles that the interpreter can hold where that runs it."""
    return replace(config, step=32) if INTERPRETED and config.block_h > 128 else config


def fail(text: str) -> None:
    """Fail with a text."""
    raise AssertionError(text)


def assert_gate_is_right(inputs: Inputs, out: MoEOutput) -> None:
    """Logits against float64; choice and weights against the reference on those very logits."""
    exact_TE = inputs.x_TH.double() @ inputs.router_EH.double().T
    error = relative_error(actual=out.logits_TE, expected=exact_TE)
    if not error < MOST_LOGIT_ERROR:
        fail(
            f"logits: error {error:.1e} is over {MOST_LOGIT_ERROR:.1e}; "
            + describe_difference(out.logits_TE, exact_TE)
        )
    assert_same_integers(
        "ids", out.expert_of_TK, reference.select(out.logits_TE, inputs.case.K).int()
    )
    load_E = torch.bincount(out.expert_of_TK.flatten(), minlength=inputs.case.E)
    assert_same_integers("loads", out.load_E, load_E.int())
    gate_TK = reference.weigh(out.logits_TE.double(), out.expert_of_TK, True)
    if not (out.gate_TK - gate_TK).abs().max() < 2e-6:
        fail("weights: " + describe_difference(out.gate_TK, gate_TK))


def assert_same_integers(name: str, actual: Tensor, expected: Tensor) -> None:
    """Fail with the first difference unless two integer tensors are equal."""
    if not torch.equal(actual, expected):
        fail(f"{name}: " + describe_difference(actual, expected))


def assert_within(name: str, actual: Tensor, expected: Tensor, most: float) -> float:
    """Fail, saying what differs where, if an error is over a bound; return the error."""
    error = relative_error(actual=actual, expected=expected)
    if not error <= most:  # a NaN is over every bound
        fail(
            f"{name}: error {error:.1e} is over {most:.1e}; "
            + describe_difference(actual, expected)
        )
    return error


def describe_difference(actual: Tensor, expected: Tensor) -> str:
    """Say how many values are not finite or far off, and which is the worst."""
    difference = (actual.double() - expected.double()).abs()
    largest = max(float(expected.double().abs().max()), 1e-30)
    not_finite = int((~actual.double().isfinite()).sum())
    # A hundredth of the largest value is far more than rounding in any dtype.
    far = int((difference > 1e-2 * largest).sum())
    worst = int(difference.nan_to_num(nan=torch.inf).argmax())
    place = tuple(int(index) for index in torch.unravel_index(torch.tensor(worst), actual.shape))
    return (
        f"{far} of {actual.numel()} values are off by over 1 %, {not_finite} are not finite, "
        f"worst at {place}: {actual[place].item():g} instead of {expected[place].item():g}"
    )
