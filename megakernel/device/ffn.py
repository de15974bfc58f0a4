"""Device functions of the expert FFN: one row tile and one block of columns each."""

import triton
import triton.language as tl

from megakernel.device.arithmetic import activated, dot, halves_of, rounded
from megakernel.device.weights import load_bias, load_weight
from megakernel.plan.order import ffn1_end_of, ffn2_end_of


@triton.jit
def load_rows(row_start, inside, column, WIDTH: tl.constexpr, C: tl.constexpr):
    """Load [rows, step] through row pointers; rows outside and columns past WIDTH are 0."""
    offset = column + tl.arange(0, C.step)
    mask = inside[:, None]
    if WIDTH % C.step != 0:
        mask = mask & (offset < WIDTH)[None, :]
    return tl.load(row_start[:, None] + offset[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(start, tile_row, inside, column, WIDTH: tl.constexpr, values, CACHE: tl.constexpr):
    """Store [rows, columns] of a row-major matrix."""
    place = start + tile_row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    mask = inside[:, None] & (column < WIDTH)[None, :]
    tl.store(place, values, mask=mask, eviction_policy=CACHE)


@triton.jit
def product(
    row_start, inside, weight, expert, first_row, W: tl.constexpr, C: tl.constexpr, before=None
):  # fmt: skip
    """Return rows · weightᵀ in float32, [tile_rows, columns of W].

    Args:
        row_start: [tile_rows of W] where rows of the left side start, each as wide as W says.
        inside: [tile_rows] which of them exist.
        weight, expert, first_row: see load_weight.
        before: what the product is added to; None for zero.
    """
    if before is None:  # noqa: SIM108  (known when compiling)
        acc = tl.full(W.acc_tile, 0.0, tl.float32)
    else:
        acc = before
    for column in tl.range(0, W.width, C.step, num_stages=C.num_stages):
        rows = load_rows(row_start, inside, column, W.width, C)
        # One product for gate and up: a wider B makes better use of shared memory bandwidth.
        acc = dot(rows, load_weight(weight, expert, first_row, column, W, C), acc, C)
    return acc


@triton.jit
def store_halves(z, row, inside, first, gate, up, W: tl.constexpr, C: tl.constexpr):
    """Store some columns of gate and up, or of up alone, in the order of gate_up's rows.

    Args:
        z: [.., rows of an expert's gate_up].
        row: which of its rows.
        inside: which of them exist.
        first: first column of I.
        gate, up: [rows, columns] float32.
        W: rule of gate_up.
    """
    WIDTH: tl.constexpr = W.stacked * W.height
    ROWS: tl.constexpr = up.shape[0]
    SPAN: tl.constexpr = up.shape[1] * C.expert.rows_per_column
    column = first * C.expert.rows_per_column + tl.arange(0, SPAN)
    inside = inside[:, None] & (column < W.height)[None, :]
    place = z + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    DTYPE: tl.constexpr = z.dtype.element_ty
    if W.stacked == 2:
        tl.store(place, rounded(gate, DTYPE, C), mask=inside)
        tl.store(place + W.height, rounded(up, DTYPE, C), mask=inside)
    elif C.expert.has_gate:  # they take turns
        both = tl.join(rounded(gate, DTYPE, C), rounded(up, DTYPE, C)).reshape((ROWS, SPAN))
        tl.store(place, both, mask=inside)
    else:
        tl.store(place, rounded(up, DTYPE, C), mask=inside)


@triton.jit
def store_h(gate, up, tile, block, inside, b, W: tl.constexpr, C: tl.constexpr):
    """Activate the sums of FFN1 and store them as one block of columns of h_CI."""
    h_CI = b.scratch.h_CI
    tile_row = tile * C.block_rows + tl.arange(0, W.tile_rows)
    column = block * C.block_i + tl.arange(0, C.block_i)
    h = rounded(activated(gate, up, C), h_CI.dtype.element_ty, C)
    store_rows(h_CI, tile_row, inside, column, C.intermediate, h, "")


@triton.jit
def store_y(acc, tile, block, inside, b, W: tl.constexpr, C: tl.constexpr):
    """Store the sums of FFN2 as one block of columns of y_CH."""
    y_CH = b.scratch.y_CH
    tile_row = tile * C.block_rows + tl.arange(0, W.tile_rows)
    column = block * C.block_h + tl.arange(0, C.block_h)
    y = rounded(acc, y_CH.dtype.element_ty, C)
    # Rows are scattered over tokens: the combine finds them in L2 if other stores leave first.
    KEPT: tl.constexpr = "evict_last" if C.cache_hints else ""
    store_rows(y_CH, tile_row, inside, column, C.hidden, y, KEPT)


@triton.jit
def ffn1_tile(
    tile, block, content, weight, b, size, W: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Compute h = activation(x · gateᵀ) * (x · upᵀ) for one row tile and its task's blocks of I.

    Reads: x_TH rows gathered through assignment_of_C, gate_up, its bias. Writes: h_CI, as many
    rows of the tile as W says; z_A2I where a backward will want it, and in a backward that alone.
    """
    expert, filled = content
    row = tl.arange(0, W.tile_rows)
    inside = row < filled
    place = b.rows.assignment_of_C + (tile - size.shared_tiles) * C.block_rows + row
    if C.reads_ahead:  # rows that hold nothing have a place too: no need to know first which do
        assignment = tl.where(inside, tl.load(place), 0)
    else:
        assignment = tl.load(place, mask=inside, other=0)
    x_start = b.x_TH + (assignment // C.top_k).to(tl.int64) * C.hidden
    # Flattened, the next block's first loads are under way while this one's sums are stored.
    FLAT: tl.constexpr = C.flattened and C.i_per_task > 1
    for i_block in tl.range(block, ffn1_end_of(block, size, C), flatten=FLAT):
        first_row = i_block * W.block
        acc = product(x_start, inside, weight, expert, first_row, W, C)
        if b.experts.gate_up_bias_E2I is not None:
            acc += load_bias(b.experts.gate_up_bias_E2I, expert, first_row, W)
        gate, up = halves_of(acc, W, C)
        if b.saved.z_A2I is not None:
            store_halves(b.saved.z_A2I, assignment, inside, i_block * C.block_i, gate, up, W, C)
        if not C.is_backward:
            store_h(gate, up, tile, i_block, inside, b, W, C)


@triton.jit
def ffn2_tile(
    tile, block, content, weight, b, size, W: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Compute y = h · downᵀ + bias for one row tile and its task's blocks of H.

    Reads: h_CI, down, its bias. Writes: y_CH, as many rows of the tile as W says.
    """
    expert, filled = content
    row = tl.arange(0, W.tile_rows)
    inside = row < filled
    h_start = b.scratch.h_CI + (tile * C.block_rows + row).to(tl.int64) * C.intermediate
    FLAT: tl.constexpr = C.flattened and C.h_per_task > 1
    for h_block in tl.range(block, ffn2_end_of(block, size, C), flatten=FLAT):
        first_row = h_block * W.block
        acc = product(h_start, inside, weight, expert, first_row, W, C)
        if b.experts.down_bias_EH is not None:
            acc += load_bias(b.experts.down_bias_EH, expert, first_row, W)
        store_y(acc, tile, h_block, inside, b, W, C)
