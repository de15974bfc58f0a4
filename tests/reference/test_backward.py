"""The gradients by hand against autograd, against finite differences, and where others failed."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from reference import ExpertKind, choose, moe_by_expert, route, shared_ffn
from reference.backward import Layer, layer_backward
from reference.backward_router import SOFTMAX, RouterKind
from reference.experts import SWIGLU


@dataclass(frozen=True)
class Case:
    """One dialect of the layer.

    Attributes:
        name, reason: for the reader.
        T, K, E, H, I: sizes.
        expert, router: what they compute.
        biases: of the products of the experts, first and second.
        router_bias: whether logits have one.
        shared: width of the shared expert and whether tokens weigh it; None without one.
        routing: "live", "replay", or "given", with weights and without a router.
        skip: share of ids that are -1.
        drop: capacity and seed of the draw, as ``route`` has them.
        asks: whether gradients of weights and logits come from above.
    """

    name: str
    reason: str
    T: int = 5
    K: int = 2
    E: int = 4
    H: int = 6
    I: int = 3
    expert: ExpertKind = SWIGLU
    router: RouterKind = SOFTMAX
    biases: tuple[bool, bool] = (False, False)
    router_bias: bool = False
    shared: tuple[int, bool] | None = None
    routing: str = "live"
    skip: float = 0.0
    drop: dict[str, Any] = field(default_factory=dict)
    asks: bool = True


BOTH = (True, True)
OSS = ExpertKind("clamped_swiglu", interleaved=True, limit=0.7)
NO_GATE = ExpertKind("relu2", has_gate=False)
DEEPSEEK = RouterKind("sigmoid", True, 2.5)
OVER_ALL = RouterKind("softmax", False, 1.5)
CASES = [
    Case("mixtral", "the plain layer"),
    Case("y-alone", "nothing from above but dy", asks=False),
    Case("given", "weights are inputs", routing="given", skip=0.3),
    Case("replay", "absent ids leave the sum", routing="replay", skip=0.3),
    Case("replay-nothing", "no choice at all", routing="replay", skip=1.0),
    Case("given-nothing", "no choice and no router", routing="given", skip=1.0),
    Case("one-token", "T = 1"),
    Case("one-choice", "K = 1: a weight of one has no gradient", K=1),
    Case("one-expert", "E = 1, many rows", K=1, E=1, T=9),
    Case("all-chosen", "K = E", K=4),
    Case("no-tokens", "T = 0", T=0),
    Case("over-all", "experts not chosen have a share in the sum", router=OVER_ALL),
    Case("over-all-replay", "absent ids stay in it", router=OVER_ALL, routing="replay", skip=0.3),
    Case("deepseek", "sigmoid, renormalised, scaled", router=DEEPSEEK),
    Case("deepseek-replay", "the same of ids", router=DEEPSEEK, routing="replay", skip=0.3),
    Case("sigmoid", "every weight by itself", router=RouterKind("sigmoid", False)),
    Case("gpt-oss", "interleaved, clamped, all biases", expert=OSS, biases=BOTH, router_bias=True),
    Case("first-bias", "in z alone", biases=(True, False)),
    Case("second-bias", "in the weight's gradient", biases=(False, True), routing="given"),
    Case("nemotron", "no gate rows, and biases", expert=NO_GATE, biases=BOTH),
    Case("gelu", "exact", expert=ExpertKind("gelu")),
    Case("gelu-tanh", "by tanh", expert=ExpertKind("gelu_tanh", interleaved=True)),
    Case("relu", "with gate rows", expert=ExpertKind("relu")),
    Case("shared", "weight one", shared=(4, False)),
    Case("qwen2", "weighed per token", shared=(5, True), router=OVER_ALL),
    Case("shared-interleaved", "its rows never are", expert=OSS, biases=BOTH, shared=(4, True)),
    Case("shared-no-gate", "up rows alone", expert=NO_GATE, shared=(3, True), routing="given"),
    Case("shared-alone", "no routed row", shared=(3, True), routing="given", skip=1.0),
    Case("switch", "capacity, one choice", T=9, K=1, router=OVER_ALL, drop={"capacity": 2}),
    Case("capacity", "dropped choices stay in the sum", T=9, drop={"capacity": 2}),
    Case("random-second", "a draw per token", T=9, drop={"random_second_seed": 3}),
    Case("gshard", "a draw, then a capacity", T=12, drop={"random_second_seed": 3, "capacity": 3}),
    Case("deepseek-capacity", "both sums", T=9, router=DEEPSEEK, drop={"capacity": 2}),
]


class Above(NamedTuple):
    """The gradients from above, in the order of what the layer returns."""

    y_TH: Tensor
    gate_TK: Tensor
    logits_TE: Tensor


def draw(*shape: int) -> Tensor:
    """Return values around a half in size, so that limits of 0.7 are met and passed."""
    return torch.randn(*shape, dtype=torch.float64) * 0.7


def make_layer(case: Case) -> Layer:
    """Draw the tensors that a case has."""
    T, K, E, H, I = case.T, case.K, case.E, case.H, case.I
    J, weighs = case.shared or (0, False)
    rows, gated, is_given = 1 + case.expert.has_gate, case.expert.has_gate, case.routing == "given"
    return Layer(
        draw(T, H),
        draw(E, rows * I, H),
        draw(E, H, I),
        draw(E, rows * I) if case.biases[0] else None,
        draw(E, H) if case.biases[1] else None,
        draw(T, K) if is_given else None,
        None if is_given else draw(E, H),
        draw(E) if case.router_bias else None,
        draw(J, H) if J and gated else None,
        draw(J, H) if J else None,
        draw(H, J) if J else None,
        draw(1, H) if weighs else None,
    )


def make_ids(case: Case, layer: Layer) -> Tensor:
    """Return the ids of a case before any is dropped."""
    if case.routing == "live":
        assert layer.router_weight_EH is not None
        logits_TE = layer.x_TH @ layer.router_weight_EH.T
        bias_E = 0.0 if layer.router_bias_E is None else layer.router_bias_E
        return choose(logits_TE + bias_E, case.K, kind=case.router.score)
    ids_TK = torch.rand(case.T, case.E).argsort(1)[:, : case.K]
    return ids_TK.masked_fill(torch.rand(ids_TK.shape) < case.skip, -1)


def forward(case: Case, layer: Layer, ids_TK: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return y, weights and logits (y alone where weights are given), and the ids served."""
    outputs, gate_TK = [], layer.gate_TK
    if gate_TK is None:
        assert layer.router_weight_EH is not None
        routing = route(
            layer.x_TH, layer.router_weight_EH, case.K, renormalize=case.router.renormalize,
            expert_of_TK=None if case.routing == "live" else ids_TK, kind=case.router.score,
            bias_E=layer.router_bias_E, scale=case.router.scale, **case.drop,
        )  # fmt: skip
        ids_TK, gate_TK = routing.expert_of_TK, routing.gate_TK
        outputs = [gate_TK, routing.logits_TE]
    y_TH = moe_by_expert(
        layer.x_TH, ids_TK, gate_TK, layer.gate_up_E2IH, layer.down_EHI, kind=case.expert,
        gate_up_bias_E2I=layer.gate_up_bias_E2I, down_bias_EH=layer.down_bias_EH,
    )  # fmt: skip
    if layer.shared_up_JH is not None and layer.shared_down_HJ is not None:
        shared = layer.shared_gate_JH, layer.shared_up_JH, layer.shared_down_HJ
        y_TH = y_TH + shared_ffn(layer.x_TH, *shared, layer.token_gate_1H, case.expert)
    return [y_TH, *outputs], ids_TK


