"""Device functions of gate, prefix and scatter: from tokens to rows, with no atomic choosing one.

A row is found by stable counting. A gate task counts its tile's assignments per bin and ranks
each within the tile; the prefix tasks turn the counts of all tiles into first ordinals; a scatter
task adds the two and places the assignment in its slot. A bin is an expert, or a slot when the
caller names the slots.
"""

import triton
import triton.language as tl

from megakernel.queue import record_bad_input

# Reasons in the error word; the host's texts are in errors.py.
ID_OUT_OF_RANGE = tl.constexpr(1)
ID_TWICE = tl.constexpr(2)
SLOT_OF_OTHER_EXPERT = tl.constexpr(3)

_LEAST = tl.constexpr(-(1 << 31))
_GREATEST = tl.constexpr((1 << 31) - 1)


@triton.jit
def dot(left, right, acc, C: tl.constexpr):
    """Return acc + left · right in float32, never in TF32.

    Interpreted, ``tl.dot`` would multiply the raw bits of bfloat16, and its BLAS lets the rounding
    of a row depend on the row's place in the tile; a plain sum does neither.
    """
    if C.interpreted:
        products = left.to(tl.float32)[:, :, None] * right.to(tl.float32)[None, :, :]
        acc = acc + tl.sum(products, 1)
    else:
        acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc


@triton.jit
def store_logits(x_TH, router_EH, logits_TE, first_token, num_tokens, C: tl.constexpr):
    """Write x · routerᵀ for one token tile, ``block_experts`` columns at a time."""
    token = first_token + tl.arange(0, C.block_tokens)
    x_row = x_TH + token.to(tl.int64)[:, None] * C.hidden
    for first_expert in range(0, C.num_experts, C.block_experts):
        expert = first_expert + tl.arange(0, C.block_experts)
        acc = tl.full(C.logits_tile, 0.0, tl.float32)
        for first_column in tl.range(0, C.hidden, C.step, num_stages=2):
            column = first_column + tl.arange(0, C.step)
            inside = (column < C.hidden)[None, :]
            x = tl.load(
                x_row + column[None, :], mask=(token < num_tokens)[:, None] & inside, other=0.0
            )
            router = tl.load(
                router_EH + expert[:, None] * C.hidden + column[None, :],
                mask=(expert < C.num_experts)[:, None] & inside,
                other=0.0,
            )
            acc = dot(x, router.T, acc, C)
        tl.store(
            logits_TE + token.to(tl.int64)[:, None] * C.num_experts + expert[None, :],
            acc,
            mask=(token < num_tokens)[:, None] & (expert < C.num_experts)[None, :],
        )


@triton.jit
def load_logits(logits_TE, token, num_tokens, C: tl.constexpr):
    """Load all logits of some tokens, -inf in the padding."""
    expert = tl.arange(0, C.experts_pad)
    return tl.load(
        logits_TE + token.to(tl.int64)[:, None] * C.num_experts + expert[None, :],
        mask=(token < num_tokens)[:, None] & (expert < C.num_experts)[None, :],
        other=float("-inf"),
    )  # [select_tokens, experts_pad]


@triton.jit
def choose(logits, C: tl.constexpr):
    """Return the ids of the top_k largest logits, best first; ties go to the lower id.

    Logits are compared as integers in float order, NaN above everything and both zeros equal, so
    any input gives distinct ids in range.
    """
    expert = tl.arange(0, C.experts_pad)[None, :]
    bits = logits.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ _GREATEST, bits)
    key = tl.where(logits == 0.0, 0, key)
    key = tl.where(logits != logits, _GREATEST, key)
    key = tl.where(expert < C.num_experts, key, _LEAST)
    choice = tl.arange(0, C.top_k_pad)[None, :]
    chosen = tl.full(C.choice_tile, -1, tl.int32)
    for k in range(C.top_k):
        best = tl.max(key, 1)[:, None]
        winner = tl.min(tl.where(key == best, expert, C.experts_pad), 1)[:, None]
        chosen = tl.where(choice == k, winner, chosen)
        key = tl.where(expert == winner, _LEAST, key)
    return chosen  # [select_tokens, top_k_pad]


