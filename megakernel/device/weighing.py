"""Device function of dS: from rows back to weights, and through the router's rule to logits."""

import triton
import triton.language as tl

from megakernel.device.arithmetic import rounded
from megakernel.device.derivatives import dlogits_tile
from megakernel.device.dispatch import load_ids


@triton.jit
def parts_of(row, held, b, C: tl.constexpr):
    """Return <dA', A> of rows, their blocks' parts added in order."""
    total = tl.where(held, 0.0, 0.0)
    place = b.scratch.ds_CB + row.to(tl.int64) * C.i_blocks
    for block in range(C.i_blocks):
        total += tl.load(place + block, mask=held, other=0.0)
    return total


@triton.jit
def through_bias(ids, token, b, C: tl.constexpr):
    """Return <dy, bias of down> for each id, [select_tokens, top_k_pad] float32."""
    choice = tl.arange(0, C.top_k_pad)[None, :]
    total = tl.full(C.choice_tile, 0.0, tl.float32)
    for k in range(C.top_k):
        id_k = tl.sum(tl.where(choice == k, ids, 0), 1)
        held = id_k >= 0
        sum_k = tl.full(C.select_row, 0.0, tl.float32)
        for first_column in range(0, C.hidden, C.step):
            column = first_column + tl.arange(0, C.step)
            mask = held[:, None] & (column < C.hidden)[None, :]
            dy_place = token.to(tl.int64)[:, None] * C.hidden + column[None, :]
            dy = tl.load(b.incoming.dy_TH + dy_place, mask=mask, other=0.0).to(tl.float32)
            place = id_k.to(tl.int64)[:, None] * C.hidden + column[None, :]
            bias = tl.load(b.experts.down_bias_EH + place, mask=mask, other=0.0)
            sum_k += tl.sum(dy * bias.to(tl.float32), 1)
        total += tl.where(choice == k, sum_k[:, None], 0.0)
    return total


@triton.jit
def dgate_of(token, b, size, C: tl.constexpr):
    """Return the gradient of some tokens' weights, 0 for choices without a row."""
    choice = tl.arange(0, C.top_k_pad)[None, :]
    inside = (token < size.num_tokens)[:, None] & (choice < C.top_k)
    place = token.to(tl.int64)[:, None] * C.top_k + choice
    row = tl.load(b.rows.row_of_TK + place, mask=inside, other=-1)
    held = row >= 0
    dgate = parts_of(size.shared_tiles * C.block_rows + row, held, b, C)
    if b.experts.down_bias_EH is not None:
        ids = tl.where(held, load_ids(b.routing.expert_of_TK, token, size.num_tokens, C), -1)
        dgate += through_bias(ids.to(tl.int32), token, b, C)
    if b.incoming.dgate_TK is not None:
        dgate += tl.load(b.incoming.dgate_TK + place, mask=held, other=0.0)
    if b.gradients.gate_TK is not None:
        given = rounded(dgate, b.gradients.gate_TK.dtype.element_ty, C)
        tl.store(b.gradients.gate_TK + place, given, mask=inside)
    return dgate


@triton.jit
def store_dlogits(token, dgate, b, size, C: tl.constexpr):
    """Write the gradient of some tokens' logits: through the weights, and what comes in."""
    if b.saved.chosen_TK is not None:
        chosen = load_ids(b.saved.chosen_TK, token, size.num_tokens, C)
    else:
        chosen = load_ids(b.routing.expert_of_TK, token, size.num_tokens, C)
    logits_TE = b.routing.logits_TE
    dlogits = dlogits_tile(logits_TE, token, size.num_tokens, chosen, dgate, C)
    expert = tl.arange(0, C.experts_pad)
    place = token.to(tl.int64)[:, None] * C.num_experts + expert[None, :]
    inside = (token < size.num_tokens)[:, None] & (expert < C.num_experts)[None, :]
    if b.incoming.dlogits_TE is not None:
        dlogits += tl.load(b.incoming.dlogits_TE + place, mask=inside, other=0.0)
    tl.store(b.scratch.dlogits_TE + place, dlogits, mask=inside)


@triton.jit
def store_dtoken(token, b, size, C: tl.constexpr):
    """Write the gradient of token_gate · x for some tokens."""
    exists = token < size.num_tokens
    padded_tokens = tl.cdiv(size.num_tokens, C.block_rows) * C.block_rows
    dweight = tl.full(C.select_row, 0.0, tl.float32)
    for slice_index in range(C.num_slices):
        dweight += parts_of(slice_index * padded_tokens + token, exists, b, C)
    weight = tl.load(b.saved.sigmoid_T + token, mask=exists, other=0.0)
    tl.store(b.scratch.dtoken_T + token, dweight * weight * (1.0 - weight), mask=exists)


@triton.jit
def ds_tile(tile, b, size, C: tl.constexpr):
    """Compute the gradients of weights for one token tile, and what follows from them.

    ds = <dA', A> + <dy, bias of down>, and the incoming gradient of the weight; then the
    derivative of the router's rule.

    Reads: ds_CB, row_of_TK, ids, logits_TE, dgate_TK, dlogits_TE of the caller, sigmoid_T.
    Writes: the gradient of given weights, dlogits_TE, dtoken_T.
    """
    for start in range(0, C.block_tokens, C.select_tokens):
        token = tile * C.block_tokens + start + tl.arange(0, C.select_tokens)
        dgate = dgate_of(token, b, size, C)
        if C.gradients.weighs:
            store_dlogits(token, dgate, b, size, C)
        if C.gradients.token_gated:
            store_dtoken(token, b, size, C)
