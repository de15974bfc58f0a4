"""Device functions of prefix and scatter: from choices to rows, with no atomic choosing one.

A row is found by stable counting. A route task counts its tile's assignments per bin and ranks
each within the tile; the prefix tasks turn the counts of all tiles into first ordinals; a scatter
task adds the two and places the assignment in its slot. A bin is an expert, or a slot when the
caller names the slots.
"""

import triton
import triton.language as tl

from megakernel.device.queue import record_error

_GREATEST = tl.constexpr((1 << 31) - 1)


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
    """Return ``ids`` [select_tokens, top_k_pad], -1 for bad ones, and report the first of them."""
    choice = tl.arange(0, C.top_k_pad)[None, :]
    place = token[:, None] * C.top_k + choice
    first = tl.min(tl.min(tl.where(bad, place, _GREATEST), 1), 0)
    if first != _GREATEST:
        value = tl.sum(tl.sum(tl.where(place == first, ids, 0), 1), 0)
        row, column = first // C.top_k, first % C.top_k
        record_error(control, C.INPUT_AT, reason, row, column, value.to(tl.int32), 0, 0)
    return tl.where(bad, -1, ids)


@triton.jit
def check_ids(ids, token, control, C: tl.constexpr):
    """Skip ids outside [-1, E) and second occurrences within a token; return int32 ids."""
    bad = (ids < -1) | (ids >= C.num_experts)
    ids = skip_bad(ids, bad, C.ID_OUT_OF_RANGE, token, control, C).to(tl.int32)
    choice = tl.arange(0, C.top_k_pad)[None, :]
    twice = ids < -1
    for k in range(C.top_k):
        at_k = tl.sum(tl.where(choice == k, ids, 0), 1)[:, None]
        twice = twice | ((choice > k) & (ids == at_k) & (ids >= 0))
    return skip_bad(ids, twice, C.ID_TWICE, token, control, C)


@triton.jit
def bin_of(ids, token, b, C: tl.constexpr):
    """Return the bin of each choice: its expert, or the slot the caller named for it."""
    bins = ids
    if C.split == "slot":
        choice = tl.arange(0, C.top_k_pad)[None, :]
        named = tl.load(
            b.routing.slot_of_TK + token.to(tl.int64)[:, None] * C.top_k + choice,
            mask=ids >= 0,
            other=-1,
        ).to(tl.int32)
        inside = (named >= 0) & (named < C.num_slots)
        held = tl.load(b.slots.expert_of_P + named, mask=inside, other=-1)
        foreign = (ids >= 0) & (held != ids)
        bins = skip_bad(named, foreign, C.SLOT_OF_OTHER_EXPERT, token, b.control, C)
    return bins


@triton.jit
def rank_in_bins(bins, before, token, num_tokens, rank_TK, C: tl.constexpr):
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
def prefix_bins(block, b, size, C: tl.constexpr):
    """Turn the tiles' counts of some bins into first ordinals, in place, and write the totals."""
    base_GB = b.scratch.base_GB
    bin_index = block * C.PREFIX_BINS + tl.arange(0, C.PREFIX_BINS)
    token_tiles = size.token_tiles
    total = tl.full(C.prefix_row, 0, tl.int32)
    for first_tile in range(0, token_tiles, 32):
        tile = first_tile + tl.arange(0, 32)
        place = base_GB + tile.to(tl.int64)[:, None] * C.num_bins + bin_index[None, :]
        inside = (tile < token_tiles)[:, None] & (bin_index < C.num_bins)[None, :]
        counts = tl.load(place, mask=inside, other=0)
        tl.store(place, tl.cumsum(counts, 0) - counts + total[None, :], mask=inside)
        total += tl.sum(counts, 0)
    tl.store(b.scratch.total_B + bin_index, total, mask=bin_index < C.num_bins)


@triton.jit
def rows_per_slot(b, capacity, C: tl.constexpr):
    """Return how many rows each slot gets, [slots_pad]; an expert gets at most ``capacity``."""
    slot = tl.arange(0, C.slots_pad)
    inside = slot < C.num_slots
    total_B = b.scratch.total_B
    if C.split == "even":
        expert = tl.load(b.slots.expert_of_P + slot, mask=inside, other=-1)
        total = tl.load(total_B + expert, mask=expert >= 0, other=0)
        if C.router.capped:
            total = tl.minimum(total, capacity)
        copies = tl.load(b.slots.copies_of_E + expert, mask=expert >= 0, other=1)
        copy = tl.load(b.slots.copy_of_P + slot, mask=expert >= 0, other=0)
        num_rows = (total - copy + copies - 1) // copies
    else:
        num_rows = tl.load(total_B + slot, mask=inside, other=0)
        if C.router.capped:
            num_rows = tl.minimum(num_rows, capacity)
    return num_rows


