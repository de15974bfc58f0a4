"""Every kind of expert and layout of its weights, against the float64 token loop."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import reference
from megakernel import Experts, Placement, Router, moe, moe_routed, prepare_replay
from reference import ExpertKind
from tests.helpers.compare import assert_refused, assert_same_bits, relative_error
from tests.helpers.inputs import SMALL

T, K, E, H, I = 19, 2, 5, 72, 40
SUM_TOLERANCE = 2e-6  # float32 sums of 72 and 40 products


@dataclass(frozen=True)
class Kind:
    """One kind of expert, with the reason it is there."""

    name: str
    rule: ExpertKind
    reason: str
    biased: bool = False
    transposed: bool = False
    H: int = H
    I: int = I


GPT_OSS = ExpertKind("clamped_swiglu", interleaved=True)
KINDS = [
    Kind("gpt-oss", GPT_OSS, "everything at once", biased=True, transposed=True),
    Kind("gpt-oss odd", GPT_OSS, "no TMA, masks everywhere", True, True, H=37, I=19),
    Kind("clamped", ExpertKind("clamped_swiglu", limit=0.5), "most values clamped"),
    Kind("interleaved", ExpertKind(interleaved=True), "rows alternate, depth along rows"),
    Kind("transposed", ExpertKind(), "gate and up side by side, depth down", transposed=True),
    Kind("transposed odd", ExpertKind(), "the same without TMA", transposed=True, H=37, I=19),
    Kind("biased", ExpertKind(), "biases of stacked gate and up", biased=True),
    Kind("Nemotron-H", ExpertKind("relu2", has_gate=False), "no gate"),
    Kind("no gate, biased", ExpertKind("gelu", has_gate=False), "bias of I", True, True),
    Kind("GeGLU", ExpertKind("gelu"), "exact GeLU"),
    Kind("GeGLU by tanh", ExpertKind("gelu_tanh"), "GeLU as Gemma has it"),
    Kind("ReGLU", ExpertKind("relu"), "exact zeros"),
]
all_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@dataclass(frozen=True, eq=False)
class Inputs:
    x_TH: Tensor
    router_EH: Tensor
    experts: Experts
    biases: dict[str, Tensor]


def make_inputs(kind: Kind, dtype: torch.dtype = torch.float32) -> Inputs:
    """Draw tensors of a kind; large enough that clamps and activations matter."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    width, height = kind.H, kind.I * (2 if kind.rule.has_gate else 1)
    gate_up = draw(E, height, width, scale=2 * width**-0.5)
    down = draw(E, width, kind.I, scale=kind.I**-0.5)
    if kind.transposed:
        gate_up, down = gate_up.mT.contiguous().mT, down.mT.contiguous().mT
    biases = {}
    if kind.biased:
        biases = {"gate_up_bias_E2I": draw(E, height), "down_bias_EH": draw(E, width)}
    experts = Experts(
        gate_up, down, **biases, activation=kind.rule.activation, limit=kind.rule.limit,
        has_gate=kind.rule.has_gate, interleaved=kind.rule.interleaved, transposed=kind.transposed,
    )  # fmt: skip
    return Inputs(draw(T, width), draw(E, width), experts, biases)


def truth(inputs: Inputs, kind: Kind, ids_TK: Tensor) -> Tensor:
    """Return the float64 output for given ids, with float64 weights."""
    logits_TE = inputs.x_TH.double() @ inputs.router_EH.double().T
    biases = {name: bias.double() for name, bias in inputs.biases.items()}
    return reference.moe_by_token(
        inputs.x_TH, ids_TK, reference.weigh(logits_TE, ids_TK, True),
        inputs.experts.gate_up_E2IH, inputs.experts.down_EHI, kind=kind.rule, **biases,
    )  # fmt: skip


@all_kinds
def test_output_agrees_with_float64(kind: Kind):
    inputs = make_inputs(kind)
    out = moe(inputs.x_TH, inputs.router_EH, inputs.experts, Router(K), config=SMALL)
    expected = truth(inputs, kind, out.expert_of_TK)
    assert relative_error(actual=out.y_TH, expected=expected) < SUM_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[7]], ids=lambda kind: kind.name)
def test_16_bit_error_is_no_larger_than_eager_pytorchs_own(kind: Kind, dtype: torch.dtype):
    inputs = make_inputs(kind, dtype)
    out = moe(inputs.x_TH, inputs.router_EH, inputs.experts, Router(K), config=SMALL)
    eager = reference.moe_by_expert(
        inputs.x_TH, out.expert_of_TK, out.gate_TK.to(dtype),
        inputs.experts.gate_up_E2IH, inputs.experts.down_EHI, kind=kind.rule, **inputs.biases,
    )  # fmt: skip
    expected = truth(inputs, kind, out.expert_of_TK)
    error = relative_error(actual=out.y_TH, expected=expected)
    assert error <= relative_error(actual=eager, expected=expected)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[7]], ids=lambda kind: kind.name)
