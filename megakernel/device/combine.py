"""Device function of the combine: each token's rows, weighted and summed."""

import triton
import triton.language as tl

from megakernel.device.arithmetic import rounded
from megakernel.device.shared import shared_sum


@triton.jit
def routed_sum(b, token, exists, column, size, C: tl.constexpr):
    """Return the sum over k of gate · y row, in k order, float32 [combine_tokens, block_h]."""
    first_row = size.shared_tiles * C.block_rows
    USED_UP: tl.constexpr = "evict_first" if C.cache_hints else ""  # nobody reads a row again
    inside = (column < C.hidden)[None, :]
    acc = tl.full(C.combine_tile, 0.0, tl.float32)
    # Unrolled, the loads of several choices are in flight at once; the sum keeps its order.
    for k in tl.range(0, C.top_k, loop_unroll_factor=C.combine_unroll):
        place = token.to(tl.int64) * C.top_k + k
        row = tl.load(b.rows.row_of_TK + place, mask=exists, other=-1)
        held = row >= 0
        gate = tl.load(b.routing.gate_TK + place, mask=held, other=0.0).to(tl.float32)
        y = tl.load(
            b.scratch.y_CH + (first_row + row).to(tl.int64)[:, None] * C.hidden + column[None, :],
            mask=held[:, None] & inside,
            other=0.0,
            eviction_policy=USED_UP,
        )
        acc += gate[:, None] * y.to(tl.float32)
    return acc


@triton.jit
def combine_tile(tile, group, b, size, C: tl.constexpr):
    """Sum each token's K weighted rows in k order, in float32, rounded once.

    Reads: gate_TK, row_of_TK, y_CH; then the shared expert's rows and weight, if there is one.
    Writes: one column group of y_TH for one token tile.
    """
    token = tile * C.combine_tokens + tl.arange(0, C.combine_tokens)
    exists = token < size.num_tokens
    for block in range(C.group_blocks):
        column = (group * C.group_blocks + block) * C.block_h + tl.arange(0, C.block_h)
        acc = routed_sum(b, token, exists, column, size, C)
        if C.num_slices > 0:
            acc += shared_sum(b, token, exists, column, size, C)
        tl.store(
            b.y_TH + token.to(tl.int64)[:, None] * C.hidden + column[None, :],
            rounded(acc, b.y_TH.dtype.element_ty, C),
            mask=exists[:, None] & (column < C.hidden)[None, :],
        )
