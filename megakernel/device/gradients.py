"""Device functions of the gradients of weights: one owner per output tile, rows in token order."""

import triton
import triton.language as tl

from megakernel.device.arithmetic import dot, halved, rounded


@triton.jit
def tokens_of(assignment, ordinal, num_rows, C: tl.constexpr):
    """Return the tokens of an expert's rows, past the last its own; without a table, the rows."""
    token = tl.minimum(ordinal, num_rows - 1)
    if assignment is not None:
        token = tl.load(assignment + token) // C.top_k
    return token


@triton.jit
def load_some(place, exists, ALL: tl.constexpr):
    """Load [rows, columns], 0 in columns that do not exist, if that is not so of all of them."""
    if ALL:  # noqa: SIM108  (known when compiling)
        values = tl.load(place)
    else:
        values = tl.load(place, mask=exists[None, :], other=0.0)
    return values


@triton.jit
def rows_product(
    left, left_column, exists, LEFT_WIDTH: tl.constexpr, right, h_block, rows, assignment,
    C: tl.constexpr,
):  # fmt: skip
    """Return leftᵀ · right, [block_i, block_h] float32, the depth being an expert's rows in order.

    No row is masked: in the last step the left side's rows past the end are zeros of its tile.

    Args:
        left: [rows of the tables, LEFT_WIDTH].
        left_column: which of its columns, [block_i].
        exists: which of them do.
        right: [tokens, H], gathered.
        h_block: which block of its columns.
        rows: (first row of the expert, how many it has).
        assignment: which assignment each of its rows serves; None where rows are tokens.
    """
    first_row, num_rows = rows
    step = tl.arange(0, C.grad_step)
    left_place = step[:, None] * LEFT_WIDTH + left_column[None, :]
    right_column = h_block * C.block_h + tl.arange(0, C.block_h)
    right_start = right + right_column
    acc = tl.full(C.gradient_tile, 0.0, tl.float32)
    STAGES: tl.constexpr = C.num_stages if assignment is None else C.gather_stages
    for start in tl.range(0, num_rows, C.grad_step, num_stages=STAGES):
        left_start = left + (first_row.to(tl.int64) + start) * LEFT_WIDTH
        token = tokens_of(assignment, start + step, num_rows, C)
        right_place = right_start[None, :] + token.to(tl.int64)[:, None] * C.hidden
        a = load_some(left_start + left_place, exists, C.intermediate % C.block_i == 0)
        b = load_some(right_place, right_column < C.hidden, C.hidden % C.block_h == 0)
        acc = dot(a.T, b, acc, C)
    return acc


@triton.jit
def store_gradient(
    start, place, exists, first, STRIDE: tl.constexpr, acc, is_added, C: tl.constexpr
):  # fmt: skip
    """Write a tile of a gradient, or add it to what is there; each is added to by one task.

    A few columns at a time, as :func:`megakernel.device.backward.finish_dh` does.

    Args:
        start: of the matrix.
        place: where the tile's rows lie in it, [block_i].
        exists: which of them do.
        first: first column, of H.
        STRIDE: from one column to the next.
        acc: [block_i, columns] float32.
        is_added: 0 or 1, for a gradient in float32.
    """
    COLUMNS: tl.constexpr = acc.shape[1]
    if C.stored_columns < COLUMNS:
        left, right = halved(acc)
        store_gradient(start, place, exists, first, STRIDE, left, is_added, C)
        first += COLUMNS // 2
        store_gradient(start, place, exists, first, STRIDE, right, is_added, C)
    else:
        column = first + tl.arange(0, COLUMNS)
        inside = exists[:, None] & (column < C.hidden)[None, :]
        target = start + place[:, None] + (column.to(tl.int64) * STRIDE)[None, :]
        dtype: tl.constexpr = start.dtype.element_ty
        if dtype == tl.float32:
            acc += tl.load(target, mask=inside & (is_added != 0), other=0.0)
        tl.store(target, rounded(acc, dtype, C), mask=inside)


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
    first_row, num_rows = rows_of_expert(expert, b)
    rows = (size.shared_tiles * C.block_rows + first_row, num_rows)
    assignment = b.rows.assignment_of_C + first_row
    row = block // C.dx_tasks * C.block_i + tl.arange(0, C.block_i)
    start = b.gradients.gate_up_E2IH + expert.to(tl.int64) * W.expert_stride
    place, exists = row.to(tl.int64) * W.row_stride, row < C.z_width
    first_block = block % C.dx_tasks * C.dx_per_task
    last_block = min(first_block + C.dx_per_task, C.h_blocks)
    if (num_rows > 0) | (is_added == 0):
        for h_block in range(first_block, last_block):
            acc = rows_product(b.scratch.dz_C2I, row, exists, C.z_width, b.x_TH, h_block, rows,
                               assignment, C)  # fmt: skip
            first = h_block * C.block_h
            store_gradient(start, place, exists, first, W.column_stride, acc, is_added, C)


