"""Device functions of the gradients of weights: one owner per output tile, rows in token order."""

import triton
import triton.language as tl

from megakernel.device.arithmetic import dot, rounded


@triton.jit
def rows_product(
    acc, left, left_column, LEFT_WIDTH: tl.constexpr, right, right_column,
    RIGHT_WIDTH: tl.constexpr, rows, assignment, TOKENS_LEFT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Return acc + leftᵀ · right, the depth being an expert's rows in order.

    One side has a row per row of the tables, the other one per token, gathered.

    Args:
        left, right: [.., LEFT_WIDTH] and [.., RIGHT_WIDTH].
        left_column, right_column: which columns of each.
        rows: (first row of the expert, how many it has).
        assignment: which assignment each of its rows serves; None where rows are tokens.
        TOKENS_LEFT: whether the left side is the one gathered.
    """
    first_row, num_rows = rows
    left_inside = (left_column < LEFT_WIDTH)[None, :]
    right_inside = (right_column < RIGHT_WIDTH)[None, :]
    for start in tl.range(0, num_rows, C.grad_step, num_stages=C.num_stages):
        ordinal = start + tl.arange(0, C.grad_step)
        inside = ordinal < num_rows
        row = (first_row + ordinal).to(tl.int64)
        token = ordinal.to(tl.int64)
        if assignment is not None:
            token = tl.load(assignment + ordinal, mask=inside, other=0).to(tl.int64) // C.top_k
        left_row = token if TOKENS_LEFT else row
        right_row = row if TOKENS_LEFT else token
        left_place = left + left_row[:, None] * LEFT_WIDTH + left_column[None, :]
        right_place = right + right_row[:, None] * RIGHT_WIDTH + right_column[None, :]
        a = tl.load(left_place, mask=inside[:, None] & left_inside, other=0.0)
        b = tl.load(right_place, mask=inside[:, None] & right_inside, other=0.0)
        acc = dot(a.T, b, acc, C)
    return acc


@triton.jit
def store_gradient(start, offset, inside, acc, is_added, C: tl.constexpr):
    """Write a tile of a gradient, or add it to what is there; each is added to by one task."""
    place = start + offset
    dtype: tl.constexpr = start.dtype.element_ty
    if dtype == tl.float32:
        acc += tl.load(place, mask=inside & (is_added != 0), other=0.0)
    tl.store(place, rounded(acc, dtype, C), mask=inside)


@triton.jit
def offset_of(expert, row, column, W: tl.constexpr):
    """Return where rows and columns of an expert's weight lie, and which of them exist."""
    rows_of_expert = expert.to(tl.int64) * W.expert_stride + row.to(tl.int64) * W.row_stride
    offset = rows_of_expert[:, None] + (column.to(tl.int64) * W.column_stride)[None, :]
    return offset, (row < W.stacked * W.height)[:, None] & (column < W.width)[None, :]


@triton.jit
def rows_of_expert(expert, b):
    """Return (first row in the tables, how many) of an expert."""
    return tl.load(b.rows.first_row_of_E + expert), tl.load(b.rows.rows_of_E + expert)


@triton.jit
def dgate_up_tile(expert, block, is_added, b, size, C: tl.constexpr):
    """Compute dzᵀ · x over an expert's rows, for a block of rows of gate_up and some of H.

    Reads: dz_C2I, x_TH gathered, the row tables. Writes: its tiles of the gradient; zeros for an
    expert without rows, which is left alone if gradients are added.
    """
    W: tl.constexpr = C.gate_up
    first, num_rows = rows_of_expert(expert, b)
    rows = (size.shared_tiles * C.block_rows + first, num_rows)
    assignment = b.rows.assignment_of_C + first
    row = block // C.dx_tasks * C.block_i + tl.arange(0, C.block_i)
    first_block = block % C.dx_tasks * C.dx_per_task
    last_block = min(first_block + C.dx_per_task, C.h_blocks)
    if (num_rows > 0) | (is_added == 0):
        for h_block in range(first_block, last_block):
            column = h_block * C.block_h + tl.arange(0, C.block_h)
            acc = tl.full(C.gate_up_tile, 0.0, tl.float32)
            acc = rows_product(acc, b.scratch.dz_C2I, row, C.z_width, b.x_TH, column, C.hidden,
                               rows, assignment, False, C)  # fmt: skip
            offset, inside = offset_of(expert, row, column, W)
            store_gradient(b.gradients.gate_up_E2IH, offset, inside, acc, is_added, C)


@triton.jit
def ddown_tile(expert, block, is_added, b, size, C: tl.constexpr):
    """Compute dyᵀ · (weighted A) over an expert's rows, for a block of H and some of I.

    Reads: dy_TH gathered, a_CI, the row tables. Writes: as :func:`dgate_up_tile`.
    """
    W: tl.constexpr = C.down
    first, num_rows = rows_of_expert(expert, b)
    rows = (size.shared_tiles * C.block_rows + first, num_rows)
    assignment = b.rows.assignment_of_C + first
    row = block // C.down_columns * C.block_h + tl.arange(0, C.block_h)
    first_block = block % C.down_columns * C.down_per_task
    last_block = min(first_block + C.down_per_task, C.i_blocks)
    if (num_rows > 0) | (is_added == 0):
        for i_block in range(first_block, last_block):
            column = i_block * C.block_i + tl.arange(0, C.block_i)
            acc = tl.full(C.down_tile, 0.0, tl.float32)
            acc = rows_product(acc, b.incoming.dy_TH, row, C.hidden, b.scratch.a_CI, column,
                               C.intermediate, rows, assignment, True, C)  # fmt: skip
            offset, inside = offset_of(expert, row, column, W)
            store_gradient(b.gradients.down_EHI, offset, inside, acc, is_added, C)


@triton.jit
def shared_dgate_up_tile(tile, block, b, size, C: tl.constexpr):
    """Compute dzᵀ · x over all tokens, for a block of rows of a slice's gate or up, some of H.

    Reads: dz_C2I, x_TH. Writes: its tiles of the gradient of the shared gate or up.
    """
    MATRICES: tl.constexpr = C.shared_matrices
    slice_index, matrix = tile // MATRICES, tile % MATRICES
    if C.expert.has_gate and not C.gradients.shared_gate:
        matrix = 1
    rows = (slice_index * (size.shared_tiles // C.num_slices) * C.block_rows, size.num_tokens)
    i = block // C.dx_tasks * C.block_i + tl.arange(0, C.block_i)
    left_column = tl.where(i < C.intermediate, matrix * C.intermediate + i, C.z_width)
    row = slice_index * C.intermediate + i
    exists = (i < C.intermediate) & (row < C.shared_width)
    out = b.gradients.shared_gate_JH if C.gradients.shared_gate else b.gradients.shared_up_JH
    if MATRICES == 2 and matrix == 1:
        out = b.gradients.shared_up_JH
    first_block = block % C.dx_tasks * C.dx_per_task
    for h_block in range(first_block, min(first_block + C.dx_per_task, C.h_blocks)):
        column = h_block * C.block_h + tl.arange(0, C.block_h)
        acc = tl.full(C.gate_up_tile, 0.0, tl.float32)
        acc = rows_product(acc, b.scratch.dz_C2I, left_column, C.z_width, b.x_TH, column,
                           C.hidden, rows, None, False, C)  # fmt: skip
        offset = row.to(tl.int64)[:, None] * C.hidden + column[None, :]
        inside = exists[:, None] & (column < C.hidden)[None, :]
        store_gradient(out, offset, inside, acc, 0, C)


@triton.jit
def shared_ddown_tile(slice_index, block, b, size, C: tl.constexpr):
    """Compute dyᵀ · (weighted A) over all tokens, for a block of H and some of a slice.

    Reads: dy_TH, a_CI. Writes: its tiles of the gradient of the shared down.
    """
    rows = (slice_index * (size.shared_tiles // C.num_slices) * C.block_rows, size.num_tokens)
    row = block // C.down_columns * C.block_h + tl.arange(0, C.block_h)
    first_block = block % C.down_columns * C.down_per_task
    for i_block in range(first_block, min(first_block + C.down_per_task, C.i_blocks)):
        i = i_block * C.block_i + tl.arange(0, C.block_i)
        acc = tl.full(C.down_tile, 0.0, tl.float32)
        acc = rows_product(acc, b.incoming.dy_TH, row, C.hidden, b.scratch.a_CI, i,
                           C.intermediate, rows, None, True, C)  # fmt: skip
        column = slice_index * C.intermediate + i
        exists = (i < C.intermediate) & (column < C.shared_width)
        offset = row.to(tl.int64)[:, None] * C.shared_width + column[None, :]
        inside = (row < C.hidden)[:, None] & exists[None, :]
        store_gradient(b.gradients.shared_down_HJ, offset, inside, acc, 0, C)


@triton.jit
def drouter_tile(tile, block, b, size, C: tl.constexpr):
    """Compute dlogitsᵀ · x for a block of experts and one of H, or past those their bias's sums.

    Reads: dlogits_TE, x_TH. Writes: its tile of the gradient, in the dtype that the product had.
    """
    expert = tile * C.block_experts + tl.arange(0, C.block_experts)
    if block < C.router_columns:
        dweight_tile(expert, block, b, size, C)
    elif b.gradients.router_bias_E is not None:
        total = tl.sum(tl.full(C.router_tile, 0.0, tl.float32), 1)
        for start in range(0, size.num_tokens, C.grad_step):
            total += tl.sum(load_dlogits(start, expert, b, size, C), 0)
        out = b.gradients.router_bias_E
        tl.store(out + expert, rounded(total, out.dtype.element_ty, C),
                 mask=expert < C.num_experts)  # fmt: skip


@triton.jit
def load_dlogits(start, expert, b, size, C: tl.constexpr):
    """Load the gradients of some experts' logits for a step of tokens, 0 where there is none."""
    token = start + tl.arange(0, C.grad_step)
    inside = (token < size.num_tokens)[:, None] & (expert < C.num_experts)[None, :]
    place = token.to(tl.int64)[:, None] * C.num_experts + expert[None, :]
    return tl.load(b.scratch.dlogits_TE + place, mask=inside, other=0.0)


@triton.jit
def dweight_tile(expert, block, b, size, C: tl.constexpr):
    """Compute dlogitsᵀ · x for some experts and one block of H, and write it."""
    out = b.gradients.router_weight_EH
    DTYPE: tl.constexpr = out.dtype.element_ty
    column = block * C.step + tl.arange(0, C.step)
    acc = tl.full(C.router_tile, 0.0, tl.float32)
    for start in tl.range(0, size.num_tokens, C.grad_step, num_stages=C.num_stages):
        token = start + tl.arange(0, C.grad_step)
        dlogits = rounded(load_dlogits(start, expert, b, size, C), DTYPE, C)
        mask = (token < size.num_tokens)[:, None] & (column < C.hidden)[None, :]
        place = token.to(tl.int64)[:, None] * C.hidden + column[None, :]
        # A token that nothing reaches, as padding is, may hold anything.
        is_reached = tl.max((dlogits != 0.0).to(tl.int32), 1) > 0
        x = tl.load(b.x_TH + place, mask=mask & is_reached[:, None], other=0.0)
        acc = dot(dlogits.T, x.to(DTYPE), acc, C)
    inside = (expert < C.num_experts)[:, None] & (column < C.hidden)[None, :]
    offset = expert[:, None] * C.hidden + column[None, :]
    tl.store(out + offset, rounded(acc, DTYPE, C), mask=inside)


@triton.jit
def dtoken_gate_tile(tile, b, size, C: tl.constexpr):
    """Sum dtoken · x over all tokens for one block of H. Writes: the token gate's gradient."""
    column = tile * C.block_h + tl.arange(0, C.block_h)
    total = tl.full(C.h_row, 0.0, tl.float32)
    for start in range(0, size.num_tokens, C.grad_step):
        token = start + tl.arange(0, C.grad_step)
        exists = token < size.num_tokens
        dtoken = tl.load(b.scratch.dtoken_T + token, mask=exists, other=0.0)
        place = token.to(tl.int64)[:, None] * C.hidden + column[None, :]
        mask = exists[:, None] & (column < C.hidden)[None, :]
        x = tl.load(b.x_TH + place, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(dtoken[:, None] * x, 0)
    out = b.gradients.token_gate_1H
    tl.store(out + column, rounded(total, out.dtype.element_ty, C), mask=column < C.hidden)


@triton.jit
def dbias_tile(expert, block, b, size, C: tl.constexpr):
    """Sum an expert's dz, or its weighted dy, for one block of columns of a bias.

    Reads: dz_C2I; dy_TH and gate_TK gathered. Writes: zeros for an expert without rows.
    """
    first, num_rows = rows_of_expert(expert, b)
    is_first = block < C.gate_up_bias_blocks
    column = tl.where(is_first, block, block - C.gate_up_bias_blocks) * C.block_h
    column += tl.arange(0, C.block_h)
    total = tl.full(C.h_row, 0.0, tl.float32)
    for start in range(0, num_rows, C.grad_step):
        ordinal = start + tl.arange(0, C.grad_step)
        inside = ordinal < num_rows
        if is_first:
            row = size.shared_tiles * C.block_rows + first + ordinal
            total += tl.sum(load_columns(b.scratch.dz_C2I, row, inside, column, C.z_width), 0)
        elif b.gradients.down_bias_EH is not None:
            place = b.rows.assignment_of_C + first + ordinal
            assignment = tl.load(place, mask=inside, other=0)
            gate = tl.load(b.routing.gate_TK + assignment, mask=inside, other=0.0)
            dy = load_columns(b.incoming.dy_TH, assignment // C.top_k, inside, column, C.hidden)
            total += tl.sum(gate.to(tl.float32)[:, None] * dy, 0)
    if is_first and b.gradients.gate_up_bias_E2I is not None:
        store_columns(b.gradients.gate_up_bias_E2I, expert, column, C.z_width, total, C)
    elif b.gradients.down_bias_EH is not None:
        store_columns(b.gradients.down_bias_EH, expert, column, C.hidden, total, C)


@triton.jit
def load_columns(start, row, inside, column, WIDTH: tl.constexpr):
    """Load [rows, columns] of a row-major matrix as float32, 0 where there is nothing."""
    mask = inside[:, None] & (column < WIDTH)[None, :]
    place = start + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_columns(start, row, column, WIDTH: tl.constexpr, values, C: tl.constexpr):
    """Round values and store them as columns of one row."""
    place = start + row.to(tl.int64) * WIDTH + column
    tl.store(place, rounded(values, start.dtype.element_ty, C), mask=column < WIDTH)
