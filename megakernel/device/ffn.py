"""Device functions of the expert FFN: one row tile and one block of columns each."""

import triton
import triton.language as tl

from megakernel.device.arithmetic import activated, dot, rounded
from megakernel.device.weights import load_bias, load_weight


@triton.jit
def load_rows(row_start, inside, column, WIDTH: tl.constexpr, C: tl.constexpr):
    """Load [block_rows, step] through row pointers; rows outside and columns past WIDTH are 0."""
    offset = column + tl.arange(0, C.step)
    mask = inside[:, None]
    if WIDTH % C.step != 0:
        mask = mask & (offset < WIDTH)[None, :]
    return tl.load(row_start[:, None] + offset[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(start, tile_row, inside, column, WIDTH: tl.constexpr, values):
    """Store [block_rows, columns] of a row-major matrix."""
    place = start + tile_row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(place, values, mask=inside[:, None] & (column < WIDTH)[None, :])


@triton.jit
def product(row_start, inside, weight, expert, first_row, W: tl.constexpr, C: tl.constexpr):
    """Return rows · weightᵀ in float32, [block_rows, columns of W].

    Args:
        row_start: [block_rows] where rows of the left side start, each as wide as W says.
        inside: [block_rows] which of them exist.
        weight, expert, first_row: see load_weight.
    """
    acc = tl.full(W.acc_tile, 0.0, tl.float32)
    for column in tl.range(0, W.width, C.step, num_stages=C.num_stages):
        rows = load_rows(row_start, inside, column, W.width, C)
        # One product for gate and up: a wider B makes better use of shared memory bandwidth.
        acc = dot(rows, load_weight(weight, expert, first_row, column, W, C), acc, C)
    return acc


@triton.jit
def store_h(acc, tile, block, inside, b, INTERLEAVED: tl.constexpr, C: tl.constexpr):
    """Activate the sums of FFN1 and store them as one block of columns of h_CI."""
    h_CI = b.scratch.h_CI
    tile_row = tile * C.block_rows + tl.arange(0, C.block_rows)
    column = block * C.block_i + tl.arange(0, C.block_i)
    h = rounded(activated(acc, INTERLEAVED, C), h_CI.dtype.element_ty, C)
    store_rows(h_CI, tile_row, inside, column, C.intermediate, h)


@triton.jit
def store_y(acc, tile, block, inside, b, C: tl.constexpr):
    """Store the sums of FFN2 as one block of columns of y_CH."""
    y_CH = b.scratch.y_CH
    tile_row = tile * C.block_rows + tl.arange(0, C.block_rows)
    column = block * C.block_h + tl.arange(0, C.block_h)
    store_rows(y_CH, tile_row, inside, column, C.hidden, rounded(acc, y_CH.dtype.element_ty, C))


@triton.jit
def ffn1_tile(tile, block, gate_up_E2IH, b, size, C: tl.constexpr):
    """Compute h = activation(x · gateᵀ) * (x · upᵀ) for one row tile and one block of I.

    Reads: x_TH rows gathered through assignment_of_C, gate_up, its bias. Writes: h_CI.
    """
    W: tl.constexpr = C.gate_up
    routed_tile = tile - size.shared_tiles
    row = tl.arange(0, C.block_rows)
    inside = row < tl.load(b.rows.rows_of_tile + routed_tile)
    expert = tl.load(b.rows.expert_of_tile + routed_tile)
    place = b.rows.assignment_of_C + routed_tile * C.block_rows + row
    assignment = tl.load(place, mask=inside, other=0)
    x_start = b.x_TH + (assignment // C.top_k).to(tl.int64) * C.hidden
    first_row = block * W.block
    acc = product(x_start, inside, gate_up_E2IH, expert, first_row, W, C)
    if b.experts.gate_up_bias_E2I is not None:
        acc += load_bias(b.experts.gate_up_bias_E2I, expert, first_row, W)
    store_h(acc, tile, block, inside, b, C.expert.interleaved, C)


@triton.jit
def ffn2_tile(tile, block, down_EHI, b, size, C: tl.constexpr):
    """Compute y = h · downᵀ + bias for one row tile and one block of H.

    Reads: h_CI, down, its bias. Writes: y_CH.
    """
    W: tl.constexpr = C.down
    first_row = block * C.block_h
    if first_row < C.hidden:
        routed_tile = tile - size.shared_tiles
        row = tl.arange(0, C.block_rows)
        inside = row < tl.load(b.rows.rows_of_tile + routed_tile)
        expert = tl.load(b.rows.expert_of_tile + routed_tile)
        h_start = b.scratch.h_CI + (tile * C.block_rows + row).to(tl.int64) * C.intermediate
        acc = product(h_start, inside, down_EHI, expert, first_row, W, C)
        if b.experts.down_bias_EH is not None:
            acc += load_bias(b.experts.down_bias_EH, expert, first_row, W)
        store_y(acc, tile, block, inside, b, C)
