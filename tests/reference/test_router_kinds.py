"""Routers beyond softmax and top-k, by hand: groups, corrections, scales, capacity, draws."""

import pytest
import torch

from reference import choose, keep_best_groups, route, weigh
from reference.dropping import drop_over_capacity, drop_random_second, uniform
from reference.router import score


def logits_of(sigmoids: list[float]) -> torch.Tensor:
    """Return one token's logits with these sigmoids."""
    return torch.logit(torch.tensor([sigmoids], dtype=torch.float64))


def test_sigmoid_weights_by_hand():
    logits_TE = logits_of([0.5, 0.25, 0.75])
    ids_TK = torch.tensor([[2, 1]])
    plain = weigh(logits_TE, ids_TK, False, kind="sigmoid")
    torch.testing.assert_close(plain, torch.tensor([[0.75, 0.25]]).double())
    scaled = weigh(logits_TE, torch.tensor([[2, -1]]), False, kind="sigmoid", scale=2.0)
    torch.testing.assert_close(scaled, torch.tensor([[1.5, 0.0]]).double())
    shared = weigh(logits_TE, torch.tensor([[2, 0]]), True, kind="sigmoid", scale=2.5)
    torch.testing.assert_close(shared, torch.tensor([[1.5, 1.0]]).double())


def test_scores_of_nothing_renormalise_to_zero_and_not_to_nan():
    gate_TK = weigh(torch.full((1, 3), -1000.0), torch.tensor([[0, 1]]), True, kind="sigmoid")
    assert gate_TK.tolist() == [[0.0, 0.0]]


def test_the_best_group_has_the_largest_sum_of_its_two_best():
    """Group 0 holds the best expert, but groups 1 and 2 have two good ones."""
    score_TE = torch.tensor([[9.0, 0.0, 0.0, 5.0, 5.0, 5.0, 6.0, 4.1, 0.0]])
    kept_TE = keep_best_groups(score_TE, num_groups=3, top_groups=2)
    assert kept_TE.tolist() == [[False] * 3 + [True] * 6]


def test_groups_are_chosen_by_corrected_scores_and_weights_are_not_corrected():
    logits_TE = logits_of([0.9, 0.8, 0.3, 0.2])
    correction_E = torch.tensor([0.0, 0.0, 1.0, 1.0])
    out = route(
        torch.ones(1, 1).double(), logits_TE.T.contiguous(), 2, renormalize=False,
        kind="sigmoid", correction_bias_E=correction_E, groups=(2, 1),
    )  # fmt: skip
    assert out.expert_of_TK.tolist() == [[2, 3]]
    torch.testing.assert_close(out.gate_TK, torch.tensor([[0.3, 0.2]]).double())


def test_an_expert_outside_the_best_groups_is_never_chosen_however_low_the_others():
    logits_TE = torch.tensor([[5.0, 5.0, -torch.inf, 1.0, 1.0, 1.0]])
    correction_E = torch.tensor([0.0, 0.0, -torch.inf, 0.0, 0.0, 0.0])
    ids_TK = choose(
        logits_TE, 3, kind="sigmoid", correction_bias_E=correction_E, num_groups=2, top_groups=1
    )
    assert ids_TK.tolist() == [[0, 1, 2]]


def test_a_router_bias_changes_choices_and_weights():
    out = route(torch.ones(1, 1), torch.zeros(3, 1), 2, bias_E=torch.tensor([0.0, 2.0, 1.0]))
    assert out.expert_of_TK.tolist() == [[1, 2]]
    torch.testing.assert_close(out.gate_TK, torch.tensor([[2.0, 1.0]]).softmax(-1))
    assert out.load_E.tolist() == [0, 1, 1]


def test_a_float32_router_is_not_rounded_to_the_type_of_the_tokens():
    x_TH, weight_EH = torch.ones(1, 1).bfloat16(), torch.tensor([[1.0], [1.0 + 2**-20]])
    assert route(x_TH, weight_EH, 1).expert_of_TK.item() == 1


def test_capacity_drops_in_token_order():
    ids_TK = torch.tensor([[0, 1], [1, 0], [0, 2], [-1, 1]])
    assert drop_over_capacity(ids_TK, 2).tolist() == [[0, 1], [1, 0], [-1, 2], [-1, -1]]
    assert torch.equal(drop_over_capacity(ids_TK, 3), ids_TK)


def test_dropped_choices_have_no_weight_and_the_load_still_counts_them():
    out = route(torch.ones(3, 1), torch.tensor([[1.0], [0.0]]), 1, capacity=2)
    assert out.expert_of_TK.tolist() == [[0], [0], [-1]]
    assert out.gate_TK.tolist() == [[1.0], [1.0], [0.0]]
    assert out.load_E.tolist() == [3, 0]


def test_a_second_expert_serves_with_probability_twice_its_weight():
    num_tokens = 4000
    gate_T2 = torch.tensor([0.85, 0.15]).expand(num_tokens, 2)
    ids_T2 = torch.tensor([3, 5]).expand(num_tokens, 2)
    served_T2 = drop_random_second(ids_T2, gate_T2, seed=1) >= 0
    assert served_T2[:, 0].all()
    assert served_T2[:, 1].double().mean().item() == pytest.approx(0.3, abs=0.03)


def test_a_second_expert_of_half_the_weight_always_serves():
    half_T2 = torch.full((1000, 2), 0.5)
    ids_T2 = torch.tensor([3, 5]).expand(1000, 2)
    assert torch.equal(drop_random_second(ids_T2, half_T2, seed=1), ids_T2)


def test_draws_are_uniform_and_a_function_of_seed_and_index():
    draws = uniform(7, 10_000)
    assert torch.equal(draws[:10], uniform(7, 10)) and not torch.equal(draws, uniform(8, 10_000))
    assert float(draws.min()) >= 0 and float(draws.max()) < 1
    tenths = torch.bincount((draws * 10).long(), minlength=10)
    assert tenths.shape == (10,) and int((tenths - 1000).abs().max()) < 150


def test_an_unknown_score_is_refused():
    with pytest.raises(ValueError, match=r"kind.*softmax.*relu"):
        score(torch.zeros(1, 2), "relu")
