"""The gate by hand: who is chosen, at what weight, and what a gradient sees."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from reference import route, select, weigh

NAN, INF = math.nan, math.inf
# softmax of these is 0.1, 0.2, 0.3, 0.4
LOGITS_14 = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("logits_E", "chosen"),
    [
        pytest.param([1.0, 3.0, 2.0], [1, 2], id="best-first"),
        pytest.param([5.0, 5.0, 5.0], [0, 1], id="a-full-tie-goes-to-the-lower-ids"),
        pytest.param([1.0, 7.0, 3.0, 7.0], [1, 3], id="tied-best-in-id-order"),
        pytest.param([9.0, 4.0, 4.0], [0, 1], id="a-tie-for-the-last-place"),
        pytest.param([-0.0, 0.0, -0.0], [0, 1], id="both-zeros-tie"),
        pytest.param([-3.0, -2.0, -1.0], [2, 1], id="all-negative"),
        pytest.param([-INF, 0.0, INF], [2, 1], id="infinities-are-ordered"),
        pytest.param([-INF, -INF, -INF], [0, 1], id="all-minus-infinity"),
        pytest.param([NAN, NAN, NAN], [0, 1], id="a-row-of-NaN-takes-the-lowest-ids"),
        pytest.param([1.0, NAN, 2.0], [1, 2], id="NaN-counts-as-largest"),
        pytest.param([INF, NAN, 2.0], [1, 0], id="NaN-is-above-infinity"),
    ],
)
def test_the_two_best_by_hand(logits_E: list[float], chosen: list[int]) -> None:
    assert select(torch.tensor([logits_E]), 2).tolist() == [chosen]


def test_every_row_is_chosen_for_itself() -> None:
    logits_TE = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]])
    assert select(logits_TE, 1).tolist() == [[1], [0], [0]]
    assert select(logits_TE, 2).tolist() == [[1, 0], [0, 1], [0, 1]]


def test_no_tokens_no_choices() -> None:
    assert select(torch.empty(0, 5), 3).shape == (0, 3)


# Few distinct values, so that most rows hold ties.
LOGIT = st.sampled_from([-INF, -1.0, -0.0, 0.0, 1.0, INF, NAN])


@given(st.lists(LOGIT, min_size=1, max_size=12), st.data())
def test_selection_is_a_stable_sort(logits_E: list[float], data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, len(logits_E)))

    def rank(expert: int) -> tuple[bool, float, int]:
        logit = logits_E[expert]
        return (False, 0.0, expert) if math.isnan(logit) else (True, -logit, expert)

    wanted = sorted(range(len(logits_E)), key=rank)[:top_k]
    assert select(torch.tensor([logits_E]), top_k)[0].tolist() == wanted


@pytest.mark.parametrize(
    ("ids_K", "renormalize", "weights_K"),
    [
        pytest.param([3, 1], True, [4 / 6, 2 / 6], id="over-the-chosen"),
        pytest.param([3, 1], False, [0.4, 0.2], id="over-all-experts"),
        pytest.param([0, 1, 2, 3], True, [0.1, 0.2, 0.3, 0.4], id="all-chosen"),
        pytest.param([2], True, [1.0], id="the-only-choice-weighs-one"),
        pytest.param([2], False, [0.3], id="the-only-choice-keeps-its-share"),
        pytest.param([-1, 2], True, [0.0, 1.0], id="no-expert-leaves-the-weight-to-the-others"),
        pytest.param([2, -1], False, [0.3, 0.0], id="no-expert-changes-no-other-share"),
        pytest.param([-1, -1], True, [0.0, 0.0], id="a-token-without-experts"),
        pytest.param([-1, -1], False, [0.0, 0.0], id="without-experts-over-all"),
    ],
)
def test_weights_by_hand(ids_K: list[int], renormalize: bool, weights_K: list[float]) -> None:
    gate_TK = weigh(LOGITS_14, torch.tensor([ids_K]), renormalize)
    assert_close(gate_TK, torch.tensor([weights_K], dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("renormalize", [True, False])
def test_a_common_offset_changes_nothing_even_where_exp_would_overflow(renormalize: bool) -> None:
    ids_TK = torch.tensor([[3, 0]])
    far_TK = weigh(LOGITS_14 + 5000.0, ids_TK, renormalize)
    assert_close(far_TK, weigh(LOGITS_14, ids_TK, renormalize), rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_have_the_dtype_of_the_logits(dtype: torch.dtype) -> None:
    assert weigh(LOGITS_14.to(dtype), torch.tensor([[1]]), True).dtype == dtype


@pytest.mark.parametrize("renormalize", [True, False])
def test_a_NaN_row_leaves_the_others_alone(renormalize: bool) -> None:
    logits_TE = torch.cat([LOGITS_14, torch.full((1, 4), NAN, dtype=torch.float64), LOGITS_14])
    gate_TK = weigh(logits_TE, select(logits_TE, 2), renormalize)
    alone_TK = weigh(LOGITS_14, select(LOGITS_14, 2), renormalize)
    assert gate_TK[1].isnan().all()
    assert torch.equal(gate_TK[[0, 2]], alone_TK.expand(2, 2))


@pytest.mark.parametrize("renormalize", [True, False])
def test_the_gradient_of_the_weights_is_right(renormalize: bool) -> None:
    logits_TE = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    ids_TK = torch.tensor([[4, 0], [1, -1], [2, 3]])
    assert torch.autograd.gradcheck(lambda logits: weigh(logits, ids_TK, renormalize), logits_TE)


@pytest.mark.parametrize("renormalize", [True, False])
def test_a_token_without_experts_sends_no_gradient(renormalize: bool) -> None:
    logits_TE = torch.randn(1, 5, requires_grad=True)
    weigh(logits_TE, torch.tensor([[-1, -1]]), renormalize).sum().backward()
    assert torch.equal(logits_TE.grad, torch.zeros(1, 5))


def test_route_is_logits_then_choice_then_weight() -> None:
    x_TH = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    router_EH = torch.tensor([[0.0, 2.0], [1.0, 2.0], [3.0, 0.0]])
    routing = route(x_TH, router_EH, 2)
    assert routing.logits_TE.tolist() == [[0.0, 1.0, 3.0], [2.0, 2.0, 0.0]]
    assert routing.expert_of_TK.tolist() == [[2, 1], [0, 1]]
    high = 1 / (1 + math.exp(-2.0))
    assert_close(routing.gate_TK, torch.tensor([[high, 1 - high], [0.5, 0.5]]))


def test_the_choice_is_made_on_logits_where_their_softmax_would_tie() -> None:
    routing = route(torch.ones(1, 1), torch.tensor([[1e-10], [2e-10]]), 1, renormalize=False)
    assert routing.gate_TK.tolist() == [[0.5]]
    assert routing.expert_of_TK.tolist() == [[1]]


def test_route_without_ties_agrees_with_topk_and_softmax() -> None:
    x_TH, router_EH = torch.randn(50, 8), torch.randn(13, 8)
    routing = route(x_TH, router_EH, 4, renormalize=False)
    wanted = (x_TH @ router_EH.T).softmax(-1).topk(4)
    assert torch.equal(routing.expert_of_TK, wanted.indices)
    assert_close(routing.gate_TK, wanted.values)


def test_replayed_ids_are_kept_and_weighed_by_the_live_gate() -> None:
    x_TH, router_EH = torch.randn(4, 8), torch.randn(6, 8)
    ids_TK = torch.tensor([[5, 0], [1, 2], [-1, 3], [-1, -1]], dtype=torch.int32)
    routing = route(x_TH, router_EH, 2, expert_of_TK=ids_TK)
    assert routing.expert_of_TK.dtype == torch.int64
    assert routing.expert_of_TK.tolist() == ids_TK.tolist()
    assert torch.equal(routing.gate_TK, weigh(x_TH @ router_EH.T, ids_TK, True))
    assert torch.equal(routing.gate_TK > 0, ids_TK >= 0)


def test_replaying_the_free_choice_gives_the_same_bits() -> None:
    x_TH, router_EH = torch.randn(20, 8), torch.randn(6, 8)
    free = route(x_TH, router_EH, 3)
    again = route(x_TH, router_EH, 3, expert_of_TK=free.expert_of_TK)
    assert torch.equal(again.gate_TK, free.gate_TK)


def test_under_replay_the_gradient_reaches_the_router() -> None:
    x_TH = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    router_EH = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    ids_TK = torch.tensor([[0, 1], [4, 2], [3, -1]])

    def gate(x_TH: torch.Tensor, router_EH: torch.Tensor) -> torch.Tensor:
        return route(x_TH, router_EH, 2, renormalize=False, expert_of_TK=ids_TK).gate_TK

    assert torch.autograd.gradcheck(gate, (x_TH, router_EH))
    gate(x_TH, router_EH).sum().backward()
    assert router_EH.grad.abs().sum() > 0