@triton.jit
def weigh(logits_TE, token, num_tokens, chosen, C: tl.constexpr):
    """Return the softmax weight of each chosen id, over the chosen or over all experts."""
    valid = chosen >= 0
    logit = tl.load(
        logits_TE + token.to(tl.int64)[:, None] * C.num_experts + chosen,
        mask=valid,
        other=float("-inf"),
    )
    pool = logit if C.renormalize else load_logits(logits_TE, token, num_tokens, C)
    # A token without any expert has nothing to divide by.
    served = tl.max(valid.to(tl.int32), 1)[:, None] > 0
    top = tl.where(served, tl.max(pool, 1)[:, None], 0.0)
    total = tl.where(served, tl.sum(tl.exp(pool - top), 1)[:, None], 1.0)
    return tl.where(valid, tl.exp(logit - top) / total, 0.0)


@triton.jit
def load_ids(expert_of_TK, token, num_tokens, C: tl.constexpr):
    """Load the ids of some tokens, -1 in the padding."""
    choice = tl.arange(0, C.top_k_pad)[None, :]
    return tl.load(
        expert_of_TK + token.to(tl.int64)[:, None] * C.top_k + choice,
        mask=(token < num_tokens)[:, None] & (choice < C.top_k),
        other=-1,
    )


@triton.jit
def skip_bad(ids, bad, reason, token, control, C: tl.constexpr):
    """Return ``ids`` with the bad ones turned into -1, and report the first of them."""
    choice = tl.arange(0, C.top_k_pad)[None, :]
    place = token[:, None] * C.top_k + choice
    first = tl.min(tl.min(tl.where(bad, place, _GREATEST), 1), 0)
    if first != _GREATEST:
        value = tl.sum(tl.sum(tl.where(place == first, ids, 0), 1), 0)
        record_bad_input(control, reason, first // C.top_k, first % C.top_k, value.to(tl.int32))
    return tl.where(bad, -1, ids)


@triton.jit
def check_ids(ids, token, control, C: tl.constexpr):
    """Skip ids outside [-1, E) and second occurrences within a token; return int32 ids."""
    bad = (ids < -1) | (ids >= C.num_experts)
    ids = skip_bad(ids, bad, ID_OUT_OF_RANGE, token, control, C).to(tl.int32)
    choice = tl.arange(0, C.top_k_pad)[None, :]
    twice = ids < -1
    for k in range(C.top_k):
        at_k = tl.sum(tl.where(choice == k, ids, 0), 1)[:, None]
        twice = twice | ((choice > k) & (ids == at_k) & (ids >= 0))
    return skip_bad(ids, twice, ID_TWICE, token, control, C)


@triton.jit
def bin_of(ids, token, routing, slots, control, C: tl.constexpr):
    """Return the bin of each choice: its expert, or the slot the caller named for it."""
    bins = ids
    if C.split == "slot":
        choice = tl.arange(0, C.top_k_pad)[None, :]
        named = tl.load(
            routing.slot_of_TK + token.to(tl.int64)[:, None] * C.top_k + choice,
            mask=ids >= 0,
            other=-1,
        ).to(tl.int32)
        inside = (named >= 0) & (named < C.num_slots)
        held = tl.load(slots.expert_of_P + named, mask=inside, other=-1)
        bins = skip_bad(named, (ids >= 0) & (held != ids), SLOT_OF_OTHER_EXPERT, token, control, C)
    return bins


@triton.jit
def count(bins, before, token, num_tokens, rank_TK, C: tl.constexpr):
    """Write each choice's rank in its bin, counting from ``before``; return the new counts.

    A token holds a bin at most once, so ranks follow token order alone.
    """
    choice = tl.arange(0, C.top_k_pad)[None, :]
    bin_index = tl.arange(0, C.bins_pad)[None, :]
    held = tl.full(C.bins_tile, 0, tl.int32)
    for k in range(C.top_k):
        at_k = tl.sum(tl.where(choice == k, bins, 0), 1)[:, None]
        held += (bin_index == at_k).to(tl.int32)
    rank = tl.cumsum(held, 0) - held + before[None, :]
    for k in range(C.top_k):
        at_k = tl.sum(tl.where(choice == k, bins, 0), 1)
        rank_k = tl.sum(tl.where(bin_index == at_k[:, None], rank, 0), 1)
        tl.store(
            rank_TK + token.to(tl.int64) * C.top_k + k,
            tl.where(at_k >= 0, rank_k, -1),
            mask=token < num_tokens,
        )
    return before + tl.sum(held, 0)


@triton.jit
def gate_tile(tile, x_TH, router_EH, routing, slots, rows, control, num_tokens, C: tl.constexpr):
    """Route one token tile: logits, ids, weights, ranks within the tile, counts per bin.

    Reads: x_TH, router_EH; ids where they are given. Writes: logits_TE, expert_of_TK, gate_TK,
    rank_TK and one row of base_GB, as far as the route leaves them open.
    """
    first_token = tile * C.block_tokens
    if C.route != "given":
        store_logits(x_TH, router_EH, routing.logits_TE, first_token, num_tokens, C)
        tl.debug_barrier()  # the selection reads what other threads stored
    counts = tl.full(C.bins_row, 0, tl.int32)
    choice = tl.arange(0, C.top_k_pad)[None, :]
    for start in range(0, C.block_tokens, C.select_tokens):
        token = first_token + start + tl.arange(0, C.select_tokens)
        inside = (token < num_tokens)[:, None] & (choice < C.top_k)
        place = token.to(tl.int64)[:, None] * C.top_k + choice
        if C.route == "live":
            ids = choose(load_logits(routing.logits_TE, token, num_tokens, C), C)
            ids = tl.where(inside, ids, -1)
            tl.store(routing.expert_of_TK + place, ids, mask=inside)
        else:
            ids = load_ids(routing.expert_of_TK, token, num_tokens, C)
        if C.route != "given":
            gate = weigh(routing.logits_TE, token, num_tokens, ids, C)
            tl.store(routing.gate_TK + place, gate, mask=inside)
        if C.route == "given":
            ids = check_ids(ids, token, control, C)
        if not C.replay:
            bins = bin_of(ids, token, routing, slots, control, C)
            counts = count(bins, counts, token, num_tokens, rows.rank_TK, C)
    if not C.replay:
        bin_index = tl.arange(0, C.bins_pad)
        tl.store(rows.base_GB + tile * C.num_bins + bin_index, counts, mask=bin_index < C.num_bins)


@triton.jit
def prefix_bins(block, rows, num_tokens, C: tl.constexpr):
    """Turn the tiles' counts of some bins into first ordinals, in place, and write the totals."""
    bin_index = block * C.PREFIX_BINS + tl.arange(0, C.PREFIX_BINS)
    token_tiles = (num_tokens + C.block_tokens - 1) // C.block_tokens
    total = tl.full(C.prefix_row, 0, tl.int32)
    for first_tile in range(0, token_tiles, 32):
        tile = first_tile + tl.arange(0, 32)
        place = rows.base_GB + tile.to(tl.int64)[:, None] * C.num_bins + bin_index[None, :]
        inside = (tile < token_tiles)[:, None] & (bin_index < C.num_bins)[None, :]
        counts = tl.load(place, mask=inside, other=0)
        tl.store(place, tl.cumsum(counts, 0) - counts + total[None, :], mask=inside)
        total += tl.sum(counts, 0)
    tl.store(rows.total_B + bin_index, total, mask=bin_index < C.num_bins)


@triton.jit
def rows_per_slot(rows, slots, C: tl.constexpr):
    """Return how many rows each slot receives."""
    slot = tl.arange(0, C.slots_pad)
    inside = slot < C.num_slots
    if C.split == "even":
        expert = tl.load(slots.expert_of_P + slot, mask=inside, other=-1)
        total = tl.load(rows.total_B + expert, mask=expert >= 0, other=0)
        copies = tl.load(slots.copies_of_E + expert, mask=expert >= 0, other=1)
        copy = tl.load(slots.copy_of_P + slot, mask=expert >= 0, other=0)
        num_rows = (total - copy + copies - 1) // copies
    else:
        num_rows = tl.load(rows.total_B + slot, mask=inside, other=0)
    return num_rows  # [slots_pad]


@triton.jit
def fill_tile_table(first, last, num_rows, tile_start, rows, slots, C: tl.constexpr):
    """Write expert and filled rows of the row tiles in [first, last)."""
    TILES: tl.constexpr = max(1, 2048 // C.slots_pad)
    slot_index = tl.arange(0, C.slots_pad)[None, :]
    num_used = tl.sum((num_rows + C.block_rows - 1) // C.block_rows, 0)
    for start in range(first, last, TILES):
        tile = start + tl.arange(0, TILES)
        # Empty slots start where the next one does, so the last start at or below is the holder.
        slot = tl.sum((tile_start[None, :] <= tile[:, None]).to(tl.int32), 1) - 1
        is_slot = slot_index == slot[:, None]
        own_start = tl.sum(tl.where(is_slot, tile_start[None, :], 0), 1)
        own_rows = tl.sum(tl.where(is_slot, num_rows[None, :], 0), 1)
        filled = tl.minimum(own_rows - (tile - own_start) * C.block_rows, C.block_rows)
        used = tile < num_used
        expert = slot
        if C.split != "one":
            expert = tl.load(slots.expert_of_P + slot, mask=used, other=0)
        tl.store(rows.expert_of_tile + tile, expert, mask=used & (tile < last))
        tl.store(rows.rows_of_tile + tile, tl.where(used, filled, 0), mask=tile < last)


@triton.jit
def scatter_tile(tile, routing, slots, rows, num_tokens, num_tiles, C: tl.constexpr):
    """Place one token tile's assignments in rows, and write a share of the row tile table.

    Reads: ids or slots, rank_TK, base_GB, total_B. Writes: row_of_TK, assignment_of_C, its share
    of expert_of_tile and rows_of_tile. Every task derives the slots' first tiles for itself, which
    is cheaper than one more wait.
    """
    token_tiles = (num_tokens + C.block_tokens - 1) // C.block_tokens
    num_rows = rows_per_slot(rows, slots, C)
    slot_tiles = (num_rows + C.block_rows - 1) // C.block_rows
    tile_start = tl.cumsum(slot_tiles, 0) - slot_tiles
    slot_index = tl.arange(0, C.slots_pad)
    own_start = rows.tile_start_GP + tile.to(tl.int64) * C.slots_pad
    tl.store(own_start + slot_index, tile_start)
    tl.debug_barrier()  # gathered below by other threads
    share = (num_tiles + token_tiles - 1) // token_tiles
    last = tl.minimum((tile + 1) * share, num_tiles)
    fill_tile_table(tile * share, last, num_rows, tile_start, rows, slots, C)
    choice = tl.arange(0, C.top_k_pad)[None, :]
    for start in range(0, C.block_tokens, C.select_tokens):
        token = tile * C.block_tokens + start + tl.arange(0, C.select_tokens)
        assignment = token[:, None] * C.top_k + choice
        inside = (token < num_tokens)[:, None] & (choice < C.top_k)
        rank = tl.load(rows.rank_TK + assignment, mask=inside, other=-1)
        placed = rank >= 0
        if C.split == "slot":
            bin_index = tl.load(routing.slot_of_TK + assignment, mask=placed, other=0)
        else:
            bin_index = tl.load(routing.expert_of_TK + assignment, mask=placed, other=0)
        ordinal = rank + tl.load(
            rows.base_GB + tile * C.num_bins + bin_index, mask=placed, other=0
        )
        slot = bin_index
        if C.split == "even":
            copies = tl.load(slots.copies_of_E + bin_index, mask=placed, other=1)
            slot = tl.load(
                slots.slots_of_EV + bin_index * C.max_copies + ordinal % copies,
                mask=placed,
                other=0,
            )
            ordinal = ordinal // copies
        row = tl.load(own_start + slot, mask=placed, other=0) * C.block_rows + ordinal
        tl.store(rows.row_of_TK + assignment, tl.where(placed, row, -1), mask=inside)
        tl.store(rows.assignment_of_C + row, assignment, mask=placed)
