"""The one door for weights: every product reads its right side here, whatever its layout.

A weight is a tensor, a descriptor for the copy engine, or a pair of tensors where gate and up lie
apart; its :class:`megakernel.plan.rules.WeightRule` says which.
"""

import triton
import triton.language as tl


@triton.jit
def load_weight(weight, expert, first_row, column, W: tl.constexpr, C: tl.constexpr):
    """Load ``block`` rows of each of an expert's matrices, ``step`` columns of them.

    Returns them as the right side of a product, [step, stacked · block]. Rows and columns that a
    matrix does not have are zero, by TMA and by pointers.
    """
    ROWS: tl.constexpr = W.columns
    STEP: tl.constexpr = C.step
    if W.tma and W.transposed:
        tile = weight.load([expert, column, 0, first_row]).reshape([STEP, ROWS])
    elif W.tma:
        tile = weight.load([expert * W.stacked, first_row, column]).reshape([ROWS, STEP]).T
    else:
        row_start, row_exists = rows_of_weight(weight, expert, first_row, W)
        offset = column + tl.arange(0, STEP)
        exists = offset < W.width
        if W.most_columns > 0:
            exists = exists & (expert * W.width + offset < W.most_columns)
        if W.transposed:
            place = (offset.to(tl.int64) * W.column_stride)[:, None] + row_start[None, :]
            tile = tl.load(place, mask=exists[:, None] & row_exists[None, :], other=0.0)
        else:
            mask = row_exists[:, None]
            if (W.width % STEP != 0) | (W.most_columns > 0):
                mask = mask & exists[None, :]
            tile = tl.load(row_start[:, None] + offset[None, :], mask=mask, other=0.0).T
    return tile


@triton.jit
def rows_of_weight(weight, expert, first_row, W: tl.constexpr):
    """Return where the rows of a task's matrices start, and which of them exist: [columns]."""
    index = tl.arange(0, W.columns)
    row = first_row + index % W.block
    offset = expert.to(tl.int64) * W.expert_stride + row.to(tl.int64) * W.row_stride
    exists = row < W.height
    if W.most_rows > 0:
        exists = exists & (expert * W.height + row < W.most_rows)
    if not W.apart:
        start = weight + offset + (index // W.block).to(tl.int64) * W.stack_stride
    elif W.stacked == 2:
        start = tl.where(index < W.block, weight.gate_JH + offset, weight.up_JH + offset)
    else:
        start = weight.up_JH + offset
    return start, exists


@triton.jit
def load_bias(bias, expert, first_row, W: tl.constexpr):
    """Load what belongs to the rows of :func:`load_weight` as float32 [1, stacked · block]."""
    index = tl.arange(0, W.columns)
    row = first_row + index % W.block
    place = (expert * W.stacked + index // W.block).to(tl.int64) * W.height + row
    return tl.load(bias + place, mask=row < W.height, other=0.0).to(tl.float32)[None, :]
