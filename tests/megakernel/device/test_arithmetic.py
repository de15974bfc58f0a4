"""The approximate sigmoid: how far off it is, with a model of the instruction that it rests on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import TensorHandle

from megakernel.device.arithmetic import gated
from megakernel.launch.call import make_spec
from megakernel.plan.machine_ffn import activated
from megakernel.plan.rules import ExpertRule
from megakernel.plan.spec import KernelSpec
from tests.helpers.cases import SHAPES
from tests.helpers.inputs import make_inputs
from tests.helpers.specs import PLAIN_SPEC, live_call

N = 4096
TANH_ERROR = 2.0**-11  # of tanh.approx.f32, relative: PTX ISA
ACTIVATIONS = ["silu", "gelu_tanh", "clamped_swiglu"]
# How the instruction may be off: always up, always down, or anyhow.
ERRORS = {"above": 1.0, "below": -1.0, "anyhow": None}


@triton.jit
def gated_kernel(gate, up, out, N: tl.constexpr, C: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(out + index, gated(tl.load(gate + index), tl.load(up + index), C))


@pytest.fixture(params=ERRORS.values(), ids=ERRORS)
def tanh_approx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the interpreter know one instruction, and list what it was asked for."""
    asked, random = [], np.random.default_rng(0)

    def elementwise(asm, constraints, args, dtype, is_pure, pack):
        asked.append(asm)
        values = args[0].handle.data
        error = random.uniform(-1, 1, values.shape) if request.param is None else request.param
        tanh = np.tanh(values.astype(np.float64)) * (1 + TANH_ERROR * error)
        handle = TensorHandle(tanh.clip(-1, 1).astype(np.float32), tl.float32)
        return tl.core.tensor(handle, args[0].type)

    monkeypatch.setattr(tl, "inline_asm_elementwise", elementwise)
    return asked


def spec_of(activation: str) -> KernelSpec:
    """Return a spec as a GPU has it for tokens of 16 bits."""
    return replace(PLAIN_SPEC, expert=ExpertRule(activation), fast_sigmoid=True, interpreted=False)


def draw(scale: float) -> tuple[Tensor, Tensor]:
    """Return sums of gate and up."""
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, N, generator=generator)
    return gate * scale, up


def factor_of(gate: Tensor, up: Tensor, rule: ExpertRule) -> Tensor:
    """Return what the sigmoid is multiplied with."""
    if rule.activation == "clamped_swiglu":
        return gate.clamp(max=rule.limit) * (up.clamp(-rule.limit, rule.limit) + 1)
    return gate * up


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_off_by_two_to_the_minus_12_of_what_it_multiplies(activation, scale, tanh_approx):
    spec, (gate, up), out = spec_of(activation), draw(scale), torch.empty(N)
    gated_kernel[(1,)](gate, up, out, N=N, C=spec)
    assert tanh_approx == ["tanh.approx.f32 $0, $1;"]
    wide = gate.double(), up.double()
    error = (out - activated([*wide], spec.expert)).abs()
    bound = factor_of(*wide, spec.expert).abs() * (2.0**-12 + 2.0**-21)
    assert (error <= bound + 1e-30).all()
    if scale >= 1:  # nearer to zero tanh is too small to be far off
        assert error.max() > 0.2 * bound[error.argmax()]


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("activation", ACTIVATIONS[:2])
def test_h_is_nearer_to_the_truth_than_eager_pytorch_has_it(activation, scale, tanh_approx):
    """Eager rounds the sums, the activation and the product; the kernel rounds once.

    For float16, whose rounding is as fine as the approximation, this would not hold.
    """
    spec, (gate, up), out = spec_of(activation), draw(scale), torch.empty(N)
    gated_kernel[(1,)](gate, up, out, N=N, C=spec)
    truth = activated([gate.double(), up.double()], spec.expert)

    def rms(values: Tensor) -> float:
        return float((values.double() - truth).square().mean().sqrt())

    eager = activated([gate.bfloat16(), up.bfloat16()], spec.expert)
    assert rms(out.bfloat16()) <= 0.7 * rms(eager)
    assert rms(out.bfloat16()) <= 1.1 * rms(truth.bfloat16())  # adds little to the one rounding


@pytest.mark.parametrize(
    ("dtype", "allowed", "interpreted", "expected"),
    [
        (torch.bfloat16, True, False, True),
        (torch.float16, True, False, False),
        (torch.float32, True, False, False),
        (torch.bfloat16, False, False, False),
        (torch.bfloat16, True, True, False),
    ],
    ids=[
        "bfloat16",
        "float16-stays-exact",
        "float32-stays-exact",
        "switched-off",
        "interpreted-is-exact",
    ],
)
def test_where_it_is_taken(dtype, allowed, interpreted, expected):
    call = live_call(make_inputs(replace(SHAPES[0], dtype=dtype)))
    config = replace(call.rule.config, fast_sigmoid=allowed)
    spec = make_spec(replace(call, rule=replace(call.rule, config=config)))
    assert replace(spec, interpreted=interpreted).quick_sigmoid is expected
