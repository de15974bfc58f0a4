"""Against modules of the shapes that torchtitan gives its experts; it is not installed here."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from megakernel import Placement
from megakernel.adapters.torchtitan import routed_experts_class
from tests.helpers.gradients import relative_error

D, F, E, K, T = 40, 24, 5, 2, 14
TOLERANCE = 1e-5


class LocalTokenDispatcher:
    """Dispatches on one rank."""


class AllToAllTokenDispatcher:
    """Dispatches over ranks."""


class SwiGLU(nn.Module):
    """The activation by which torchtitan multiplies gate and up."""


class GroupedExperts(nn.Module):
    """Three parameters for all experts."""

    def __init__(self) -> None:
        super().__init__()
        self.w1_EFD = nn.Parameter(draw(E, F, D))
        self.w2_EDF = nn.Parameter(draw(E, D, F))
        self.w3_EFD = nn.Parameter(draw(E, F, D))


class GroupedLinear(nn.Module):
    """One parameter of several projections for all experts."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(*shape))


class RoutedExperts(nn.Module):
    """The region that an override replaces, with experts of their own class inside."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        token_dispatcher: Any = LocalTokenDispatcher
        activation_fn: Any = SwiGLU

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.inner_experts = GroupedExperts()
        self.token_dispatcher = config.token_dispatcher()


class LinearRoutedExperts(RoutedExperts):
    """The later layout: two grouped linears, gate and up stacked."""

    def __init__(self, config: RoutedExperts.Config) -> None:
        nn.Module.__init__(self)
        self.w13, self.w2 = GroupedLinear(E, 2, F, D), GroupedLinear(E, D, F)
        self.activation_fn = config.activation_fn()
        self.token_dispatcher = config.token_dispatcher()


def draw(*shape: int) -> Tensor:
    return torch.randn(shape) * shape[-1] ** -0.5


def build(base: type, **fields: Any) -> Any:
    cls = routed_experts_class(base)
    return cls(cls.Config(**fields))


def route() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of forward."""
    scores_TK, ids_TK = torch.randn(T, E).softmax(-1).topk(K)
    counts_E = torch.bincount(ids_TK.flatten(), minlength=E)
    return torch.randn(T, D), scores_TK, ids_TK, counts_E


def expected_of(
    experts: Any, x_TD: Tensor, scores_TK: Tensor, ids_TK: Tensor, _: Tensor
) -> Tensor:
    return reference.moe_by_token(x_TD, ids_TK, scores_TK, *stacked(experts))


def stacked(experts: Any) -> tuple[Tensor, Tensor]:
    if hasattr(experts, "w13"):
        return experts.w13.weight.flatten(1, 2), experts.w2.weight
    inner = experts.inner_experts
    return torch.cat([inner.w1_EFD, inner.w3_EFD], 1), inner.w2_EDF


def check(experts: Any) -> None:
    arguments = route()
    actual, expected = experts(*arguments), expected_of(experts, *arguments)
    torch.testing.assert_close(actual.double(), expected, rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize("base", [RoutedExperts, LinearRoutedExperts])
@torch.no_grad()
def test_agrees_with_the_reference(base: type) -> None:
    experts = build(base)
    assert isinstance(experts, base) and issubclass(type(experts).Config, RoutedExperts.Config)
    check(experts)
    experts.placement = Placement(torch.tensor([4, 3, 0, 1, 2, 0]))
    check(experts)


@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@torch.no_grad()
def test_weights_written_through_data_are_seen_at_the_next_call(packed: bool) -> None:
    experts = build(RoutedExperts)
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    if packed:
        experts.pack()
    after = experts.state_dict()
    assert {name: torch.equal(after[name], before[name]) for name in before} == dict.fromkeys(
        ["inner_experts.w1_EFD", "inner_experts.w2_EDF", "inner_experts.w3_EFD"], True
    )
    check(experts)
    for weight in experts.inner_experts.parameters():
        weight.data.copy_(draw(*weight.shape))
    check(experts)


@pytest.mark.parametrize(
    ("base", "packed"),
    [
        pytest.param(RoutedExperts, True, id="packed"),
        pytest.param(RoutedExperts, False, id="apart", marks=pytest.mark.slow),
        pytest.param(LinearRoutedExperts, False, id="stacked", marks=pytest.mark.slow),
    ],
)
def test_gradients_agree_with_the_reference(base: type, packed: bool) -> None:
    experts = build(base)
    experts.save = "nothing" if packed else "preactivations"
    if packed:
        experts.pack()
    x_TD, scores_TK, *routing = route()
    inputs = [x_TD.requires_grad_(), scores_TK.detach().requires_grad_()]
    leaves = [*inputs, *experts.parameters()]
    experts(*inputs, *routing).square().sum().backward()
    found = [leaf.grad for leaf in leaves]
    experts.double()  # moves the parameters apart again
    inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    experts.zero_grad()
    y_TD = reference.moe_by_expert(inputs[0], routing[0], inputs[1], *stacked(experts))
    y_TD.square().sum().backward()
    for actual, leaf in zip(found, [*inputs, *experts.parameters()], strict=True):
        assert relative_error(actual, leaf.grad) < TOLERANCE


def test_dispatch_over_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LocalTokenDispatcher.*got AllToAllTokenDispatcher"):
        build(RoutedExperts, token_dispatcher=AllToAllTokenDispatcher)


def test_scores_before_experts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalTokenDispatcher, "score_before_experts", True, raising=False)
    with pytest.raises(ValueError, match="score_before_experts must be False"):
        build(RoutedExperts)


def test_other_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="activation_fn must be SwiGLU, got GELU"):
        build(LinearRoutedExperts, activation_fn=nn.GELU)
