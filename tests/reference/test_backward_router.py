"""The derivative of the router: against autograd, and by hand where others have been wrong."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from reference.backward_router import RouterKind, route_backward, weigh_backward
from reference.router import weigh

KINDS = [
    pytest.param(RouterKind("softmax", True, 1.0), id="softmax-over-the-chosen"),
    pytest.param(RouterKind("softmax", False, 1.0), id="softmax-over-all"),
    pytest.param(RouterKind("softmax", True, 2.5), id="softmax-scaled"),
    pytest.param(RouterKind("sigmoid", True, 2.5), id="sigmoid-renormalised-and-scaled"),
    pytest.param(RouterKind("sigmoid", False, 1.0), id="sigmoid"),
]
IDS = [
    pytest.param([2, 0, 4], id="all-there"),
    pytest.param([-1, 3, 1], id="one-absent"),
    pytest.param([-1, 3, -1], id="one-there"),
    pytest.param([-1, -1, -1], id="none"),
    pytest.param([4, 1, 0, 3, 2], id="every-expert"),
]


def by_autograd(logit_E: Tensor, ids_K: Tensor, dgate_K: Tensor, kind: RouterKind) -> Tensor:
    """Differentiate the forward reference for one token."""
    leaf = logit_E.clone().requires_grad_()
    options = {"kind": kind.score, "scale": kind.scale}
    gate_1K = weigh(leaf[None], ids_K[None], kind.renormalize, **options)
    return torch.autograd.grad(gate_1K[0], leaf, dgate_K)[0]


@pytest.mark.parametrize("spread", [1.0, 30.0], ids=["even", "peaked"])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_has_the_gradient_of_the_forward(
    kind: RouterKind, ids: list[int], spread: float
) -> None:
    logit_E = torch.randn(5, dtype=torch.float64) * spread
    ids_K, dgate_K = torch.tensor(ids), torch.randn(len(ids), dtype=torch.float64)
    wanted_E = by_autograd(logit_E, ids_K, dgate_K, kind)
    there_K = ids_K >= 0
    got_E = weigh_backward(logit_E, ids_K[there_K], dgate_K[there_K], kind)
    assert_close(got_E, wanted_E, rtol=1e-12, atol=1e-14)


def test_sigmoids_as_small_as_what_is_added_to_their_sum() -> None:
    """Scores of 2e-22 beside 1e-20: without it in the derivative this would be 1/4."""
    logit_E = torch.full((2,), -50.0, dtype=torch.float64)
    dgate_C = torch.tensor([1.0, 0.0]).double()
    both, kind = torch.tensor([0, 1]), RouterKind("sigmoid")
    got_E = weigh_backward(logit_E, both, dgate_C, kind)
    assert_close(got_E, by_autograd(logit_E, both, dgate_C, kind), rtol=1e-12, atol=0.0)
    s = math.exp(-50)
    assert float(got_E[0]) == pytest.approx(s * (1e-20 + s) / (1e-20 + 2 * s) ** 2, rel=1e-12)


def test_scores_of_nothing_have_gradients_of_nothing_and_not_nan() -> None:
    logit_E = torch.full((2,), -1000.0, dtype=torch.float64)
    dgate_C = torch.ones(2, dtype=torch.float64)
    got_E = weigh_backward(logit_E, torch.tensor([0, 1]), dgate_C, RouterKind("sigmoid"))
    assert got_E.tolist() == [0.0, 0.0]


def two_experts(ids: list[int], served: list[int], dgate: list[float]) -> Tensor:
    """One token of x = 1 whose two logits weigh 3/4 and 1/4; return its dlogits."""
    x_TH = torch.ones(1, 1, dtype=torch.float64)
    weight_EH = torch.tensor([[3.0], [1.0]], dtype=torch.float64).log()
    return route_backward(
        x_TH, weight_EH, None, torch.tensor([ids]), torch.tensor([dgate]).double(),
        served_TK=torch.tensor([served]),
    ).logits_TE[0]  # fmt: skip


def test_a_dropped_choice_has_a_constant_weight_and_stays_in_the_sum_of_the_others() -> None:
    """gate_0 = 3/4 falls as logit 1 rises, though expert 1 serves nobody and its weight is 0."""
    got_E = two_experts([0, 1], [0, -1], dgate=[16.0, math.nan])
    assert_close(got_E, torch.tensor([3.0, -3.0]).double(), rtol=1e-14, atol=1e-14)


def test_a_choice_absent_from_a_replay_is_absent_from_the_sum() -> None:
    """The only weight of the token is 1 whatever its logit."""
    assert two_experts([0, -1], [0, -1], dgate=[16.0, 5.0]).tolist() == [0.0, 0.0]


def test_gradients_of_the_logits_from_above_reach_experts_that_nobody_chose() -> None:
    x_TH = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()
    weight_EH = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 7.0]]).double()
    nobody_TK = torch.full((2, 1), -1)
    got = route_backward(
        x_TH, weight_EH, None, nobody_TK, torch.ones(2, 1).double(), served_TK=nobody_TK,
        dlogits_TE=torch.tensor([[0.0, 0.0, 10.0], [0.0, 1.0, 0.0]]),
    )  # fmt: skip
    assert got.x_TH.tolist() == [[50.0, 70.0], [0.0, 1.0]]
    assert got.weight_EH.tolist() == [[0.0, 0.0], [3.0, 4.0], [10.0, 20.0]]
    assert got.bias_E.tolist() == [0.0, 1.0, 10.0]
