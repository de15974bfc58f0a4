"""Device functions of the shared expert, which serves every token.

Its width J is cut into slices as wide as a routed expert. The row tiles of the slices come first:
row ``slice · padded tokens + token`` holds one token's share, so no table and no wait is needed.

Weights are read through pointers: with a third and fourth loop that uses TMA, Triton 3.6 lays the
loops' shared memory side by side instead of over one another, and one worker would fill an SM.
"""

import triton
import triton.language as tl

from megakernel.device.arithmetic import activate, dot, gated, rounded
from megakernel.device.ffn import ffn1_tile, ffn2_tile, load_rows, store_rows
from megakernel.plan.schedule import count_shared_tiles


@triton.jit
def slice_of(tile, num_tokens, C: tl.constexpr):
    """Return a shared row tile's slice, tokens, and which of them exist."""
    row_tiles = (num_tokens + C.block_rows - 1) // C.block_rows
    token = tile % row_tiles * C.block_rows + tl.arange(0, C.block_rows)
    return tile // row_tiles, token, token < num_tokens


@triton.jit
def row_pointers(shared_gate, shared_up, first_row, C: tl.constexpr):
    """Return where the rows of one block of gate and up start, and which of them exist."""
    index = tl.arange(0, C.shared_ffn1_tile[1])
    row = first_row + index % C.block_i
    start = shared_up + row.to(tl.int64) * C.hidden
    if C.expert.has_gate:
        start = tl.where(index < C.block_i, shared_gate + row.to(tl.int64) * C.hidden, start)
    return start, row < C.shared_width


@triton.jit
def shared_ffn1_tile(
    tile, block, x_TH, shared_gate, shared_up, h_CI, num_tokens, C: tl.constexpr
):  # fmt: skip
    """Compute h for one row tile of the shared expert and one block of a slice.

    Reads: x_TH, shared_gate and shared_up. Writes: h_CI; zero in columns past J.
    """
    slice_index, token, inside = slice_of(tile, num_tokens, C)
    x_start = x_TH + token.to(tl.int64) * C.hidden
    first_row = slice_index * C.intermediate + block * C.block_i
    weight_start, exists = row_pointers(shared_gate, shared_up, first_row, C)
    acc = tl.full(C.shared_ffn1_tile, 0.0, tl.float32)
    for column in tl.range(0, C.hidden, C.step, num_stages=C.num_stages):
        x = load_rows(x_start, inside, column, C.hidden, C)
        # Two matrices as one operand, so that this product has the shape of a routed one.
        weights = load_rows(weight_start, exists, column, C.hidden, C)
        acc = dot(x, weights.T, acc, C)
    if C.expert.has_gate:
        gate, up = tl.split(tl.permute(acc.reshape(C.shared_ffn1_halves), (0, 2, 1)))
        h = gated(gate, up, C)
    else:
        h = activate(acc, C)
    store_rows(
        h_CI, tile * C.block_rows + tl.arange(0, C.block_rows), inside,
        block * C.block_i + tl.arange(0, C.block_i), C.intermediate,
        rounded(h, h_CI.dtype.element_ty, C),
    )  # fmt: skip


@triton.jit
def load_slice(row_start, exists, column, width, C: tl.constexpr):
    """Load [rows, step] of a slice of down; rows and columns that it does not have are zero."""
    if C.shared_width % C.intermediate == 0:
        tile = load_rows(row_start, exists, column, C.intermediate, C)
    else:
        offset = column + tl.arange(0, C.step)
        mask = exists[:, None] & (offset < width)[None, :]
        tile = tl.load(row_start[:, None] + offset[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def shared_ffn2_tile(tile, block, shared_down, h_CI, y_CH, num_tokens, C: tl.constexpr):
    """Compute y for one row tile of the shared expert and one block of H.

    Reads: h_CI, shared_down. Writes: y_CH.
    """
    first = block * C.block_h
    if first < C.hidden:
        slice_index, _, inside = slice_of(tile, num_tokens, C)
        tile_row = tile * C.block_rows + tl.arange(0, C.block_rows)
        h_start = h_CI + tile_row.to(tl.int64) * C.intermediate
        first_column = slice_index * C.intermediate
        width = tl.minimum(C.shared_width - first_column, C.intermediate)
        out = first + tl.arange(0, C.block_h)
        weight_start = shared_down + out.to(tl.int64) * C.shared_width + first_column
        acc = tl.full(C.ffn2_tile, 0.0, tl.float32)
        for column in tl.range(0, C.intermediate, C.step, num_stages=C.num_stages):
            h = load_rows(h_start, inside, column, C.intermediate, C)
            weights = load_slice(weight_start, out < C.hidden, column, width, C)
            acc = dot(h, weights.T, acc, C)
        store_rows(y_CH, tile_row, inside, out, C.hidden, rounded(acc, y_CH.dtype.element_ty, C))


@triton.jit
def routed_rows(matrix, num_tokens, WIDTH: tl.constexpr, C: tl.constexpr):
    """Return where the rows of the routed experts start in scratch."""
    if C.num_slices > 0:
        first_row = count_shared_tiles(num_tokens, C) * C.block_rows
        matrix += first_row.to(tl.int64) * WIDTH
    return matrix


@triton.jit
def ffn1_of(
    tile, block, x_TH, gate_up, biases, shared_gate, shared_up, rows, h_CI, num_tokens,
    C: tl.constexpr,
):  # fmt: skip
    """Run an FFN1 task, of the shared expert or of a routed one."""
    if C.num_slices == 0:
        ffn1_tile(tile, block, x_TH, gate_up, biases, rows, h_CI, C)
    else:
        num_shared = count_shared_tiles(num_tokens, C)
        if tile < num_shared:
            shared_ffn1_tile(tile, block, x_TH, shared_gate, shared_up, h_CI, num_tokens, C)
        else:
            h_routed = routed_rows(h_CI, num_tokens, C.intermediate, C)
            ffn1_tile(tile - num_shared, block, x_TH, gate_up, biases, rows, h_routed, C)


@triton.jit
def ffn2_of(tile, block, down, biases, shared_down, rows, h_CI, y_CH, num_tokens, C: tl.constexpr):
    """Run an FFN2 task, of the shared expert or of a routed one."""
    if C.num_slices == 0:
        ffn2_tile(tile, block, down, biases, rows, h_CI, y_CH, C)
    else:
        num_shared = count_shared_tiles(num_tokens, C)
        if tile < num_shared:
            shared_ffn2_tile(tile, block, shared_down, h_CI, y_CH, num_tokens, C)
        else:
            h_routed = routed_rows(h_CI, num_tokens, C.intermediate, C)
            y_routed = routed_rows(y_CH, num_tokens, C.hidden, C)
            ffn2_tile(tile - num_shared, block, down, biases, rows, h_routed, y_routed, C)
