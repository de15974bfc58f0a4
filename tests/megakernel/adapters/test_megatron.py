"""Against modules of the shapes that Megatron-Core gives its experts; it is not installed here."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

import reference
from megakernel import Placement
from megakernel.adapters.megatron import MegatronMegakernel, compact
from tests.helpers.gradients import relative_error

H, I, E, K, T = 40, 24, 6, 2, 14
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Config:
    """The fields of a TransformerConfig that matter."""

    num_moe_experts: int = E
    moe_router_topk: int = K
    activation_func: Any = silu
    gated_linear_unit: bool = True
    add_bias_linear: bool = False
    activation_func_clamp_value: float | None = None
    moe_mlp_glu_interleave_size: int | None = None
    expert_tensor_parallel_size: int = 1


class Linear(nn.Module):
    """One expert's linear, which returns its output and no bias."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class GroupedLinear(nn.Module):
    """A parameter for each expert, or one for all."""

    def __init__(self, weight_EXY: Tensor, single: bool) -> None:
        super().__init__()
        if single:
            self.weight = nn.Parameter(weight_EXY)
        for expert, weight in enumerate(() if single else weight_EXY):
            self.register_parameter(f"weight{expert}", nn.Parameter(weight.clone()))


class GroupedMLP(nn.Module):
    """The shape of TEGroupedMLP."""

    def __init__(self, fc1: Tensor, fc2: Tensor, single: bool) -> None:
        super().__init__()
        self.linear_fc1, self.linear_fc2 = GroupedLinear(fc1, single), GroupedLinear(fc2, single)


class MLP(nn.Module):
    """One expert of SequentialMLP, and the shape of shared experts."""

    def __init__(self, fc1: Tensor, fc2: Tensor) -> None:
        super().__init__()
        self.linear_fc1, self.linear_fc2 = Linear(fc1.clone()), Linear(fc2.clone())

    def forward(self, hidden_states: Tensor) -> Tensor:
        return reference.expert_ffn(
            hidden_states, self.linear_fc1.weight, self.linear_fc2.weight
        )  # fmt: skip


class SequentialMLP(nn.Module):
    """The shape of SequentialMLP."""

    def __init__(self, fc1: Tensor, fc2: Tensor) -> None:
        super().__init__()
        self.local_experts = nn.ModuleList(map(MLP, fc1, fc2))


def draw(*shape: int) -> Tensor:
    return torch.randn(shape) * shape[-1] ** -0.5


@pytest.fixture
def weights() -> tuple[Tensor, Tensor]:
    return draw(E, 2 * I, H), draw(E, H, I)


def make_experts(layout: str, weights: tuple[Tensor, Tensor]) -> nn.Module:
    if layout == "sequential":
        return SequentialMLP(*weights)
    return GroupedMLP(*weights, single=layout == "single grouped")


def route(top_k: int = K) -> tuple[Tensor, Tensor]:
    """Dense probabilities and map; some tokens have fewer experts, one has none."""
    logits_TE = torch.randn(T, E)
    map_TE = torch.zeros(T, E, dtype=torch.bool)
    map_TE.scatter_(1, logits_TE.topk(top_k).indices, True)
    map_TE[3, int(map_TE[3].int().argmax())] = False
    map_TE[5] = False
    return logits_TE.softmax(-1) * map_TE, map_TE


def dense(x_TH: Tensor, probs_TE: Tensor, map_TE: Tensor, weights: tuple[Tensor, Tensor]):
    """Every expert for every token, in float64."""
    fc1, fc2 = (weight.double() for weight in weights)
    outputs = [reference.expert_ffn(x_TH.double(), fc1[e], fc2[e]) for e in range(E)]
    return sum(
        output * (probs_TE * map_TE)[:, e, None].double() for e, output in enumerate(outputs)
    )


@pytest.mark.parametrize("layout", ["single grouped", "grouped", "sequential"])
@torch.no_grad()
def test_agrees_with_the_dense_computation(layout: str, weights) -> None:
    experts = make_experts(layout, weights)
    backend = MegatronMegakernel(Config(), None, experts, None, E)
    hidden_states, (probs, routing_map) = torch.randn(7, 2, H), route()
    expected = dense(hidden_states.view(T, H), probs, routing_map, weights)
    for packed in (False, True):
        if packed:
            backend.pack()
        actual = backend(hidden_states, probs, routing_map)
        assert actual.shape == hidden_states.shape
        torch.testing.assert_close(
            actual.view(T, H).double(), expected, rtol=0.0, atol=TOLERANCE
        )  # fmt: skip
    assert list(backend.state_dict()) == [] == list(backend.parameters())


@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@torch.no_grad()
def test_weights_written_through_data_are_seen_at_the_next_call(packed: bool, weights) -> None:
    """As an optimizer with main parameters writes them: no version counter changes."""
    experts = make_experts("grouped", weights)
    backend = MegatronMegakernel(Config(), None, experts, None, E)
    if packed:
        backend.pack()
    x_TH, (probs, routing_map) = torch.randn(T, H), route()
    backend(x_TH, probs, routing_map)
    other = draw(E, 2 * I, H), draw(E, H, I)
    for expert in range(E):
        getattr(experts.linear_fc1, f"weight{expert}").data.copy_(other[0][expert])
        getattr(experts.linear_fc2, f"weight{expert}").data.copy_(other[1][expert])
    actual = backend(x_TH, probs, routing_map)
    expected = dense(x_TH, probs, routing_map, other)
    torch.testing.assert_close(actual.double(), expected, rtol=0.0, atol=TOLERANCE)


