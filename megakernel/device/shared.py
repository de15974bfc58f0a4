"""Device functions of the shared expert, which serves every token.

Its width J is cut into slices as wide as a routed expert. The row tiles of the slices come first:
row ``slice · padded tokens + token`` holds one token's share, so no table and no wait is needed.

Its weights are read through pointers: with a third and fourth loop that uses TMA, Triton 3.6 lays
the loops' shared memory side by side instead of over one another, and one worker would fill an SM.
"""

import triton
import triton.language as tl

from megakernel.device.arithmetic import halves_of, sigmoid
from megakernel.device.ffn import product, store_h, store_halves, store_y


@triton.jit
def slice_of(tile, size, C: tl.constexpr):
    """Return a shared row tile's slice, tokens [block_rows], and which of them exist."""
    row_tiles = tl.cdiv(size.num_tokens, C.block_rows)
    token = tile % row_tiles * C.block_rows + tl.arange(0, C.block_rows)
    return tile // row_tiles, token, token < size.num_tokens


@triton.jit
def shared_ffn1_tile(tile, block, b, size, C: tl.constexpr):
    """Compute h for one row tile of the shared expert and one block of a slice.

    Reads: x_TH, its gate and up. Writes: h_CI; zero in columns past J; shared_z_S2I where a
    backward will want it, and in a backward that alone.
    """
    W: tl.constexpr = C.shared_gate_up
    slice_index, token, inside = slice_of(tile, size, C)
    x_start = b.x_TH + token.to(tl.int64) * C.hidden
    acc = product(x_start, inside, b.shared, slice_index, block * C.block_i, W, C)
    gate, up = halves_of(acc, W, C)
    if b.saved.shared_z_S2I is not None:
        row = slice_index * size.num_tokens + token
        first = block * C.block_i
        store_halves(b.saved.shared_z_S2I, row, inside, first, gate, up, W, C)
    if not C.is_backward:
        store_h(gate, up, tile, block, inside, b, W, C)


@triton.jit
def shared_ffn2_tile(tile, block, b, size, C: tl.constexpr):
    """Compute y for one row tile of the shared expert and one block of H.

    Reads: h_CI, its down. Writes: y_CH.
    """
    W: tl.constexpr = C.shared_down
    first_row = block * C.block_h
    if first_row < C.hidden:
        slice_index, _, inside = slice_of(tile, size, C)
        tile_row = tile * C.block_rows + tl.arange(0, C.block_rows)
        h_start = b.scratch.h_CI + tile_row.to(tl.int64) * C.intermediate
        acc = product(h_start, inside, b.shared.down_HJ, slice_index, first_row, W, C)
        store_y(acc, tile, block, inside, b, W, C)


@triton.jit
def store_token_gate(tile, b, size, C: tl.constexpr):
    """Write the shared expert's weight, sigmoid(token_gate · x), for one token tile."""
    token = tile * C.block_tokens + tl.arange(0, C.block_tokens)
    exists = token < size.num_tokens
    x_row = b.x_TH + token.to(tl.int64) * C.hidden
    total = tl.full(C.tokens_row, 0.0, tl.float32)
    for first_column in range(0, C.hidden, C.step):
        column = first_column + tl.arange(0, C.step)
        inside = column < C.hidden
        x = tl.load(
            x_row[:, None] + column[None, :], mask=exists[:, None] & inside[None, :], other=0.0
        )
        gate = tl.load(b.shared.token_gate_1H + column, mask=inside, other=0.0)
        total += tl.sum(x.to(tl.float32) * gate.to(tl.float32)[None, :], 1)
    tl.store(b.scratch.sigmoid_T + token, sigmoid(total), mask=exists)


@triton.jit
def shared_sum(b, token, exists, column, size, C: tl.constexpr):
    """Return the shared expert's weighted output [combine_tokens, block_h]: slices in order."""
    total = tl.full(C.combine_tile, 0.0, tl.float32)
    padded_tokens = tl.cdiv(size.num_tokens, C.block_rows) * C.block_rows
    for slice_index in range(C.num_slices):
        row = (slice_index * padded_tokens + token).to(tl.int64)
        total += tl.load(
            b.scratch.y_CH + row[:, None] * C.hidden + column[None, :],
            mask=exists[:, None] & (column < C.hidden)[None, :],
            other=0.0,
        ).to(tl.float32)
    if b.shared.token_gate_1H is not None:
        total *= tl.load(b.scratch.sigmoid_T + token, mask=exists, other=0.0)[:, None]
    return total
