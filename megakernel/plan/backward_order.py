"""The order of a backward launch: its counts, waits and signals; ``order.py`` asks here.

A row tile has two counters: of FFN1, where that is run again, and of dH. What a launch writes for
its caller comes last, and of that the weights; dx stands among the tasks of dDown, so that its
loads and stores run beside products.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(index, num_tiles, num_tasks, tile_group):
    """Return (row tile, which of its tasks): ``tile_group`` tiles pass before the next weights."""
    per_group = tile_group * num_tasks
    first_tile = index // per_group * tile_group
    height = min(num_tiles - first_tile, tile_group)
    within = index % per_group
    return first_tile + within % height, within // height


@triton.jit
def count_backward(SEGMENT: tl.constexpr, size, C: tl.constexpr):
    """Return how many tasks a segment of a backward list has."""
    routed_tiles = size.num_tiles - size.shared_tiles
    if SEGMENT == C.PREFIX:
        num_tasks = C.prefix_blocks
    elif (SEGMENT == C.ROUTE) | (SEGMENT == C.SCATTER) | (SEGMENT == C.DS):
        num_tasks = size.token_tiles
    elif (SEGMENT == C.SHARED_FFN1) | (SEGMENT == C.SHARED_DH):
        num_tasks = size.shared_tiles * C.i_blocks
    elif (SEGMENT == C.FFN1) | (SEGMENT == C.DH):
        num_tasks = routed_tiles * C.i_blocks
    elif SEGMENT == C.SHARED_DX:
        num_tasks = size.shared_tiles * C.dx_tasks
    elif SEGMENT == C.DX:
        num_tasks = routed_tiles * C.dx_tasks
    elif SEGMENT == C.DX_SUM:
        num_tasks = size.combine_tiles * C.num_column_groups
    elif SEGMENT == C.MIXED:
        num_tasks = size.combine_tiles * C.num_column_groups + C.num_experts * C.down_tasks
    else:  # the gradient of a weight: as many whatever the call
        num_tasks = C.weight_tasks[SEGMENT - C.DROUTER]
    return num_tasks


@triton.jit
def mixed_of(index, size, C: tl.constexpr):
    """Return (is_sum, index within its kind) of a task in MIXED: dx tasks are spread evenly."""
    num_sums = size.combine_tiles * C.num_column_groups
    spacing = (num_sums + C.num_experts * C.down_tasks) // num_sums
    sums_before = min(index // spacing, num_sums)
    is_sum = (index % spacing == spacing - 1) & (index // spacing < num_sums)
    return is_sum, tl.where(is_sum, sums_before, index - sums_before)


@triton.jit
def backward_task_of(kind, index, size, C: tl.constexpr):
    """Return (kind, tile, block) of a task from its segment and its index there."""
    tile, block = index, 0
    if C.is_mixed and kind == C.MIXED:
        is_sum, tile = mixed_of(index, size, C)
        kind = tl.where(is_sum, C.DX_SUM, C.DDOWN)
    first = size.shared_tiles
    if (kind == C.FFN1) | (kind == C.DH):
        tile, block = tile_of(index, size.num_tiles - first, C.i_blocks, C.tile_group)
        tile += first
    elif kind == C.DX:
        tile, block = tile_of(index, size.num_tiles - first, C.dx_tasks, C.tile_group)
        tile, block = tile + first, block * C.dx_per_task
    elif (kind == C.SHARED_FFN1) | (kind == C.SHARED_DH):
        tile, block = tile_of(index, first, C.i_blocks, C.tile_group)
    elif kind == C.SHARED_DX:
        tile, block = tile_of(index, first, C.dx_tasks, C.tile_group)
        block *= C.dx_per_task
    elif kind == C.DX_SUM:
        block = tile // size.combine_tiles
        tile = tile % size.combine_tiles
    elif kind >= C.DROUTER:
        tile, block = weight_task_of(kind, tile, C)
    return kind, tile, block


@triton.jit
def weight_task_of(kind, index, C: tl.constexpr):
    """Return (tile, block) of a task that writes the gradient of a weight: tile by tile."""
    per_tile = tl.where(kind == C.DROUTER, C.router_tasks, 1)
    per_tile = tl.where(kind == C.DGATE_UP, C.gate_up_tasks, per_tile)
    per_tile = tl.where(kind == C.DDOWN, C.down_tasks, per_tile)
    per_tile = tl.where(kind == C.SHARED_DGATE_UP, C.shared_gate_up_tasks, per_tile)
    per_tile = tl.where(kind == C.SHARED_DDOWN, C.down_tasks, per_tile)
    per_tile = tl.where(kind == C.DBIAS, C.bias_tasks, per_tile)
    return index // per_tile, index % per_tile


@triton.jit
def ffn1_counter_of(tile, C: tl.constexpr):
    """Return the counter of a row tile's FFN1."""
    return C.first_tile_counter + 2 * tile


