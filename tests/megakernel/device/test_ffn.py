"""Device functions of the expert FFN on their own: addresses past 32 bits, edges of weights."""

from dataclasses import replace

import numpy as np
import torch
import triton
import triton.language as tl

from megakernel.device.ffn import combine_tile, load_weight, store_rows
from tests.helpers.specs import PLAIN_SPEC

WIDTH = 64
FAR_ROW = 90_000_000  # starts at element 5.76e9; the memory before it is reserved, never touched


def reserve(num_rows: int) -> np.ndarray:
    """Return virtual memory for rows of WIDTH float32: a page exists once it is written."""
    return np.empty(num_rows * WIDTH, dtype=np.float32)


def as_row(reserved: np.ndarray, row: int) -> torch.Tensor:
    """Return a tensor on one row, whose storage is that row alone."""
    return torch.from_numpy(reserved[row * WIDTH : (row + 1) * WIDTH])


@triton.jit
def combine_kernel(gate_TK, row_of_TK, y_CH, y_TH, C: tl.constexpr):
    combine_tile(0, 0, gate_TK, row_of_TK, y_CH, y_TH, 1, C)


@triton.jit
def store_kernel(start, first_row, values, WIDTH: tl.constexpr):
    row = first_row + tl.arange(0, 16)
    column = tl.arange(0, WIDTH)
    store_rows(start, row, row == first_row, column, WIDTH, tl.load(values + column)[None, :])


@triton.jit
def weight_kernel(weight, out, expert, row, HEIGHT: tl.constexpr, C: tl.constexpr):
    tile = load_weight(weight, expert, row, 0, 2, 16, HEIGHT, 50, False, C)
    place = tl.arange(0, 64)[:, None] + tl.arange(0, 32)[None, :] * 64
    tl.store(out + place, tile)


def test_combine_reads_rows_past_2_to_the_31_elements():
    reserved = reserve(FAR_ROW + 1)
    as_row(reserved, FAR_ROW)[:] = torch.arange(float(WIDTH))
    y_TH = torch.zeros(1, WIDTH)
    spec = replace(PLAIN_SPEC, hidden=WIDTH, block_h=WIDTH, column_groups=1, top_k=1)
    row_of_TK = torch.tensor([[FAR_ROW]], dtype=torch.int32)
    combine_kernel[(1,)](torch.ones(1, 1), row_of_TK, as_row(reserved, 0), y_TH, C=spec)
    assert torch.equal(y_TH[0], torch.arange(float(WIDTH)))


def test_rows_are_stored_past_2_to_the_31_elements():
    reserved = reserve(FAR_ROW + 16)
    values = torch.arange(float(WIDTH))
    store_kernel[(1,)](as_row(reserved, 0), FAR_ROW, values, WIDTH=WIDTH)
    assert torch.equal(as_row(reserved, FAR_ROW), values)


def test_weights_past_height_and_width_are_zero_and_never_the_next_matrix():
    weight = torch.randn(6, 20, 50)
    out = torch.full((32, 64), torch.nan)
    spec = replace(PLAIN_SPEC, weight_tma=False, step=64)
    weight_kernel[(1,)](weight, out, 1, 16, HEIGHT=20, C=spec)
    expected = torch.zeros(2, 16, 64)
    expected[:, :4, :50] = weight[2:4, 16:]
    assert torch.equal(out.view(2, 16, 64), expected)