def test_bits_do_not_depend_on_route_workers_or_placement(kind: Kind):
    inputs = make_inputs(kind)
    call = (inputs.x_TH, inputs.router_EH, inputs.experts, Router(K))
    live = moe(*call, config=SMALL)
    one_worker = replace(SMALL, num_workers=1)
    twice = Placement(torch.tensor([4, 3, 2, 1, 0, 0, -1, 4]))
    replay = prepare_replay(live.expert_of_TK, E, config=SMALL)
    given = moe_routed(*call[:1], live.expert_of_TK, live.gate_TK, inputs.experts, config=SMALL)
    for other_TH in (
        given,
        moe(*call, config=one_worker).y_TH,
        moe(*call, config=SMALL, placement=twice).y_TH,
        moe(*call, config=SMALL, replay=replay).y_TH,
    ):
        assert_same_bits(actual=other_TH, expected=live.y_TH)


def test_the_layout_in_memory_does_not_change_what_is_computed():
    """The same numbers, with the depth along rows and down columns; nothing is copied."""
    upright = make_inputs(replace(KINDS[0], transposed=False))
    gate_up, down = upright.experts.gate_up_E2IH, upright.experts.down_EHI
    swapped = replace(
        upright.experts,
        gate_up_E2IH=gate_up.mT.contiguous().mT,
        down_EHI=down.mT.contiguous().mT,
        transposed=True,
    )
    assert swapped.gate_up.lies_upright and swapped.down.lies_upright
    first, second = (
        moe(upright.x_TH, upright.router_EH, experts, Router(K), config=SMALL).y_TH
        for experts in (upright.experts, swapped)
    )
    assert relative_error(actual=first, expected=second) < SUM_TOLERANCE


def test_the_down_bias_is_weighted_with_its_expert():
    """With zero weights only the bias is left: y = sum of gate · bias, by hand."""
    bias_EH = torch.arange(1.0, E + 1)[:, None].expand(E, H).contiguous()
    experts = Experts(torch.zeros(E, 2 * I, H), torch.zeros(E, H, I), down_bias_EH=bias_EH)
    ids_TK, gate_TK = torch.tensor([[0, 3], [4, -1]]), torch.tensor([[0.5, 0.25], [2.0, 9.0]])
    y_TH = moe_routed(torch.ones(2, H), ids_TK, gate_TK, experts, config=SMALL)
    assert torch.equal(y_TH, torch.tensor([[1.5], [10.0]]).expand(2, H))


@pytest.mark.parametrize("activation", ["clamped_swiglu", "relu", "gelu", "gelu_tanh", "silu"])
def test_a_nan_reaches_the_output_whatever_the_activation(activation: str):
    experts = Experts(torch.ones(E, 2 * I, H), torch.ones(E, H, I), activation=activation)
    x_TH = torch.ones(2, H)
    x_TH[1, 0] = torch.nan
    ids_TK = torch.zeros(2, 1, dtype=torch.int32)
    y_TH = moe_routed(x_TH, ids_TK, torch.ones(2, 1), experts, config=SMALL)
    assert y_TH[0].isfinite().all() and y_TH[1].isnan().all()


def test_torch_compile_carries_every_field_of_the_experts():
    inputs = make_inputs(KINDS[0])
    compiled = torch.compile(
        lambda x_TH: moe(x_TH, inputs.router_EH, inputs.experts, Router(K), config=SMALL).y_TH,
        fullgraph=True,
        backend="aot_eager",
    )
    expected = moe(inputs.x_TH, inputs.router_EH, inputs.experts, Router(K), config=SMALL).y_TH
    assert_same_bits(actual=compiled(inputs.x_TH), expected=expected)


def make(**options: object) -> Experts:
    return Experts(torch.zeros(E, 2 * I, H), torch.zeros(E, H, I), **options)  # type: ignore


REFUSED = {
    "unknown activation": (lambda: make(activation="tanh"), "activation.*silu.*tanh"),
    "limit zero": (lambda: make(limit=0.0), "limit.*positive.*0"),
    "clamped without gate": (
        lambda: make(activation="clamped_swiglu", has_gate=False), "has_gate.*True.*False"
    ),
    "gate rows without a gate": (
        lambda: make(has_gate=False), r"gate_up_E2IH.*\(5, 40, 72\).*\(5, 80, 72\)"
    ),
    "bias of another shape": (
        lambda: make(gate_up_bias_E2I=torch.zeros(E, I)), r"gate_up_bias_E2I.*\(5, 80\).*\(5, 40\)"
    ),
    "integer bias": (
        lambda: make(down_bias_EH=torch.zeros(E, H).int()), "down_bias_EH.*float.*int32"
    ),
    "a stride of two": (
        lambda: Experts(torch.zeros(E, 2 * I, 2 * H)[:, :, ::2], torch.zeros(E, H, I)),
        r"gate_up_E2IH must be contiguous.*strides",
    ),
    "transposed without saying so": (
        lambda: Experts(torch.zeros(E, H, 2 * I).mT, torch.zeros(E, H, I)),
        r"gate_up_E2IH must be contiguous.*strides",
    ),
    "transposed only in words": (
        lambda: Experts(torch.zeros(E, 2 * I, H), torch.zeros(E, H, I), transposed=True),
        r"gate_up_E2IH must be contiguous after \.mT when transposed.*strides",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_an_expert_is_refused_with_argument_rule_and_value(name: str):
    call, message = REFUSED[name]
    assert_refused(call, message)
