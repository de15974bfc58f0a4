"""The shared expert inside the launch: any width, weighed or not, whatever the routing."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import reference
from megakernel import Experts, Placement, Router, SharedExpert, moe, moe_routed, prepare_replay
from reference import ExpertKind
from tests.helpers.compare import assert_refused, assert_same_bits, relative_error
from tests.helpers.inputs import SMALL

T, K, E, H, I = 21, 2, 5, 40, 24


@dataclass(frozen=True)
class Kind:
    """One shared expert, with the reason it is there."""

    name: str
    J: int
    reason: str
    has_token_gate: bool = False
    rule: ExpertKind = ExpertKind()  # noqa: RUF009  (frozen)


KINDS = [
    Kind("DeepSeek-V3", 24, "one slice, weight 1"),
    Kind("Qwen2-MoE", 96, "four slices, weighed per token", has_token_gate=True),
    Kind("two and a half slices", 60, "the last slice is short", has_token_gate=True),
    Kind("narrow", 8, "narrower than a routed expert"),
    Kind("odd", 37, "no TMA, a short last slice"),
    Kind("no gate", 48, "up rows alone", rule=ExpertKind("relu2", has_gate=False)),
    Kind("beside clamped", 48, "clamped too, never interleaved", True,
         ExpertKind("clamped_swiglu", interleaved=True)),
]  # fmt: skip
all_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@dataclass(frozen=True, eq=False)
class Inputs:
    x_TH: Tensor
    router_EH: Tensor
    experts: Experts


def make_inputs(kind: Kind, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 2 * shape[-1] ** -0.5).to(dtype)

    shared = SharedExpert(
        draw(kind.J, H) if kind.rule.has_gate else None,
        draw(kind.J, H),
        draw(H, kind.J),
        draw(1, H) if kind.has_token_gate else None,
    )
    experts = Experts(
        draw(E, I * (2 if kind.rule.has_gate else 1), H), draw(E, H, I),
        activation=kind.rule.activation, has_gate=kind.rule.has_gate,
        interleaved=kind.rule.interleaved, shared=shared,
    )  # fmt: skip
    return Inputs(draw(T, H) * H**0.5, draw(E, H), experts)


def truth(inputs: Inputs, kind: Kind, ids_TK: Tensor, gate_TK: Tensor) -> Tensor:
    experts, shared = inputs.experts, inputs.experts.shared
    assert shared is not None
    weights = (shared.gate_JH, shared.up_JH, shared.down_HJ, shared.token_gate_1H)
    wide = [weight if weight is None else weight.double() for weight in weights]
    routed_TH = reference.moe_by_token(
        inputs.x_TH, ids_TK, gate_TK, experts.gate_up_E2IH, experts.down_EHI, kind=kind.rule
    )
    return routed_TH + reference.shared_ffn(inputs.x_TH.double(), *wide, kind=kind.rule)


@all_kinds
def test_output_agrees_with_float64(kind: Kind):
    inputs = make_inputs(kind)
    out = moe(inputs.x_TH, inputs.router_EH, inputs.experts, Router(K), config=SMALL)
    expected = truth(inputs, kind, out.expert_of_TK, out.gate_TK)
    assert relative_error(actual=out.y_TH, expected=expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_error_is_no_larger_than_eager_pytorchs_own(dtype: torch.dtype):
    kind = KINDS[1]
    inputs = make_inputs(kind, dtype)
    experts, shared = inputs.experts, inputs.experts.shared
    assert shared is not None
    out = moe(inputs.x_TH, inputs.router_EH, experts, Router(K), config=SMALL)
    eager = reference.moe_by_expert(
        inputs.x_TH, out.expert_of_TK, out.gate_TK.to(dtype), experts.gate_up_E2IH,
        experts.down_EHI,
    ) + reference.shared_ffn(
        inputs.x_TH, shared.gate_JH, shared.up_JH, shared.down_HJ, shared.token_gate_1H
    )  # fmt: skip
    expected = truth(inputs, kind, out.expert_of_TK, out.gate_TK)
    error = relative_error(actual=out.y_TH, expected=expected)
    assert error <= relative_error(actual=eager, expected=expected)


@pytest.mark.parametrize("kind", KINDS[1:3], ids=lambda kind: kind.name)
def test_bits_do_not_depend_on_route_workers_or_placement(kind: Kind):
    inputs = make_inputs(kind)
    call = (inputs.x_TH, inputs.router_EH, inputs.experts, Router(K))
    live = moe(*call, config=SMALL)
    replay = prepare_replay(live.expert_of_TK, E, config=SMALL)
    given = moe_routed(*call[:1], live.expert_of_TK, live.gate_TK, inputs.experts, config=SMALL)
    twice = Placement(torch.tensor([4, 3, 2, 1, 0, 0, -1, 4]))
    for other_TH in (
        given,
        moe(*call, config=replace(SMALL, num_workers=1)).y_TH,
        moe(*call, config=replace(SMALL, num_workers=5, tile_group=1)).y_TH,
        moe(*call, config=SMALL, placement=twice).y_TH,
        moe(*call, config=SMALL, replay=replay).y_TH,
    ):
        assert_same_bits(actual=other_TH, expected=live.y_TH)


def test_bits_do_not_depend_on_the_other_tokens_of_the_call():
    inputs = make_inputs(KINDS[2])
    whole = moe(inputs.x_TH, inputs.router_EH, inputs.experts, Router(K), config=SMALL)
    part = moe(inputs.x_TH[15:], inputs.router_EH, inputs.experts, Router(K), config=SMALL)
    assert_same_bits(actual=part.y_TH, expected=whole.y_TH[15:])


def test_a_token_without_any_routed_expert_still_gets_the_shared_one():
    inputs = make_inputs(KINDS[1])
    nobody_TK = torch.full((T, K), -1)
    y_TH = moe_routed(inputs.x_TH, nobody_TK, torch.ones(T, K), inputs.experts, config=SMALL)
    expected = truth(inputs, KINDS[1], nobody_TK, torch.ones(T, K))
    assert relative_error(actual=y_TH, expected=expected) < 1e-6


def test_torch_compile_carries_the_shared_expert():
    inputs = make_inputs(KINDS[1])
    compiled = torch.compile(
        lambda x_TH: moe(x_TH, inputs.router_EH, inputs.experts, Router(K), config=SMALL).y_TH,
        fullgraph=True,
        backend="aot_eager",
    )
    expected = moe(inputs.x_TH, inputs.router_EH, inputs.experts, Router(K), config=SMALL).y_TH
    assert_same_bits(actual=compiled(inputs.x_TH), expected=expected)


def attach(shared: SharedExpert, **options: object) -> Experts:
    rows = 2 * I if options.get("has_gate", True) else I
    return Experts(torch.zeros(E, rows, H), torch.zeros(E, H, I), shared=shared, **options)  # type: ignore


UP, DOWN = torch.zeros(8, H), torch.zeros(H, 8)
REFUSED = {
    "no gate rows": (
        lambda: attach(SharedExpert(None, UP, DOWN)), "gate_JH.*has_gate.*True.*None"
    ),
    "gate rows too many": (
        lambda: attach(SharedExpert(UP, UP, DOWN), has_gate=False),
        r"gate_JH.*has_gate.*False.*\(8, 40\)",
    ),
    "another hidden width": (
        lambda: attach(SharedExpert(UP[:, :9].clone(), UP[:, :9].clone(), DOWN[:9])),
        r"up_JH.*\(8, 40\).*\(8, 9\)",
    ),
    "another dtype": (
        lambda: attach(SharedExpert(UP.half(), UP.half(), DOWN.half())), "up_JH.*dtype.*float16"
    ),
    "down of another width": (
        lambda: SharedExpert(UP, UP, torch.zeros(H, 9)), r"down_HJ.*\(40, 8\).*\(40, 9\)"
    ),
    "a flat token gate": (
        lambda: SharedExpert(UP, UP, DOWN, torch.zeros(H)), "token_gate_1H.*2 axes.*40"
    ),
    "empty": (lambda: SharedExpert(UP[:0], UP[:0], DOWN[:, :0]), r"up_JH.*empty.*\(0, 40\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_shared_expert_is_refused_with_argument_rule_and_value(name: str):
    call, message = REFUSED[name]
    assert_refused(call, message)
