"""Device functions of the expert FFN and the combine, one tile's work each."""

import triton
import triton.language as tl

from megakernel.device.arithmetic import activate, dot, gated, rounded


@triton.jit
def load_weight(
    weight, expert, first_row, column,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Load BLOCK rows of each of an expert's COUNT matrices [HEIGHT, WIDTH], stacked.

    Returns them as the right side of a product, [step, COUNT · BLOCK]. Rows past HEIGHT and
    columns past WIDTH are zero, by TMA and by pointers.
    """
    if TRANSPOSED:
        tile = load_upright(weight, expert, first_row, column, COUNT, BLOCK, HEIGHT, WIDTH, C)
    else:
        tile = load_stacked(weight, expert, first_row, column, COUNT, BLOCK, HEIGHT, WIDTH, C).T
    return tile


@triton.jit
def load_stacked(
    weight, expert, first_row, column,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Load [COUNT · BLOCK, step] where the depth of the product lies along rows."""
    ROWS: tl.constexpr = COUNT * BLOCK
    STEP: tl.constexpr = C.step
    matrix = expert * COUNT
    if C.weight_tma:
        tile = weight.load([matrix, first_row, column]).reshape([ROWS, STEP])
    else:
        index = tl.arange(0, ROWS)
        row = first_row + index % BLOCK
        offset = column + tl.arange(0, STEP)
        start = ((matrix + index // BLOCK).to(tl.int64) * HEIGHT + row) * WIDTH
        tile = tl.load(
            weight + start[:, None] + offset[None, :],
            mask=(row < HEIGHT)[:, None] & (offset < WIDTH)[None, :],
            other=0.0,
        )
    return tile


@triton.jit
def load_upright(
    weight, expert, first_row, column,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Load [step, COUNT · BLOCK] where the depth of the product lies along columns."""
    ROWS: tl.constexpr = COUNT * BLOCK
    STEP: tl.constexpr = C.step
    if C.weight_tma:
        tile = weight.load([expert, column, 0, first_row]).reshape([STEP, ROWS])
    else:
        index = tl.arange(0, ROWS)
        row = first_row + index % BLOCK
        offset = column + tl.arange(0, STEP)
        start = (expert.to(tl.int64) * WIDTH + offset) * (COUNT * HEIGHT)
        tile = tl.load(
            weight + start[:, None] + (index // BLOCK * HEIGHT + row)[None, :],
            mask=(offset < WIDTH)[:, None] & (row < HEIGHT)[None, :],
            other=0.0,
        )
    return tile


@triton.jit
def load_bias(
    bias, expert, first_row, COUNT: tl.constexpr, BLOCK: tl.constexpr, HEIGHT: tl.constexpr
):
    """Load what belongs to the rows of :func:`load_weight` as float32 [1, COUNT · BLOCK]."""
    index = tl.arange(0, COUNT * BLOCK)
    row = first_row + index % BLOCK
    place = (expert * COUNT + index // BLOCK).to(tl.int64) * HEIGHT + row
    return tl.load(bias + place, mask=row < HEIGHT, other=0.0).to(tl.float32)[None, :]


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
def activated(acc, C: tl.constexpr):
    """Turn the sums of an FFN1 tile into h, [block_rows, block_i]."""
    if C.expert.has_gate:
        halves = acc.reshape(C.ffn1_halves)
        if not C.expert.interleaved:
            halves = tl.permute(halves, (0, 2, 1))
        gate, up = tl.split(halves)
        h = gated(gate, up, C)
    else:
        h = activate(acc, C)
    return h


@triton.jit
def ffn1_tile(tile, block, x_TH, gate_up, biases, rows, h_CI, C: tl.constexpr):
    """Compute h = activation(x · gateᵀ) * (x · upᵀ) for one row tile and one block of I.

    Reads: x_TH rows gathered through assignment_of_C, gate_up, its bias. Writes: h_CI. Sums in
    float32.
    """
    num_rows = tl.load(rows.rows_of_tile + tile)
    expert = tl.load(rows.expert_of_tile + tile)
    row = tl.arange(0, C.block_rows)
    inside = row < num_rows
    assignment = tl.load(rows.assignment_of_C + tile * C.block_rows + row, mask=inside, other=0)
    x_start = x_TH + (assignment // C.top_k).to(tl.int64) * C.hidden
    first = block * C.block_i
    first_row = block * C.gate_up_block
    acc = tl.full(C.ffn1_tile, 0.0, tl.float32)
    for column in tl.range(0, C.hidden, C.step, num_stages=C.num_stages):
        x = load_rows(x_start, inside, column, C.hidden, C)
        # One product for gate and up: a wider B makes better use of shared memory bandwidth.
        weights = load_weight(
            gate_up, expert, first_row, column, C.expert.stacked, C.gate_up_block,
            C.gate_up_height, C.hidden, C.expert.gate_up_transposed, C,
        )  # fmt: skip
        acc = dot(x, weights, acc, C)
    if biases.gate_up_E2I is not None:
        acc += load_bias(
            biases.gate_up_E2I, expert, first_row, C.expert.stacked, C.gate_up_block,
            C.gate_up_height,
        )  # fmt: skip
    h = activated(acc, C)
    column = first + tl.arange(0, C.block_i)
    store_rows(
        h_CI, tile * C.block_rows + row, inside, column, C.intermediate,
        rounded(h, h_CI.dtype.element_ty, C),
    )  # fmt: skip


@triton.jit
def ffn2_tile(tile, block, down, biases, rows, h_CI, y_CH, C: tl.constexpr):
    """Compute y = h · downᵀ + bias for one row tile and one block of H.

    Reads: h_CI, down, its bias. Writes: y_CH.
    """
    first = block * C.block_h
    if first < C.hidden:
        num_rows = tl.load(rows.rows_of_tile + tile)
        expert = tl.load(rows.expert_of_tile + tile)
        row = tl.arange(0, C.block_rows)
        inside = row < num_rows
        tile_row = tile * C.block_rows + row
        h_start = h_CI + tile_row.to(tl.int64) * C.intermediate
        acc = tl.full(C.ffn2_tile, 0.0, tl.float32)
        for column in tl.range(0, C.intermediate, C.step, num_stages=C.num_stages):
            h = load_rows(h_start, inside, column, C.intermediate, C)
            weights = load_weight(
                down, expert, first, column, 1, C.block_h, C.hidden, C.intermediate,
                C.expert.down_transposed, C,
            )  # fmt: skip
            acc = dot(h, weights, acc, C)
        if biases.down_EH is not None:
            acc += load_bias(biases.down_EH, expert, first, 1, C.block_h, C.hidden)
        column = first + tl.arange(0, C.block_h)
        store_rows(
            y_CH, tile_row, inside, column, C.hidden, rounded(acc, y_CH.dtype.element_ty, C)
        )


@triton.jit
def shared_sum(y_shared, sigmoid_T, token, live, column, num_tokens, C: tl.constexpr):
    """Return the shared expert's weighted output: its slices are summed in order."""
    total = tl.full(C.combine_tile, 0.0, tl.float32)
    padded_tokens = (num_tokens + C.block_rows - 1) // C.block_rows * C.block_rows
    for slice_index in range(C.num_slices):
        row = (slice_index * padded_tokens + token).to(tl.int64)
        total += tl.load(
            y_shared + row[:, None] * C.hidden + column[None, :],
            mask=live[:, None] & (column < C.hidden)[None, :],
            other=0.0,
        ).to(tl.float32)
    if sigmoid_T is not None:
        total *= tl.load(sigmoid_T + token, mask=live, other=0.0)[:, None]
    return total


@triton.jit
def combine_tile(
    tile, group, gate_TK, row_of_TK, y_CH, y_TH, num_tokens, C: tl.constexpr,
    y_shared=None, sigmoid_T=None,
):  # fmt: skip
    """Sum each token's K weighted rows in k order, in float32, rounded once.

    Reads: gate_TK, row_of_TK, y_CH; then the shared expert's rows and weight, if there is one.
    Writes: one column group of y_TH for one token tile.
    """
    token = tile * C.combine_tokens + tl.arange(0, C.combine_tokens)
    live = token < num_tokens
    for block in range(C.group_blocks):
        column = (group * C.group_blocks + block) * C.block_h + tl.arange(0, C.block_h)
        inside = (column < C.hidden)[None, :]
        acc = tl.full(C.combine_tile, 0.0, tl.float32)
        # Unrolled, the loads of several choices are in flight at once; the sum keeps its order.
        for k in tl.range(0, C.top_k, loop_unroll_factor=C.combine_unroll):
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
        if C.num_slices > 0:
            acc += shared_sum(y_shared, sigmoid_T, token, live, column, num_tokens, C)
        tl.store(
            y_TH + token.to(tl.int64)[:, None] * C.hidden + column[None, :],
            rounded(acc, y_TH.dtype.element_ty, C),
            mask=live[:, None] & inside,
        )