def make_above(case: Case) -> Above:
    """Draw the gradients from above."""
    return Above(draw(case.T, case.H), draw(case.T, case.K), draw(case.T, case.E))


def by_hand(
    case: Case, layer: Layer, ids_TK: Tensor, served_TK: Tensor | None, above: Above
) -> Layer:
    """Return what the module under test says."""
    asks = case.asks and case.routing != "given"
    return layer_backward(
        layer, ids_TK, above.y_TH, served_TK=served_TK, kind=case.expert, router=case.router,
        dgate_TK=above.gate_TK if asks else None, dlogits_TE=above.logits_TE if asks else None,
    )  # fmt: skip


def assert_hand_equals_autograd(case: Case) -> None:
    """Compare every gradient, in a layer of random numbers."""
    layer, above = make_layer(case), make_above(case)
    ids_TK = make_ids(case, layer)
    leaves = Layer._make(None if one is None else one.clone().requires_grad_() for one in layer)
    outputs, served_TK = forward(case, leaves, ids_TK)
    asked = outputs if case.asks else outputs[:1]
    # What nothing depends on has no graph, and the sum with 0 · x gives it one.
    asked = [one + 0.0 * leaves.x_TH.sum() for one in asked]
    there = [one for one in leaves if one is not None]
    options = {"allow_unused": True, "materialize_grads": True}
    wanted = torch.autograd.grad(asked, there, above[: len(asked)], **options)
    got = [one for one in by_hand(case, layer, ids_TK, served_TK, above) if one is not None]
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_gradient_is_that_of_autograd(case: Case) -> None:
    assert_hand_equals_autograd(case)


