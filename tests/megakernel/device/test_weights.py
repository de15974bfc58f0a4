"""The one door for weights: every layout gives the same tile, and nothing beyond a matrix."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from megakernel.device.weights import load_weight
from megakernel.formats import Dense
from megakernel.launch.descriptors import as_operand
from megakernel.plan.buffers import SharedTensors
from megakernel.plan.rules import WeightRule
from tests.helpers.specs import PLAIN_SPEC

BLOCK, STEP = 16, 64
SPEC = replace(PLAIN_SPEC, step=STEP)


@triton.jit
def weight_kernel(weight, out, expert, row, column, W: tl.constexpr, C: tl.constexpr):
    tile = load_weight(weight, expert, row, column, W, C)
    place = tl.arange(0, C.step)[:, None] + tl.arange(0, W.columns)[None, :] * C.step
    tl.store(out + place, tile)


def load(weight, rule: WeightRule, expert: int, row: int, column: int = 0) -> torch.Tensor:
    """Return the rows that a task reads, [stacked, BLOCK, STEP]."""
    out = torch.full((rule.columns, STEP), torch.nan)
    weight_kernel[(1,)](weight, out, expert, row, column, W=rule, C=SPEC)
    return out.view(rule.stacked, BLOCK, STEP)


def expected_of(matrices: torch.Tensor, row: int, column: int = 0) -> torch.Tensor:
    """Return the same rows of [stacked, height, width], zero where there are none."""
    part = matrices[:, row : row + BLOCK, column : column + STEP]
    whole = torch.zeros(len(matrices), BLOCK, STEP)
    whole[:, : part.shape[1], : part.shape[2]] = part
    return whole


# Transposed in memory, height, width, and whether its rows there fit a descriptor.
LAYOUTS = {
    "plain": (False, 20, 50, False),
    "transposed": (True, 21, 52, False),
    "plain, by descriptor": (False, 21, 52, True),
    "transposed, by descriptor": (True, 20, 50, True),
}


@pytest.mark.parametrize(("transposed", "height", "width", "tma"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("row", [0, 16], ids=["first rows", "past the height"])
def test_every_layout_gives_the_experts_rows_and_zeros_around_them(
    transposed, height, width, tma, row
):
    weight = torch.randn(3, 2 * height, width)
    lying = weight.mT.contiguous().mT if transposed else weight
    rule = Dense(lying, transposed).rule(2, BLOCK, 16)
    assert (rule.tma, rule.transposed) == (tma, transposed)
    tile = load(as_operand(lying, rule, STEP), rule, 1, row)
    assert torch.equal(tile, expected_of(weight[1].view(2, height, width), row))


@pytest.mark.parametrize("stacked", [1, 2], ids=["up alone", "gate and up"])
def test_slices_of_a_shared_expert_lie_one_below_the_other_in_tensors_apart(stacked):
    """20 rows a slice; the second has 11, and past them nothing is there."""
    spec = replace(SPEC, intermediate=20, hidden=50, shared_width=31, block_i=BLOCK)
    spec = replace(spec, expert=replace(spec.expert, has_gate=stacked == 2))
    gate_JH, up_JH = torch.randn(31, 50), torch.randn(31, 50)
    weight = SharedTensors(gate_JH if stacked == 2 else None, up_JH)
    for expert, rows in ((0, slice(0, 20)), (1, slice(20, 31))):
        matrices = torch.stack([gate_JH, up_JH][-stacked:])[:, rows]
        for row in (0, 16):
            tile = load(weight, spec.shared_gate_up, expert, row)
            assert torch.equal(tile, expected_of(matrices, row))


def test_slices_of_a_shared_expert_lie_side_by_side_in_down():
    spec = replace(SPEC, intermediate=40, hidden=20, shared_width=90, block_h=BLOCK)
    down_HJ = torch.randn(20, 90)
    for expert, columns in enumerate((slice(0, 40), slice(40, 80), slice(80, 90))):
        tile = load(down_HJ, spec.shared_down, expert, 16)
        assert torch.equal(tile, expected_of(down_HJ[None, :, columns], 16))