@torch.no_grad()
def test_shared_experts_are_added_and_placement_changes_no_bit(weights) -> None:
    experts, shared = make_experts("single grouped", weights), MLP(draw(2 * I, H), draw(H, I))
    x_TH, routing = torch.randn(T, H), route()
    plain = MegatronMegakernel(Config(), None, experts, None, E)(x_TH, *routing)
    placement = Placement(torch.tensor([5, 0, 1, 1, 2, 4, 3, 0]))
    backend = MegatronMegakernel(Config(), None, experts, shared, E, placement=placement)
    assert torch.equal(backend(x_TH, *routing), plain + shared(x_TH))


def test_routes_become_rising_ids_ending_in_minus_one() -> None:
    probs = torch.tensor([[0.1, 0.0, 0.7, 0.2], [0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    expert_of_TK, gate_TK = compact(probs, probs > 0, 3)
    assert expert_of_TK.tolist() == [[0, 2, 3], [1, -1, -1], [-1, -1, -1]]
    torch.testing.assert_close(gate_TK[0], torch.tensor([0.1, 0.7, 0.2]))
    assert float(gate_TK[1, 0]) == 0.5


def test_a_route_of_probability_zero_is_still_a_route() -> None:
    expert_of_TK, gate_TK = compact(torch.zeros(1, 4), torch.tensor([[False, True] * 2]), 2)
    assert expert_of_TK.tolist() == [[1, 3]] and gate_TK.tolist() == [[0.0, 0.0]]


@torch.no_grad()
def test_a_token_with_more_than_k_experts_is_refused(weights) -> None:
    backend = MegatronMegakernel(Config(), None, make_experts("grouped", weights), None, E)
    with pytest.raises(ValueError, match=r"expert_of_TK\[0, 0\] .*got 6"):
        backend(torch.randn(T, H), *route(top_k=3))
    roomy = MegatronMegakernel(
        Config(), None, make_experts("grouped", weights), None, E, top_k=3
    )  # fmt: skip
    assert roomy(torch.randn(T, H), *route(top_k=3)).shape == (T, H)


@pytest.mark.parametrize(
    "layout",
    [
        "single grouped",
        pytest.param("grouped", marks=pytest.mark.slow),
        pytest.param("sequential", marks=pytest.mark.slow),
    ],
)
def test_gradients_agree_with_the_dense_computation(layout: str, weights) -> None:
    experts = make_experts(layout, weights)
    backend = MegatronMegakernel(Config(), None, experts, MLP(draw(2 * I, H), draw(H, I)), E)
    x_TH, (probs, routing_map) = torch.randn(T, H).requires_grad_(), route()
    probs.requires_grad_()
    shared = backend.owned_elsewhere[1]
    (backend(x_TH, probs, routing_map) - shared(x_TH).detach()).square().sum().backward()
    leaves = [t.detach().double().requires_grad_() for t in (x_TH, probs, *weights)]
    y = dense(leaves[0], leaves[1], routing_map, (leaves[2], leaves[3]))
    extra = shared.double()(leaves[0])
    (y + extra - extra.detach()).square().sum().backward()
    found = [x_TH.grad, probs.grad, *(stacked_grad(experts, n) for n in ("fc1", "fc2"))]
    for actual, leaf in zip(found, leaves, strict=True):
        assert relative_error(actual, leaf.grad) < TOLERANCE


def stacked_grad(experts: nn.Module, linear: str) -> Tensor:
    """Gradients of a linear's parameters, in the order of the experts."""
    found = [p.grad for name, p in experts.named_parameters() if linear in name]
    return found[0] if found[0].ndim == 3 else torch.stack(found)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gated_linear_unit", False),
        ("add_bias_linear", True),
        ("activation_func_clamp_value", 7.0),
        ("moe_mlp_glu_interleave_size", 32),
        ("expert_tensor_parallel_size", 2),
        ("activation_func", gelu),
        ("num_moe_experts", 2 * E),
    ],
)
def test_other_configurations_are_refused_by_field(name: str, value: Any, weights) -> None:
    config = replace(Config(), **{name: value})
    with pytest.raises(ValueError, match=name):
        MegatronMegakernel(config, None, make_experts("grouped", weights), None, E)


def test_bad_maps_and_modules_are_refused(weights) -> None:
    probs, routing_map = route()
    with pytest.raises(ValueError, match=r"routing_map must be bool .*got torch\.int64"):
        compact(probs, routing_map.long(), K)
    with pytest.raises(ValueError, match=r"routing_map must be bool of the shape .*\(13, 6\)"):
        compact(probs, routing_map[1:], K)
    fewer = make_experts("sequential", (weights[0][1:], weights[1][1:]))
    backend = MegatronMegakernel(Config(), None, fewer, None, E)
    with pytest.raises(ValueError, match="linear_fc1 must hold 6 experts, got 5"):
        backend(torch.randn(T, H), probs, routing_map)
