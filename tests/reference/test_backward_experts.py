"""The derivative of one expert: at kinks and limits, by whole numbers, and against autograd."""

import pytest
import torch
from torch.testing import assert_close

from reference.backward_experts import between_products_backward, expert_backward, slope
from reference.experts import ExpertKind, between_products

KINDS = [
    pytest.param(ExpertKind(activation, has_gate, interleaved, limit=1.5), id=name)
    for activation in ("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu")
    for has_gate, interleaved, name in (
        (False, False, f"{activation}-alone"),
        (True, False, f"{activation}-gate-rows-first"),
        (True, True, f"{activation}-interleaved"),
    )
    if has_gate or activation != "clamped_swiglu"
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_of_gate_and_up_has_the_slope_that_torch_says(kind: ExpertKind) -> None:
    """Values on, inside and far past the limit, and at the kink of relu."""
    values = torch.tensor([-30.0, -2.0, -1.5, -0.7, 0.0, 0.3, 1.5, 1.5000001, 30.0]).double()
    pairs_I2 = torch.cartesian_prod(values, values)
    z_2I = (pairs_I2 if kind.interleaved else pairs_I2.T).flatten()
    dh_I = torch.randn(len(z_2I) // 2 if kind.has_gate else len(z_2I), dtype=torch.float64)
    leaf = z_2I.clone().requires_grad_()
    wanted = torch.autograd.grad(between_products(leaf[None], kind)[0], leaf, dh_I)[0]
    assert_close(between_products_backward(z_2I, dh_I, kind), wanted, rtol=1e-14, atol=1e-14)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"activation.*silu.*tanh"):
        slope(torch.zeros(1), "tanh")


def whole_number_gradients(gate: float, down_bias: float | None = None) -> list[list[float]]:
    """x = (1, 2); z = (1·1 + 3·2, -1·1 + 0·2) = (7, -1), so h = (7, 0); down = (5, 11)."""
    tensors = [[1.0, 2.0], gate, [10.0], [[1.0, 3.0], [-1.0, 0.0]], [[5.0, 11.0]]]
    arguments = [torch.tensor(value).double() for value in tensors]
    bias_H = None if down_bias is None else torch.tensor([down_bias]).double()
    kind = ExpertKind("relu", has_gate=False)
    return [one.tolist() for one in expert_backward(*arguments, None, bias_H, kind)]


def test_one_token_for_one_expert_by_whole_numbers() -> None:
    """dy = 10 and the weight is 2: q = (50, 110), dz = 2 · (50, 0), dgate = 50 · 7."""
    dx, dgate, dgate_up, ddown, dgate_up_bias, ddown_bias = whole_number_gradients(2.0)
    assert dx == [100.0, 300.0] and dgate == 350.0
    assert dgate_up == [[100.0, 200.0], [0.0, 0.0]] and ddown == [[140.0, 0.0]]
    assert dgate_up_bias == [100.0, 0.0] and ddown_bias == [20.0]


def test_the_bias_of_the_second_product_counts_in_the_gradient_of_the_weight() -> None:
    assert whole_number_gradients(2.0, down_bias=3.0)[1] == 350.0 + 10.0 * 3.0


def test_a_weight_of_zero_still_has_a_gradient_and_gives_none() -> None:
    dx, dgate, dgate_up, ddown, _, ddown_bias = whole_number_gradients(0.0)
    assert dgate == 350.0
    assert dx == [0.0, 0.0] and dgate_up == [[0.0, 0.0]] * 2
    assert ddown == [[0.0, 0.0]] and ddown_bias == [0.0]
