"""Device functions of what the backward hands on: dH and dX of rows, and dx of tokens."""

import triton
import triton.language as tl

from megakernel.device.arithmetic import dot, halved, rounded
from megakernel.device.derivatives import gated_with_slopes
from megakernel.device.ffn import product, store_halves, store_rows
from megakernel.device.shared import slice_of


@triton.jit
def load_halves(
    z, row, inside, first, COLUMNS: tl.constexpr, W: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Return gate and up of some columns, float32, twice up without a gate; see store_halves."""
    WIDTH: tl.constexpr = W.stacked * W.height
    SPAN: tl.constexpr = COLUMNS * C.expert.rows_per_column
    column = first * C.expert.rows_per_column + tl.arange(0, SPAN)
    inside = inside[:, None] & (column < W.height)[None, :]
    place = z + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = gate
    if W.stacked == 2:
        up = tl.load(place + W.height, mask=inside, other=0.0).to(tl.float32)
    elif C.expert.has_gate:  # they take turns
        gate, up = tl.split(gate.reshape((C.block_rows, COLUMNS, 2)))
    return gate, up


@triton.jit
def finish_dh(acc, z, z_row, weight, inside, tile, first, b, W: tl.constexpr, C: tl.constexpr):
    """From dA' and z make dz and A weighted and store them; return the part of <dA', A>.

    The sums of products stay in registers meanwhile, so a few columns are done at a time.

    Args:
        acc: dA' = dy · down, [block_rows, columns] float32.
        z, z_row, inside: where z lies, which of its rows, and which of those exist.
        weight: of each row, [block_rows] float32.
        tile, first: row tile and first column of I.
        W: rule of gate_up.
    """
    COLUMNS: tl.constexpr = acc.shape[1]
    if C.dh_columns < COLUMNS:
        left, right = halved(acc)
        part = finish_dh(left, z, z_row, weight, inside, tile, first, b, W, C)
        first += COLUMNS // 2
        part += finish_dh(right, z, z_row, weight, inside, tile, first, b, W, C)
    else:
        gate, up = load_halves(z, z_row, inside, first, COLUMNS, W, C)
        row = tl.arange(0, C.block_rows)
        column = first + tl.arange(0, COLUMNS)
        tile_start = tile.to(tl.int64) * C.block_rows
        # Rows that do not exist become zeros, which the gradients of weights count on.
        every = row < C.block_rows
        h, by_gate, by_up = gated_with_slopes(gate, up, C)
        # Columns past I are zero in dA', but need not be in h.
        part = tl.sum(tl.where((column < C.intermediate)[None, :], acc * h, 0.0), 1)
        if b.scratch.a_CI is not None:
            a = rounded(weight[:, None] * h, b.scratch.a_CI.dtype.element_ty, C)
            a_start = b.scratch.a_CI + tile_start * C.intermediate
            store_rows(a_start, row, every, column, C.intermediate, a, "")
        if b.scratch.dz_C2I is not None:
            da, dz_start = weight[:, None] * acc, b.scratch.dz_C2I + tile_start * C.z_width
            store_halves(dz_start, row, every, first, da * by_gate, da * by_up, W, C)
    return part


@triton.jit
def store_ds(part, tile, block, inside, b, C: tl.constexpr):
    """Store one block's part of <dA', A> of each row, if it is wanted."""
    if b.scratch.ds_CB is not None:
        tile_row = tile * C.block_rows + tl.arange(0, C.block_rows)
        place = b.scratch.ds_CB + tile_row.to(tl.int64) * C.i_blocks + block
        tl.store(place, part, mask=inside)


@triton.jit
def dh_tile(tile, block, content, weight, b, size, W: tl.constexpr, C: tl.constexpr):
    """Go back through down and the activation for one row tile and one block of I.

    dA' = dy · down; dA = weight · dA'; dz = dA · the activation's derivatives.

    Reads: dy_TH rows gathered through assignment_of_C, down, z_A2I, gate_TK. Writes: dz_C2I, a_CI
    and ds_CB, where they are wanted.
    """
    expert, filled = content
    Z: tl.constexpr = C.gate_up
    row = tl.arange(0, C.block_rows)
    inside = row < filled
    place = b.rows.assignment_of_C + (tile - size.shared_tiles) * C.block_rows + row
    assignment = tl.where(inside, tl.load(place, mask=inside, other=0), 0)
    dy_start = b.incoming.dy_TH + (assignment // C.top_k).to(tl.int64) * C.hidden
    acc = product(dy_start, inside, weight, expert, block * W.block, W, C)
    share = tl.load(b.routing.gate_TK + assignment, mask=inside, other=0.0).to(tl.float32)
    first = block * C.block_i
    part = finish_dh(acc, b.saved.z_A2I, assignment, share, inside, tile, first, b, Z, C)
    store_ds(part, tile, block, inside, b, C)


@triton.jit
def shared_dh_tile(tile, block, b, size, C: tl.constexpr):
    """Do the same for one row tile of the shared expert and one block of a slice.

    Reads: dy_TH, its down, shared_z_S2I, sigmoid_T. Writes: as :func:`dh_tile`.
    """
    W: tl.constexpr = C.shared_dh_rule
    Z: tl.constexpr = C.shared_gate_up
    slice_index, token, inside = slice_of(tile, size, C)
    dy_start = b.incoming.dy_TH + token.to(tl.int64) * C.hidden
    first_row = block * C.block_i
    acc = product(dy_start, inside, b.shared.down_HJ, slice_index, first_row, W, C)
    z_row = slice_index * size.num_tokens + token
    share = tl.where(inside, 1.0, 0.0)
    if b.saved.sigmoid_T is not None:
        share = tl.load(b.saved.sigmoid_T + token, mask=inside, other=0.0)
    z = b.saved.shared_z_S2I
    part = finish_dh(acc, z, z_row, share, inside, tile, first_row, b, Z, C)
    store_ds(part, tile, block, inside, b, C)


@triton.jit
def store_dx(acc, tile, first, inside, b, C: tl.constexpr):
    """Store some columns of dx_CH, a few at a time: see :func:`finish_dh`."""
    COLUMNS: tl.constexpr = acc.shape[1]
    if C.stored_columns < COLUMNS:
        left, right = halved(acc)
        store_dx(left, tile, first, inside, b, C)
        store_dx(right, tile, first + COLUMNS // 2, inside, b, C)
    else:
        dx = rounded(acc, b.scratch.dx_CH.dtype.element_ty, C)
        tile_start = b.scratch.dx_CH + tile.to(tl.int64) * C.block_rows * C.hidden
        column = first + tl.arange(0, COLUMNS)
        store_rows(tile_start, tl.arange(0, C.block_rows), inside, column, C.hidden, dx, "")


@triton.jit
def dx_tile(tile, block, content, weight, b, W: tl.constexpr, C: tl.constexpr):
    """Compute dz · gate_up for one row tile and its task's blocks of H.

    Reads: dz_C2I, gate_up. Writes: dx_CH.
    """
    expert, filled = content
    row = tl.arange(0, C.block_rows)
    inside = row < filled
    dz_start = b.scratch.dz_C2I + (tile * C.block_rows + row).to(tl.int64) * W.width
    for h_block in range(block, min(block + C.dx_per_task, C.h_blocks)):
        acc = product(dz_start, inside, weight, expert, h_block * W.block, W, C)
        store_dx(acc, tile, h_block * W.block, inside, b, C)


@triton.jit
def shared_dx_tile(tile, block, b, size, C: tl.constexpr):
    """Do the same for one row tile of the shared expert: dz of gate · gate, plus dz of up · up.

    Reads: dz_C2I, its gate and up. Writes: dx_CH.
    """
    W: tl.constexpr = C.shared_dx_rule
    slice_index, _, inside = slice_of(tile, size, C)
    tile_row = tile * C.block_rows + tl.arange(0, C.block_rows)
    dz_start = b.scratch.dz_C2I + tile_row.to(tl.int64) * C.z_width
    for h_block in range(block, min(block + C.dx_per_task, C.h_blocks)):
        first = h_block * W.block
        if C.expert.has_gate:
            acc = product(dz_start, inside, b.shared.gate_JH, slice_index, first, W, C)
            up_start = dz_start + C.intermediate
            acc = product(up_start, inside, b.shared.up_JH, slice_index, first, W, C, acc)
        else:
            acc = product(dz_start, inside, b.shared.up_JH, slice_index, first, W, C)
        store_dx(acc, tile, h_block * W.block, inside, b, C)


@triton.jit
def rows_of_token(b, token, exists, column, size, C: tl.constexpr):
    """Return the sum of a token's dx rows in k order, then of its shared rows in slice order."""
    first_row = size.shared_tiles * C.block_rows
    inside = (column < C.hidden)[None, :]
    acc = tl.full(C.combine_tile, 0.0, tl.float32)
    for k in tl.range(0, C.top_k, loop_unroll_factor=C.combine_unroll):
        place = token.to(tl.int64) * C.top_k + k
        row = tl.load(b.rows.row_of_TK + place, mask=exists, other=-1)
        start = b.scratch.dx_CH + (first_row + row).to(tl.int64)[:, None] * C.hidden
        mask = (row >= 0)[:, None] & inside
        acc += tl.load(start + column[None, :], mask=mask, other=0.0).to(tl.float32)
    padded_tokens = tl.cdiv(size.num_tokens, C.block_rows) * C.block_rows
    for slice_index in range(C.num_slices):
        row = (slice_index * padded_tokens + token).to(tl.int64)
        start = b.scratch.dx_CH + row[:, None] * C.hidden
        mask = exists[:, None] & inside
        acc += tl.load(start + column[None, :], mask=mask, other=0.0).to(tl.float32)
    return acc


@triton.jit
def through_router(b, token, exists, column, C: tl.constexpr):
    """Return dlogits · router, the former rounded to the latter's dtype.

    The product is made turned, since wgmma serves no fewer than 64 rows on its left.
    """
    inside = (column < C.hidden)[None, :]
    acc = tl.full(C.turned_tile, 0.0, tl.float32)
    for first_expert in tl.range(0, C.num_experts, C.router_step, num_stages=2):
        expert = first_expert + tl.arange(0, C.router_step)
        served = expert < C.num_experts
        place = token.to(tl.int64)[:, None] * C.num_experts + expert[None, :]
        mask = exists[:, None] & served[None, :]
        dlogits = tl.load(b.scratch.dlogits_TE + place, mask=mask, other=0.0)
        router = tl.load(
            b.router.weight_EH + expert[:, None] * C.hidden + column[None, :],
            mask=served[:, None] & inside,
            other=0.0,
        )
        acc = dot(router.T, rounded(dlogits, router.dtype, C).T, acc, C)
    return acc.T


@triton.jit
def dx_sum_tile(tile, group, b, size, C: tl.constexpr):
    """Sum what reaches each token: its rows in k order, shared ones, the router, the token gate.

    Reads: row_of_TK, dx_CH, dlogits_TE, the router, dtoken_T, the token gate. Writes: one column
    group of dx_TH for one token tile, rounded once.
    """
    dx_TH = b.gradients.x_TH
    token = tile * C.combine_tokens + tl.arange(0, C.combine_tokens)
    exists = token < size.num_tokens
    for block in range(C.group_blocks):
        column = (group * C.group_blocks + block) * C.block_h + tl.arange(0, C.block_h)
        acc = rows_of_token(b, token, exists, column, size, C)
        if C.gradients.weighs:
            acc += through_router(b, token, exists, column, C)
        if C.gradients.token_gated:
            gate = tl.load(b.shared.token_gate_1H + column, mask=column < C.hidden, other=0.0)
            dtoken = tl.load(b.scratch.dtoken_T + token, mask=exists, other=0.0)
            acc += dtoken[:, None] * gate.to(tl.float32)[None, :]
        tl.store(
            dx_TH + token.to(tl.int64)[:, None] * C.hidden + column[None, :],
            rounded(acc, dx_TH.dtype.element_ty, C),
            mask=exists[:, None] & (column < C.hidden)[None, :],
        )
