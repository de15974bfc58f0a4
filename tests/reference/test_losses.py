"""Balance losses by hand: closed forms at perfect balance and at collapse."""

import math

import pytest
import torch

from reference.losses import balanced_correction_bias, gshard_loss, switch_loss

E, T = 8, 16
UNIFORM = torch.zeros(T, E)


def test_switch_loss_is_its_weight_at_perfect_balance():
    assert switch_loss(UNIFORM, torch.full((E,), 4), weight=0.01) == pytest.approx(0.01)


def test_gshard_loss_is_its_weight_over_e_squared_at_perfect_balance():
    ids_TK = torch.arange(T)[:, None] % E
    assert gshard_loss(UNIFORM, ids_TK, weight=1.0) == pytest.approx(1 / E**2)


def test_a_collapsed_router_pays_e_times_as_much():
    """All choices and all probability on expert 0: share 1 times probability 1."""
    logits_TE = torch.zeros(T, E)
    logits_TE[:, 0] = 1000.0
    load_E = torch.tensor([T] + [0] * (E - 1))
    assert switch_loss(logits_TE, load_E, weight=0.01) == pytest.approx(0.01 * E)
    ids_TK = torch.zeros(T, 1, dtype=torch.int64)
    assert gshard_loss(logits_TE, ids_TK, weight=1.0) == pytest.approx(1 / E)


def test_losses_of_two_experts_by_hand():
    """Probabilities 3/4 and 1/4; loads 3 and 1; first choices 1 and 1."""
    logits_TE = torch.tensor([[math.log(3.0), 0.0]] * 2)
    assert switch_loss(logits_TE, torch.tensor([3, 1]), weight=1.0) == pytest.approx(2 * 0.625)
    ids_TK = torch.tensor([[0, 1], [1, 0]])
    assert gshard_loss(logits_TE, ids_TK, weight=1.0) == pytest.approx(0.25)


def test_biases_move_towards_the_mean_load_by_the_rate_alone():
    bias_E = balanced_correction_bias(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([9, 3, 0]), 0.25)
    assert bias_E.tolist() == [0.25, 0.75, 0.75]
    at_mean = balanced_correction_bias(torch.zeros(3), torch.tensor([4, 4, 4]), 0.25)
    assert at_mean.tolist() == [0.0, 0.0, 0.0]
