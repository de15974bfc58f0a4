"""Kinds of experts by hand."""

import math

import pytest
import torch

from reference.experts import ExpertKind, between_products, expert_ffn, shared_ffn

ROW = torch.tensor([[-2.0, 3.0]])


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("silu", [-2 / (1 + math.exp(2)), 3 / (1 + math.exp(-3))]),
        ("gelu", [-(1 + math.erf(-math.sqrt(2))), 1.5 * (1 + math.erf(3 / math.sqrt(2)))]),
        ("relu", [0.0, 3.0]),
        ("relu2", [0.0, 9.0]),
    ],
)
def test_activations_without_a_gate(activation: str, expected: list[float]):
    h = between_products(ROW, ExpertKind(activation, has_gate=False))
    torch.testing.assert_close(h, torch.tensor([expected]))


def test_gate_rows_come_first_or_alternate():
    sums = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert between_products(sums, ExpertKind("relu")).tolist() == [[3.0, 8.0]]
    assert between_products(sums, ExpertKind("relu", interleaved=True)).tolist() == [[2.0, 12.0]]


def test_gpt_oss_clamps_the_gate_above_and_up_on_both_sides():
    kind = ExpertKind("clamped_swiglu", limit=2.0)
    h = between_products(torch.tensor([[9.0, -9.0, 1.0, 5.0, -5.0, 0.0]]), kind)
    expected = [3 * 2 / (1 + math.exp(-3.404)), -1 * -9 / (1 + math.exp(9 * 1.702)),
                1 / (1 + math.exp(-1.702))]  # fmt: skip
    torch.testing.assert_close(h, torch.tensor([expected]))


def test_biases_are_added_to_both_products():
    y = expert_ffn(
        torch.ones(1, 1), torch.tensor([[1.0]]), torch.tensor([[2.0]]),
        torch.tensor([0.5]), torch.tensor([10.0]), ExpertKind("relu", has_gate=False),
    )  # fmt: skip
    assert y.tolist() == [[13.0]]


def test_a_token_gate_weighs_the_shared_expert():
    x, one = torch.ones(1, 1), torch.ones(1, 1)
    kind = ExpertKind("relu")
    assert shared_ffn(x, one, 3 * one, one, kind=kind).item() == 3.0
    assert shared_ffn(x, one, 3 * one, one, 0 * one, kind).item() == 1.5
