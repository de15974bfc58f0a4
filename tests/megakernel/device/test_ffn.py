"""Device functions of the expert FFN on their own: addresses past 32 bits."""

import torch
import triton
import triton.language as tl

from megakernel.device.ffn import store_rows
from tests.helpers.far import FAR_ROW, WIDTH, as_row, reserve


@triton.jit
def store_kernel(start, first_row, values, WIDTH: tl.constexpr):
    row = first_row + tl.arange(0, 16)
    column = tl.arange(0, WIDTH)
    store_rows(start, row, row == first_row, column, WIDTH, tl.load(values + column)[None, :], "")


def test_rows_are_stored_past_2_to_the_31_elements():
    reserved = reserve(FAR_ROW + 16)
    values = torch.arange(float(WIDTH))
    store_kernel[(1,)](as_row(reserved, 0), FAR_ROW, values, WIDTH=WIDTH)
    assert torch.equal(as_row(reserved, FAR_ROW), values)
