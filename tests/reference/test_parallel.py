"""Ranks and slots change where an assignment is computed, never what comes out."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from reference import moe_by_expert, moe_by_rank, moe_by_token

T, H, I, E, K = 7, 6, 4, 5, 3


class Layer(NamedTuple):
    """One layer with its routing, no placement yet."""

    x_TH: Tensor
    expert_of_TK: Tensor
    gate_TK: Tensor
    gate_up_E2IH: Tensor
    down_EHI: Tensor

    def by_rank(self, slot_of_TK: Tensor, expert_of_P: Tensor, num_ranks: int) -> Tensor:
        """Run the layer under a placement."""
        x_TH, _, gate_TK, *weights = self
        return moe_by_rank(x_TH, slot_of_TK, gate_TK, *weights, expert_of_P, num_ranks)


@pytest.fixture
def layer() -> Layer:
    """Float32, where a changed order of a sum would show."""
    return make_layer()


def make_layer() -> Layer:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    ids_TK = torch.rand(T, E, generator=generator).argsort(1)[:, :K]
    return Layer(
        normal(T, H), ids_TK, normal(T, K).abs(), normal(E, 2 * I, H) / math.sqrt(H),
        normal(E, H, I) / math.sqrt(I),
    )  # fmt: skip


def test_a_row_goes_to_the_expert_of_its_slot_by_hand() -> None:
    # Slot 0 is empty, slots 1 and 3 hold expert 1, slot 2 holds expert 0; silu(64) is 64.
    expert_of_P = torch.tensor([-1, 1, 0, 1])
    y_TH = moe_by_rank(
        x_TH=torch.tensor([[1.0], [1.0]], dtype=torch.float64),
        slot_of_TK=torch.tensor([[3, 2], [1, -1]]),
        gate_TK=torch.tensor([[1.0, 10.0], [5.0, 7.0]]),
        gate_up_E2IH=torch.tensor([[[64.0], [1.0]], [[64.0], [2.0]]], dtype=torch.float64),
        down_EHI=torch.ones(2, 1, 1, dtype=torch.float64),
        expert_of_P=expert_of_P,
        num_ranks=2,
    )
    assert y_TH.tolist() == [[1.0 * 128 + 10.0 * 64], [5.0 * 128]]


def test_the_identity_placement_is_the_layer(layer: Layer) -> None:
    y_TH = layer.by_rank(layer.expert_of_TK, torch.arange(E), num_ranks=1)
    assert y_TH.dtype == torch.float32
    assert_close(y_TH.double(), moe_by_token(*layer), rtol=1e-5, atol=1e-6)
    assert_close(y_TH, moe_by_expert(*layer), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_ranks", [1, 2, 5, 10])
def test_the_number_of_ranks_changes_no_bit(layer: Layer, num_ranks: int) -> None:
    expert_of_P = torch.arange(10) % E
    one_TH = layer.by_rank(layer.expert_of_TK, expert_of_P, 1)
    assert torch.equal(layer.by_rank(layer.expert_of_TK, expert_of_P, num_ranks), one_TH)


@given(st.lists(st.integers(-1, E - 1), max_size=9), st.randoms(use_true_random=False))
def test_no_placement_changes_a_bit(extra: list[int], random) -> None:
    layer = make_layer()
    plain_TH = layer.by_rank(layer.expert_of_TK, torch.arange(E), 1)
    experts = [*range(E), *extra]
    random.shuffle(experts)
    slots_of_E = {e: [p for p, held in enumerate(experts) if held == e] for e in range(E)}
    slot_of_TK = torch.tensor(
        [[random.choice(slots_of_E[e]) for e in ids] for ids in layer.expert_of_TK.tolist()]
    )
    num_ranks = random.choice([r for r in range(1, 15) if len(experts) % r == 0])
    placed_TH = layer.by_rank(slot_of_TK, torch.tensor(experts), num_ranks)
    assert torch.equal(placed_TH, plain_TH)


def test_skipped_choices_add_nothing(layer: Layer) -> None:
    layer.expert_of_TK[2, :] = layer.expert_of_TK[4, 1] = -1
    y_TH = layer.by_rank(layer.expert_of_TK, torch.arange(E), 5)
    assert torch.equal(y_TH[2], torch.zeros(H))
    assert_close(y_TH.double(), moe_by_token(*layer), rtol=1e-5, atol=1e-6)


def test_no_tokens(layer: Layer) -> None:
    none = layer._replace(x_TH=layer.x_TH[:0], gate_TK=layer.gate_TK[:0])
    assert none.by_rank(layer.expert_of_TK[:0], torch.arange(E), 1).shape == (0, H)


def test_a_token_that_is_not_finite_stays_alone(layer: Layer) -> None:
    clean_TH = layer.by_rank(layer.expert_of_TK, torch.arange(E), 1)
    layer.x_TH[3] = math.nan
    y_TH = layer.by_rank(layer.expert_of_TK, torch.arange(E), 1)
    others = [0, 1, 2, 4, 5, 6]
    assert y_TH[3].isnan().all()
    assert torch.equal(y_TH[others], clean_TH[others])


def test_uneven_ranks_are_refused(layer: Layer) -> None:
    with pytest.raises(ValueError, match="num_ranks must divide the 5 slots, got 2"):
        layer.by_rank(layer.expert_of_TK, torch.arange(E), 2)


def test_an_empty_slot_serves_nobody(layer: Layer) -> None:
    expert_of_P = torch.tensor([0, 1, 2, 3, -1])
    with pytest.raises(ValueError, match="slot_of_TK must point to slots that hold an expert"):
        layer.by_rank(layer.expert_of_TK, expert_of_P, 1)


def test_the_weight_of_a_skipped_choice_is_ignored_even_if_nan() -> None:
    x_TH, gate_up_E2IH, down_EHI = torch.randn(1, 4), torch.randn(1, 6, 4), torch.randn(1, 4, 3)
    slot_TK, gate_TK = torch.tensor([[0, -1]]), torch.tensor([[0.5, torch.nan]])
    expert_of_P = torch.tensor([0])
    y_TH = moe_by_rank(x_TH, slot_TK, gate_TK, gate_up_E2IH, down_EHI, expert_of_P, 1)
    assert y_TH.isfinite().all()