EXPERTS = st.sampled_from(["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"])


@st.composite
def cases(draw_one: st.DrawFn) -> Case:
    """Any dialect of few and narrow experts."""
    experts, activation = draw_one(st.integers(1, 4)), draw_one(EXPERTS)
    gated = activation == "clamped_swiglu" or draw_one(st.booleans())
    top_k, flag = draw_one(st.integers(1, experts)), st.booleans()
    routing = draw_one(st.sampled_from(["live", "replay", "given"]))
    drop = {}
    if routing == "live":
        drop["capacity"] = draw_one(st.none() | st.integers(1, 4))
        drop["random_second_seed"] = draw_one(st.integers(0, 9)) if top_k == 2 else None
    return Case(
        "drawn", "whatever nobody thought of",
        T=draw_one(st.integers(0, 6)), K=top_k, E=experts,
        H=draw_one(st.integers(1, 4)), I=draw_one(st.integers(1, 3)),
        expert=ExpertKind(activation, gated, gated and draw_one(flag), 0.7),
        router=RouterKind(draw_one(st.sampled_from(["softmax", "sigmoid"])), draw_one(flag), 1.5),
        biases=(draw_one(flag), draw_one(flag)),
        router_bias=routing != "given" and draw_one(flag),
        shared=draw_one(st.none() | st.tuples(st.integers(1, 3), flag)),
        routing=routing, skip=draw_one(st.sampled_from([0.0, 0.4])), drop=drop,
        asks=draw_one(flag),
    )  # fmt: skip


@settings(max_examples=150)
@given(case=cases(), seed=st.integers(0, 999))
def test_every_gradient_of_any_dialect_is_that_of_autograd(case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    assert_hand_equals_autograd(case)


class ByHand(torch.autograd.Function):
    """The forward of the reference with the backward by hand."""

    @staticmethod
    def forward(ctx: Any, case: Case, ids_TK: Tensor, *tensors: Tensor | None) -> Any:
        outputs, ctx.served_TK = forward(case, Layer._make(tensors), ids_TK)
        ctx.case, ctx.ids_TK, ctx.tensors = case, ids_TK, tensors
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Any:
        filled = Above(*above, *[above[0]] * (3 - len(above)))  # given weights are asked for y
        layer = Layer._make(ctx.tensors)
        return None, None, *by_hand(ctx.case, layer, ctx.ids_TK, ctx.served_TK, filled)


TINY = {"T": 3, "K": 2, "E": 3, "H": 2, "I": 2}


@pytest.mark.parametrize(
    "case",
    [
        Case("live", "the plain layer", **TINY),
        Case("given", "of weights too", **TINY, routing="given"),
        Case("oss", "kinks are far away", **TINY, expert=OSS, biases=BOTH, router_bias=True),
        Case("qwen2", "token gate", **TINY, shared=(2, True), router=OVER_ALL),
        Case("deepseek", "absent ids", **TINY, router=DEEPSEEK, routing="replay", skip=0.3),
        Case("dropped", "a step apart nobody changes", **TINY, drop={"capacity": 1}),
    ],
    ids=lambda case: case.name,
)
def test_finite_differences_agree(case: Case) -> None:
    layer = make_layer(case)
    leaves = [None if one is None else one.requires_grad_() for one in layer]
    ids_TK = make_ids(case, layer).detach()
    assert torch.autograd.gradcheck(ByHand.apply, (case, ids_TK, *leaves))


def test_an_expert_that_serves_nobody_gets_exact_zeros() -> None:
    case = Case("empty", "expert 1 is in no choice", biases=BOTH, routing="replay")
    layer, ids_TK = make_layer(case), torch.tensor([[0, 2], [3, -1], [2, 3], [0, 3], [-1, 2]])
    got = by_hand(case, layer, ids_TK, None, make_above(case))
    of_experts = got.gate_up_E2IH, got.down_EHI, got.gate_up_bias_E2I, got.down_bias_EH
    assert [bool(one is not None and one[1].any()) for one in of_experts] == [False] * 4
    assert all(one is not None and one[[0, 2, 3]].abs().amin() > 0 for one in of_experts)


def test_each_choice_weighs_the_down_gradient_with_its_own_weight() -> None:
    """Two tokens of h = 2 and 3 for one expert each way: sums of weight · dy · h."""
    layer = Layer(
        torch.tensor([[2.0], [3.0]]), torch.ones(2, 1, 1), torch.ones(2, 1, 1),
        gate_TK=torch.tensor([[5.0, 7.0], [11.0, 13.0]]),
    )  # fmt: skip
    ids_TK, dy_TH = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[1.0], [10.0]])
    got = layer_backward(layer, ids_TK, dy_TH, kind=ExpertKind("relu", has_gate=False))
    assert got.down_EHI.flatten().tolist() == [5 * 2 + 13 * 30, 7 * 2 + 11 * 30]
    assert got.gate_TK is not None and got.gate_TK.tolist() == [[2.0, 2.0], [30.0, 30.0]]
    assert got.x_TH.flatten().tolist() == [5 + 7, 10 * (11 + 13)]