@triton.jit
def fill_tile_table(first, last, num_rows, tile_start, b, C: tl.constexpr):
    """Write expert and filled rows of the row tiles in [first, last).

    Args:
        num_rows, tile_start: [slots_pad] rows of each slot, and its first row tile.
    """
    TILES: tl.constexpr = max(1, 2048 // C.slots_pad)
    slot_index = tl.arange(0, C.slots_pad)[None, :]
    for start in range(first, last, TILES):
        tile = start + tl.arange(0, TILES)
        inside = tile < last
        # Empty slots start where the next one does, so the last start at or below is the holder.
        slot = tl.sum((tile_start[None, :] <= tile[:, None]).to(tl.int32), 1) - 1
        is_slot = slot_index == slot[:, None]
        own_start = tl.sum(tl.where(is_slot, tile_start[None, :], 0), 1)
        own_rows = tl.sum(tl.where(is_slot, num_rows[None, :], 0), 1)
        filled = tl.minimum(own_rows - (tile - own_start) * C.block_rows, C.block_rows)
        expert = slot
        if C.split != "one":
            expert = tl.load(b.slots.expert_of_P + slot, mask=inside, other=0)
        tl.store(b.rows.expert_of_tile + tile, expert, mask=inside)
        tl.store(b.rows.rows_of_tile + tile, filled, mask=inside)


@triton.jit
def store_load(b, C: tl.constexpr):
    """Write how many choices each expert has, before any is dropped over capacity."""
    expert = tl.arange(0, C.experts_pad)
    inside = expert < C.num_experts
    total_B = b.scratch.total_B
    if C.split == "slot":
        load = tl.full(C.experts_row, 0, tl.int32)
        for copy in range(C.max_copies):
            place = b.slots.slots_of_EV + expert * C.max_copies + copy
            slot = tl.load(place, mask=inside, other=-1)
            load += tl.load(total_B + slot, mask=slot >= 0, other=0)
    else:
        load = tl.load(total_B + expert, mask=inside, other=0)
    tl.store(b.routing.load_E + expert, load, mask=inside)


@triton.jit
def store_rows_of_experts(num_rows, tile_start, b, C: tl.constexpr):
    """Write where each expert's rows start and how many there are, where slots are experts."""
    expert = tl.arange(0, C.slots_pad)
    inside = expert < C.num_experts
    tl.store(b.rows.first_row_of_E + expert, tile_start * C.block_rows, mask=inside)
    tl.store(b.rows.rows_of_E + expert, num_rows, mask=inside)


@triton.jit
def drop(routing, assignment, dropped):
    """Report choices over capacity: id -1 and weight 0."""
    tl.debug_barrier()  # other threads may still have to read these ids
    tl.store(routing.expert_of_TK + assignment, -1, mask=dropped)
    tl.store(routing.gate_TK + assignment, 0.0, mask=dropped)


@triton.jit
def scatter_tile(tile, b, size, C: tl.constexpr):
    """Place one token tile's assignments in rows, and write a share of the row tile table.

    Reads: ids or slots, rank_TK, base_GB, total_B. Writes: row_of_TK, assignment_of_C, its share
    of expert_of_tile and rows_of_tile; ids and weights of choices over capacity; task 0 load_E and
    the number of row tiles. Every task derives the slots' first tiles for itself, which is cheaper
    than one more wait.
    """
    token_tiles = size.token_tiles
    num_rows = rows_per_slot(b, size.capacity, C)
    slot_tiles = tl.cdiv(num_rows, C.block_rows)
    tile_start = tl.cumsum(slot_tiles, 0) - slot_tiles
    num_tiles = tl.sum(slot_tiles, 0)
    if tile == 0:
        tl.store(b.scratch.num_tiles_1, size.shared_tiles + num_tiles)
        if b.routing.load_E is not None:
            store_load(b, C)
        if b.rows.rows_of_E is not None:
            store_rows_of_experts(num_rows, tile_start, b, C)
    own_start = b.scratch.tile_start_GP + tile.to(tl.int64) * C.slots_pad
    tl.store(own_start + tl.arange(0, C.slots_pad), tile_start)
    tl.debug_barrier()  # gathered below by other threads
    share = tl.cdiv(num_tiles, token_tiles)
    last = tl.minimum((tile + 1) * share, num_tiles)
    fill_tile_table(tile * share, last, num_rows, tile_start, b, C)
    for start in range(0, C.block_tokens, C.select_tokens):
        token = tile * C.block_tokens + start + tl.arange(0, C.select_tokens)
        place_tokens(tile, token, own_start, b, size, C)


@triton.jit
def place_tokens(tile, token, own_start, b, size, C: tl.constexpr):
    """Place the assignments of some tokens of a tile; ``own_start`` has the slots' first tiles."""
    choice = tl.arange(0, C.top_k_pad)[None, :]
    assignment = token[:, None] * C.top_k + choice
    inside = (token < size.num_tokens)[:, None] & (choice < C.top_k)
    rank = tl.load(b.scratch.rank_TK + assignment, mask=inside, other=-1)
    placed = rank >= 0
    if C.split == "slot":
        bin_index = tl.load(b.routing.slot_of_TK + assignment, mask=placed, other=0)
    else:
        bin_index = tl.load(b.routing.expert_of_TK + assignment, mask=placed, other=0)
    base = b.scratch.base_GB + tile * C.num_bins + bin_index
    ordinal = rank + tl.load(base, mask=placed, other=0)
    if C.router.capped:
        drop(b.routing, assignment, placed & (ordinal >= size.capacity))
        placed = placed & (ordinal < size.capacity)
    slot = bin_index
    if C.split == "even":
        copies = tl.load(b.slots.copies_of_E + bin_index, mask=placed, other=1)
        copy_place = b.slots.slots_of_EV + bin_index * C.max_copies + ordinal % copies
        slot = tl.load(copy_place, mask=placed, other=0)
        ordinal = ordinal // copies
    row = tl.load(own_start + slot, mask=placed, other=0) * C.block_rows + ordinal
    tl.store(b.rows.row_of_TK + assignment, tl.where(placed, row, -1), mask=inside)
    tl.store(b.rows.assignment_of_C + row, assignment, mask=placed)
