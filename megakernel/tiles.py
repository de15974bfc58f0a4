"""Device functions of the expert FFN and the combine, one tile's work each."""

import triton
import triton.language as tl

from megakernel.dispatch import dot


@triton.jit
def load_weight(
    weight, first_row, num_rows, column, WIDTH: tl.constexpr, HEIGHT: tl.constexpr, C: tl.constexpr
):
    """Load [HEIGHT, step] of a weight matrix whose rows of all experts are stacked.

    By TMA the rows past ``num_rows`` are the next matrix's: callers drop those columns of the
    product. By pointers they are zero. Columns past WIDTH are zero either way.
    """
    if C.weight_tma:
        tile = weight.load([first_row, column])
    else:
        row = tl.arange(0, HEIGHT)
        offset = column + tl.arange(0, C.step)
        tile = tl.load(
            weight + (first_row + row).to(tl.int64)[:, None] * WIDTH + offset[None, :],
            mask=(row < num_rows)[:, None] & (offset < WIDTH)[None, :],
            other=0.0,
        )
    return tile


@triton.jit
def load_rows(row_start, inside, column, WIDTH: tl.constexpr, C: tl.constexpr):
    """Load [block_rows, step] through row pointers; rows outside and columns past WIDTH are 0."""
    offset = column + tl.arange(0, C.step)
    mask = inside[:, None]
    if WIDTH % C.step != 0:
        mask = mask & (offset < WIDTH)[None, :]
    return tl.load(row_start[:, None] + offset[None, :], mask=mask, other=0.0)


@triton.jit
def rounded(values, dtype: tl.constexpr, C: tl.constexpr):
    """Round float32 to the nearest value of ``dtype``, ties to even."""
    if C.interpreted and dtype == tl.bfloat16:  # the interpreter's own cast drops the low bits
        bits = values.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        values = tl.where(values == values, nearest, values)
    return values.to(dtype)


@triton.jit
def store_rows(start, tile_row, inside, column, WIDTH: tl.constexpr, values):
    """Store [block_rows, columns] of a row-major matrix."""
    place = start + tile_row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(place, values, mask=inside[:, None] & (column < WIDTH)[None, :])


@triton.jit
def ffn1_tile(tile, block, x_TH, gate_up, rows, h_CI, C: tl.constexpr):
    """Compute h = silu(x · gateᵀ) * (x · upᵀ) for one row tile and one block of I.

    Reads: x_TH rows gathered through assignment_of_C, gate_up. Writes: h_CI. Sums in float32.
    """
    num_rows = tl.load(rows.rows_of_tile + tile)
    if num_rows > 0:
        expert = tl.load(rows.expert_of_tile + tile)
        row = tl.arange(0, C.block_rows)
        inside = row < num_rows
        assignment = tl.load(
            rows.assignment_of_C + tile * C.block_rows + row, mask=inside, other=0
        )
        x_start = x_TH + (assignment // C.top_k).to(tl.int64) * C.hidden
        first = block * C.block_i
        gate_row = expert * (2 * C.intermediate) + first
        left = C.intermediate - first
        acc_gate = tl.full(C.ffn1_tile, 0.0, tl.float32)
        acc_up = tl.full(C.ffn1_tile, 0.0, tl.float32)
        for column in tl.range(0, C.hidden, C.step, num_stages=C.num_stages):
            x = load_rows(x_start, inside, column, C.hidden, C)
            gate = load_weight(gate_up, gate_row, left, column, C.hidden, C.block_i, C)
            up = load_weight(
                gate_up, gate_row + C.intermediate, left, column, C.hidden, C.block_i, C
            )
            acc_gate = dot(x, gate.T, acc_gate, C)
            acc_up = dot(x, up.T, acc_up, C)
        h = acc_gate / (1.0 + tl.exp(-acc_gate)) * acc_up
        column = first + tl.arange(0, C.block_i)
        store_rows(
            h_CI, tile * C.block_rows + row, inside, column, C.intermediate,
            rounded(h, h_CI.dtype.element_ty, C),
        )  # fmt: skip


@triton.jit
def ffn2_tile(tile, block, down, rows, h_CI, y_CH, C: tl.constexpr):
    """Compute y = h · downᵀ for one row tile and one block of H. Reads h_CI, writes y_CH."""
    num_rows = tl.load(rows.rows_of_tile + tile)
    first = block * C.block_h
    if (num_rows > 0) & (first < C.hidden):
        expert = tl.load(rows.expert_of_tile + tile)
        row = tl.arange(0, C.block_rows)
        inside = row < num_rows
        tile_row = tile * C.block_rows + row
        h_start = h_CI + tile_row.to(tl.int64) * C.intermediate
        acc = tl.full(C.ffn2_tile, 0.0, tl.float32)
        for column in tl.range(0, C.intermediate, C.step, num_stages=C.num_stages):
            h = load_rows(h_start, inside, column, C.intermediate, C)
            weight = load_weight(
                down, expert * C.hidden + first, C.hidden - first, column, C.intermediate,
                C.block_h, C,
            )  # fmt: skip
            acc = dot(h, weight.T, acc, C)
        column = first + tl.arange(0, C.block_h)
        store_rows(
            y_CH, tile_row, inside, column, C.hidden, rounded(acc, y_CH.dtype.element_ty, C)
        )


@triton.jit
def combine_tile(tile, group, gate_TK, row_of_TK, y_CH, y_TH, num_tokens, C: tl.constexpr):
    """Sum each token's K weighted rows in k order, in float32, rounded once.

    Reads: gate_TK, row_of_TK, y_CH. Writes: one column group of y_TH for one token tile.
    """
    token = tile * C.combine_tokens + tl.arange(0, C.combine_tokens)
    live = token < num_tokens
    for block in range(C.group_blocks):
        column = (group * C.group_blocks + block) * C.block_h + tl.arange(0, C.block_h)
        inside = (column < C.hidden)[None, :]
        acc = tl.full(C.combine_tile, 0.0, tl.float32)
        for k in range(C.top_k):
            place = token.to(tl.int64) * C.top_k + k
            row = tl.load(row_of_TK + place, mask=live, other=-1)
            held = row >= 0
            gate = tl.load(gate_TK + place, mask=held, other=0.0).to(tl.float32)
            y = tl.load(
                y_CH + row.to(tl.int64)[:, None] * C.hidden + column[None, :],
                mask=held[:, None] & inside,
                other=0.0,
            )
            acc += gate[:, None] * y.to(tl.float32)
        tl.store(
            y_TH + token.to(tl.int64)[:, None] * C.hidden + column[None, :],
            rounded(acc, y_TH.dtype.element_ty, C),
            mask=live[:, None] & inside,
        )