@triton.jit
def ddown_tile(expert, block, is_added, b, size, C: tl.constexpr):
    """Compute dyᵀ · (weighted A) over an expert's rows, turned, for a block of H and some of I.

    Reads: dy_TH gathered, a_CI, the row tables. Writes: as :func:`dgate_up_tile`.
    """
    W: tl.constexpr = C.down
    first_row, num_rows = rows_of_expert(expert, b)
    rows = (size.shared_tiles * C.block_rows + first_row, num_rows)
    assignment = b.rows.assignment_of_C + first_row
    start = b.gradients.down_EHI + expert.to(tl.int64) * W.expert_stride
    h_block = block // C.down_columns
    first_block = block % C.down_columns * C.down_per_task
    last_block = min(first_block + C.down_per_task, C.i_blocks)
    if (num_rows > 0) | (is_added == 0):
        for i_block in range(first_block, last_block):
            i = i_block * C.block_i + tl.arange(0, C.block_i)
            place, exists = i.to(tl.int64) * W.column_stride, i < C.intermediate
            acc = rows_product(b.scratch.a_CI, i, exists, C.intermediate, b.incoming.dy_TH,
                               h_block, rows, assignment, C)  # fmt: skip
            first = h_block * C.block_h
            store_gradient(start, place, exists, first, W.row_stride, acc, is_added, C)


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
    row = slice_index * C.intermediate + i
    place, exists = row.to(tl.int64) * C.hidden, (i < C.intermediate) & (row < C.shared_width)
    out = b.gradients.shared_gate_JH if C.gradients.shared_gate else b.gradients.shared_up_JH
    if MATRICES == 2 and matrix == 1:
        out = b.gradients.shared_up_JH
    first_block = block % C.dx_tasks * C.dx_per_task
    for h_block in range(first_block, min(first_block + C.dx_per_task, C.h_blocks)):
        acc = rows_product(b.scratch.dz_C2I, matrix * C.intermediate + i, i < C.intermediate,
                           C.z_width, b.x_TH, h_block, rows, None, C)  # fmt: skip
        store_gradient(out, place, exists, h_block * C.block_h, 1, acc, 0, C)


@triton.jit
def shared_ddown_tile(slice_index, block, b, size, C: tl.constexpr):
    """Compute dyᵀ · (weighted A) over all tokens, for a block of H and some of a slice.

    Reads: dy_TH, a_CI. Writes: its tiles of the gradient of the shared down.
    """
    rows = (slice_index * (size.shared_tiles // C.num_slices) * C.block_rows, size.num_tokens)
    h_block = block // C.down_columns
    first_block = block % C.down_columns * C.down_per_task
    for i_block in range(first_block, min(first_block + C.down_per_task, C.i_blocks)):
        i = i_block * C.block_i + tl.arange(0, C.block_i)
        place = slice_index * C.intermediate + i
        exists = (i < C.intermediate) & (place < C.shared_width)
        acc = rows_product(b.scratch.a_CI, i, i < C.intermediate, C.intermediate,
                           b.incoming.dy_TH, h_block, rows, None, C)  # fmt: skip
        out, first = b.gradients.shared_down_HJ, h_block * C.block_h
        store_gradient(out, place, exists, first, C.shared_width, acc, 0, C)


@triton.jit
def drouter_tile(tile, block, b, size, C: tl.constexpr):
    """Compute dlogitsᵀ · x for a block of experts and one of H, or past those their bias's sums.

    Reads: dlogits_TE, x_TH. Writes: its tile of the gradient, in the dtype that the product had.
    """
    expert = tile * C.block_experts + tl.arange(0, C.block_experts)
    if block < C.router_columns:
        dweight_tile(expert, block, b, size, C)
    elif b.gradients.router_bias_E is not None:
        total = tl.full(C.expert_row, 0.0, tl.float32)
        for start in range(0, size.num_tokens, C.grad_step):
            total += tl.sum(load_dlogits(start, expert, b, size, C), 0)
        out = b.gradients.router_bias_E
        tl.store(out + expert, rounded(total, out.dtype.element_ty, C),
                 mask=expert < C.num_experts)  # fmt: skip


@triton.jit
def load_dlogits(start, expert, b, size, C: tl.constexpr):
    """Load the gradients of some experts' logits for a step of tokens, 0 where there is none."""
    step = tl.arange(0, C.grad_step)
    inside = (start + step < size.num_tokens)[:, None] & (expert < C.num_experts)[None, :]
    first = b.scratch.dlogits_TE + tl.full((), start, tl.int64) * C.num_experts
    place = step[:, None] * C.num_experts + expert[None, :]
    return tl.load(first + place, mask=inside, other=0.0)


@triton.jit
def dweight_tile(expert, block, b, size, C: tl.constexpr):
    """Compute dlogitsᵀ · x for some experts and one block of H, and write it."""
    out = b.gradients.router_weight_EH
    DTYPE: tl.constexpr = out.dtype.element_ty
    column = block * C.step + tl.arange(0, C.step)
    acc = tl.full(C.router_tile, 0.0, tl.float32)
    step = tl.arange(0, C.grad_step)
    # Turned: as the right side dlogits come in wide loads.
    for start in tl.range(0, size.num_tokens, C.grad_step, num_stages=C.num_stages):
        dlogits = rounded(load_dlogits(start, expert, b, size, C), DTYPE, C)
        mask = (start + step < size.num_tokens)[:, None] & (column < C.hidden)[None, :]
        first = b.x_TH + tl.full((), start, tl.int64) * C.hidden
        place = step[:, None] * C.hidden + column[None, :]
        # A token that nothing reaches, as padding is, may hold anything.
        is_reached = tl.max((dlogits != 0.0).to(tl.int32), 1) > 0
        x = tl.load(first + place, mask=mask & is_reached[:, None], other=0.0)
        acc = dot(x.to(DTYPE).T, dlogits, acc, C)
    inside = (column < C.hidden)[:, None] & (expert < C.num_experts)[None, :]
    offset = column[:, None] + expert[None, :] * C.hidden
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