def test_no_choice_anywhere_gives_exact_zeros() -> None:
    case = Case("nothing", "every id is -1", biases=BOTH, router_bias=True, asks=False)
    layer, ids_TK = make_layer(case), torch.full((case.T, case.K), -1)
    got = by_hand(case, layer, ids_TK, None, make_above(case))
    assert sum(int(one.count_nonzero()) for one in got if one is not None) == 0
    assert sum(one is not None for one in got) == 7


ROUTERS = [
    pytest.param(RouterKind(score, renormalize), id=f"{score}-{renormalize}")
    for score in ("softmax", "sigmoid")
    for renormalize in (True, False)
]


@pytest.mark.parametrize("router", ROUTERS)
def test_padded_rows_of_nan_touch_nothing(router: RouterKind) -> None:
    """A token without a choice, whose x and dy are NaN, as torch.empty may leave them."""
    case = Case("padded", "tokens 1 and 4", biases=BOTH, router=router, router_bias=True)
    case = replace(case, routing="replay", asks=False)
    layer, above, padded = make_layer(case), make_above(case), [1, 4]
    ids_TK = make_ids(case, layer)
    ids_TK[padded] = -1
    clean = by_hand(case, layer, ids_TK, None, above)
    layer.x_TH[padded] = above.y_TH[padded] = math.nan
    for one, other in zip(by_hand(case, layer, ids_TK, None, above), clean, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert not clean.x_TH[padded].any()


@pytest.mark.parametrize("router", ROUTERS)
def test_a_served_token_of_nan_spoils_its_own_experts_alone(router: RouterKind) -> None:
    case = Case("bad", "token 1 goes to experts 0 and 2", router=router, routing="replay")
    layer, above = make_layer(case), make_above(case)
    ids_TK = make_ids(case, layer)
    ids_TK[1] = torch.tensor([0, 2])
    clean = by_hand(case, layer, ids_TK, None, above)
    layer.x_TH[1] = math.nan
    got = by_hand(case, layer, ids_TK, None, above)
    others = [0, 2, 3, 4]
    assert torch.equal(got.x_TH[others], clean.x_TH[others]) and got.x_TH[1].isnan().all()
    for one, other in ((got.gate_up_E2IH, clean.gate_up_E2IH), (got.down_EHI, clean.down_EHI)):
        assert torch.equal(one[[1, 3]], other[[1, 3]]) and one[[0, 2]].isnan().all()


def test_inputs_of_16_bits_are_differentiated_in_float64() -> None:
    case = Case("bfloat16", "rounded before, not on the way", biases=BOTH, shared=(4, True))
    rounded = Layer._make(None if one is None else one.bfloat16() for one in make_layer(case))
    wide = Layer._make(None if one is None else one.double() for one in rounded)
    ids_TK, above = make_ids(case, wide), make_above(case)
    got = by_hand(case, rounded, ids_TK, None, above)
    for one, other in zip(got, by_hand(case, wide, ids_TK, None, above), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