@triton.jit
def dh_counter_of(tile, C: tl.constexpr):
    """Return the counter of a row tile's dH."""
    return C.first_tile_counter + 2 * tile + 1


@triton.jit
def backward_wait_of(NUMBER: tl.constexpr, kind, tile, size, C: tl.constexpr):
    """Return (counter, least value) of a backward task's first or second wait; 0 for none."""
    counter = C.DS_DONE
    least = tl.where((kind == C.DX_SUM) & C.has_ds, size.token_tiles, 0)
    if NUMBER == 0:
        is_dh = (kind == C.DH) | (kind == C.SHARED_DH)
        is_dx = (kind == C.DX) | (kind == C.SHARED_DX)
        after_ds = (kind == C.DROUTER) | (kind == C.DTOKEN_GATE)
        after_dh = (kind == C.DS) | ((kind > C.DROUTER) & (kind < C.DTOKEN_GATE))
        counter = tl.where(kind == C.PREFIX, C.ROUTE_DONE, C.DS_DONE)
        counter = tl.where(kind == C.SCATTER, C.PREFIX_DONE, counter)
        counter = tl.where(is_dh, ffn1_counter_of(tile, C), counter)
        counter = tl.where(is_dx, dh_counter_of(tile, C), counter)
        counter = tl.where(kind == C.DX_SUM, C.DX_DONE, counter)
        counter = tl.where(after_dh, C.DH_DONE, counter)
        least = tl.where((kind == C.PREFIX) | after_ds, size.token_tiles, 0)
        least = tl.where(kind == C.SCATTER, C.prefix_blocks, least)
        least = tl.where(is_dx | (is_dh & C.recomputes), C.i_blocks, least)
        least = tl.where(kind == C.DX_SUM, size.num_tiles * C.dx_tasks, least)
        least = tl.where(after_dh, size.num_tiles * C.i_blocks, least)
    return counter, least


@triton.jit
def backward_signal_of(NUMBER: tl.constexpr, kind, tile, C: tl.constexpr):
    """Return the first or second counter that a finished backward task adds one to, or -1."""
    is_dh = (kind == C.DH) | (kind == C.SHARED_DH)
    counter = tl.where(is_dh, C.DH_DONE, -1)
    if NUMBER == 0:
        is_ffn1 = (kind == C.FFN1) | (kind == C.SHARED_FFN1)
        is_dx = (kind == C.DX) | (kind == C.SHARED_DX)
        counter = tl.where(kind == C.ROUTE, C.ROUTE_DONE, -1)
        counter = tl.where(kind == C.PREFIX, C.PREFIX_DONE, counter)
        counter = tl.where(kind == C.SCATTER, C.SCATTER_DONE, counter)
        counter = tl.where(is_ffn1, ffn1_counter_of(tile, C), counter)
        counter = tl.where(is_dh, dh_counter_of(tile, C), counter)
        counter = tl.where(is_dx, C.DX_DONE, counter)
        counter = tl.where(kind == C.DS, C.DS_DONE, counter)
    return counter
