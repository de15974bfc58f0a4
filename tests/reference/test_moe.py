"""The layer by hand, then each faster form against the loop that nobody can doubt."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from torch.testing import assert_close

from reference import expert_ffn, moe, moe_by_expert, moe_by_token, route

# exp(-64) is lost beside 1 in float64, so silu(64) is exactly 64: whole numbers stay whole.
BIG = 64.0


class Layer(NamedTuple):
    """Arguments of moe_by_token and moe_by_expert, in their order."""

    x_TH: Tensor
    expert_of_TK: Tensor
    gate_TK: Tensor
    gate_up_E2IH: Tensor
    down_EHI: Tensor

    def to(self, dtype: torch.dtype) -> "Layer":
        """Round every floating tensor."""
        return Layer(*(v.to(dtype) if v.is_floating_point() else v for v in self))


def make_layer(T: int, H: int, I: int, E: int, K: int) -> Layer:
    """Random float64 tensors of unit scale, distinct ids in every token."""
    ids_TK = torch.rand(T, E).argsort(1)[:, :K]
    return Layer(
        torch.randn(T, H, dtype=torch.float64),
        ids_TK,
        torch.rand(T, K, dtype=torch.float64),
        torch.randn(E, 2 * I, H, dtype=torch.float64) / math.sqrt(H),
        torch.randn(E, H, I, dtype=torch.float64) / math.sqrt(I),
    )


def dense(layer: Layer) -> Tensor:
    """Run every expert on every token, and weigh by zero where it was not chosen."""
    x_TH, ids_TK, gate_TK, gate_up_E2IH, down_EHI = layer
    gate_ETI, up_ETI = torch.einsum("th,eih->eti", x_TH, gate_up_E2IH).chunk(2, dim=2)
    y_ETH = torch.einsum("eti,ehi->eth", silu(gate_ETI) * up_ETI, down_EHI)
    is_chosen_TKE = ids_TK[..., None] == torch.arange(len(down_EHI))
    return torch.einsum("tk,tke,eth->th", gate_TK, is_chosen_TKE.to(gate_TK), y_ETH)


def test_the_gate_rows_come_first_and_only_they_are_activated() -> None:
    x_1H = torch.tensor([[2.0]])
    gate_up_2IH, down_HI = torch.tensor([[0.5], [3.0]]), torch.tensor([[10.0]])
    wanted = 1.0 / (1.0 + math.exp(-1.0)) * 6.0 * 10.0
    assert expert_ffn(x_1H, gate_up_2IH, down_HI).item() == pytest.approx(wanted)


def whole_number_layer() -> Layer:
    """Two experts of one unit each: expert 0 gives 64 x, expert 1 gives 128 x."""
    return Layer(
        x_TH=torch.tensor([[1.0, 5.0], [1.0, 7.0]]),
        expert_of_TK=torch.tensor([[1, 0], [0, -1]]),
        gate_TK=torch.tensor([[3.0, 2.0], [4.0, 100.0]]),
        gate_up_E2IH=torch.tensor([[[BIG, 0.0], [0.0, 1.0]], [[BIG, 0.0], [0.0, 2.0]]]),
        down_EHI=torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]]),
    )


@pytest.mark.parametrize("form", [moe_by_token, moe_by_expert])
def test_whole_numbers_by_hand(form) -> None:
    # Token 0: 3 · expert 1 (64 · 10, in column 1) + 2 · expert 0 (64 · 5, in column 0).
    # Token 1: 4 · expert 0 (64 · 7); its second choice is none, at whatever weight.
    y_TH = form(*whole_number_layer().to(torch.float64))
    assert y_TH.tolist() == [[640.0, 1920.0], [1792.0, 0.0]]


CASES = [
    pytest.param((5, 8, 6, 4, 2), id="plain"),
    pytest.param((1, 8, 6, 4, 1), id="one-token-one-choice"),
    pytest.param((9, 7, 5, 3, 3), id="odd-widths-and-all-experts-chosen"),
    pytest.param((3, 4, 4, 64, 2), id="most-experts-empty"),
    pytest.param((40, 4, 4, 1, 1), id="one-expert-takes-all"),
    pytest.param((6, 1, 1, 5, 2), id="widths-of-one"),
    pytest.param((0, 4, 4, 3, 2), id="no-tokens"),
]


@pytest.mark.parametrize("sizes", CASES)
def test_by_expert_equals_by_token(sizes: tuple[int, ...]) -> None:
    layer = make_layer(*sizes)
    assert_close(moe_by_expert(*layer), moe_by_token(*layer), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", CASES)
def test_by_token_equals_the_dense_formulation(sizes: tuple[int, ...]) -> None:
    layer = make_layer(*sizes)
    assert_close(moe_by_token(*layer), dense(layer), rtol=1e-12, atol=1e-12)


# Unit of rounding times the handful of roundings on the way.
@pytest.mark.parametrize(
    ("dtype", "relative_error"),
    [(torch.float32, 1e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)],
    ids=str,
)
def test_by_expert_computes_in_the_dtype_of_x(dtype: torch.dtype, relative_error: float) -> None:
    layer = make_layer(30, 32, 16, 6, 3).to(dtype)
    y_TH = moe_by_expert(*layer)
    true_TH = moe_by_token(*layer)
    assert y_TH.dtype == dtype and true_TH.dtype == torch.float64
    assert (y_TH.double() - true_TH).norm() < relative_error * true_TH.norm()


@pytest.mark.parametrize("form", [moe_by_token, moe_by_expert])
def test_skipped_choices_add_nothing(form) -> None:
    layer = make_layer(4, 8, 6, 5, 3)
    layer.expert_of_TK[1, 0] = layer.expert_of_TK[2, :] = -1
    without_TK = layer.gate_TK * (layer.expert_of_TK >= 0)
    kept = layer._replace(expert_of_TK=layer.expert_of_TK.clamp(min=0), gate_TK=without_TK)
    y_TH = form(*layer)
    assert torch.equal(y_TH[2], torch.zeros(8, dtype=torch.float64))
    assert_close(y_TH, form(*kept), rtol=1e-12, atol=1e-12)


def test_all_choices_skipped() -> None:
    layer = make_layer(3, 4, 4, 5, 2)
    layer.expert_of_TK[:] = -1
    assert torch.equal(moe_by_token(*layer), torch.zeros(3, 4, dtype=torch.float64))
    assert torch.equal(moe_by_expert(*layer), torch.zeros(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("form", [moe_by_token, moe_by_expert])
def test_a_token_that_is_not_finite_stays_alone(form, bad: float) -> None:
    layer = make_layer(6, 8, 6, 4, 2)
    clean_TH = form(*layer)
    layer.x_TH[3, 1] = bad
    y_TH = form(*layer)
    others = [0, 1, 2, 4, 5]
    assert not y_TH[3].isfinite().any()
    assert_close(y_TH[others], clean_TH[others], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("form", [moe_by_token, moe_by_expert])
def test_renaming_the_experts_changes_nothing(form) -> None:
    layer = make_layer(12, 8, 6, 7, 3)
    new_of_E = torch.randperm(7)
    old_of_E = new_of_E.argsort()
    renamed = layer._replace(
        expert_of_TK=new_of_E[layer.expert_of_TK],
        gate_up_E2IH=layer.gate_up_E2IH[old_of_E],
        down_EHI=layer.down_EHI[old_of_E],
    )
    assert_close(form(*renamed), form(*layer), rtol=1e-12, atol=1e-12)


def test_by_expert_has_the_gradients_of_the_dense_formulation() -> None:
    layer = make_layer(10, 6, 4, 5, 2)
    layer.expert_of_TK[0, 1] = -1
    layer.expert_of_TK[layer.expert_of_TK == 3] = -1  # an expert without tokens
    floats = [v.requires_grad_() for v in layer if v.is_floating_point()]
    dy_TH = torch.randn(10, 6, dtype=torch.float64)
    wanted = torch.autograd.grad(dense(layer), floats, dy_TH)
    got = torch.autograd.grad(moe_by_expert(*layer), floats, dy_TH)
    for one, other in zip(got, wanted, strict=True):
        assert_close(one, other, rtol=1e-11, atol=1e-12)
    assert torch.equal(got[2][3], torch.zeros(8, 6, dtype=torch.float64))


@pytest.mark.parametrize("renormalize", [True, False])
def test_moe_is_the_gate_and_then_the_experts(renormalize: bool) -> None:
    layer = make_layer(9, 8, 6, 5, 2)
    router_EH = torch.randn(5, 8, dtype=torch.float64)
    weights = layer.gate_up_E2IH, layer.down_EHI
    y_TH = moe(layer.x_TH, router_EH, *weights, 2, renormalize=renormalize)
    routing = route(layer.x_TH, router_EH, 2, renormalize=renormalize)
    wanted_TH = moe_by_token(layer.x_TH, routing.expert_of_TK, routing.gate_TK, *weights)
    assert_close(y_TH, wanted_TH, rtol=1e-12, atol=1e-12)


def test_moe_with_replayed_ids_weighs_them_live() -> None:
    layer = make_layer(9, 8, 6, 5, 2)
    router_EH = torch.randn(5, 8, dtype=torch.float64)
    weights = layer.gate_up_E2IH, layer.down_EHI
    ids_TK = layer.expert_of_TK
    logit_TK = (layer.x_TH @ router_EH.T).gather(1, ids_TK)
    wanted_TH = moe_by_token(layer.x_TH, ids_TK, logit_TK.softmax(1), *weights)
    y_TH = moe(layer.x_TH, router_EH, *weights, 2, expert_of_TK=ids_TK)
    assert_close(y_TH, wanted_TH, rtol=1e-12, atol=1e-12)
