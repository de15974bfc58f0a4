"""The one persistent kernel: claim a task, wait for what it needs, do it, say so."""

import triton
import triton.language as tl

from megakernel.device.combine import combine_tile
from megakernel.device.dispatch import prefix_bins, scatter_tile
from megakernel.device.ffn import ffn1_tile, ffn2_tile
from megakernel.device.queue import (
    begin,
    claim,
    count_made_tiles,
    leave,
    ready_task,
    signal_task,
    stamp,
)
from megakernel.device.route import route_tile
from megakernel.device.shared import shared_ffn1_tile, shared_ffn2_tile
from megakernel.plan.order import count_tasks, first_table_task, sizes_of


@triton.jit(
    do_not_specialize=[
        "num_tokens", "num_tiles", "capacity", "seed", "schedule_id", "num_workers", "max_polls",
    ]
)  # fmt: skip
def moe_kernel(
    b, gate_up_E2IH, down_EHI, num_tokens, num_tiles, capacity, seed, schedule_id, num_workers,
    max_polls, C: tl.constexpr,
):  # fmt: skip
    """Run the layer's task list.

    Grid: (num_workers,), any number; a program claims tasks until none is left.
    Reads, Writes: the tensors of ``b``, see plan/buffers.py. The experts' weights stand beside it,
    since Triton 3.6 and 3.7 launch no descriptor inside a tuple.
    Order: see plan/order.py; every wait is for lower ids, every signal follows a barrier.
    Limits: T·K and the number of padded rows below 2^31; products with a width are 64-bit.
    """
    GATE_UP: tl.constexpr = C.gate_up
    DOWN: tl.constexpr = C.down
    LOW_GATE_UP: tl.constexpr = C.gate_up_tail
    LOW_DOWN: tl.constexpr = C.down_tail
    size = sizes_of(num_tokens, num_tiles, capacity, seed, not C.makes_rows, C)
    num_tasks = count_tasks(size, C)  # of a launch that makes its rows, the most there can be
    tables_from = num_tasks
    if C.makes_rows:
        tables_from = first_table_task(size, C)
    task = claim(b.control, C)
    while task < num_tasks:
        begin(b.control, task, C)
        if C.makes_rows and task >= tables_from:
            tables_from = num_tasks  # what a worker has once acquired stays visible to it
            num_tiles = count_made_tiles(task, b, size, max_polls, C)
            size = sizes_of(num_tokens, max(num_tiles, 0), capacity, seed, True, C)
            num_tasks = count_tasks(size, C) if num_tiles >= 0 else 0
        kind, tile, block, content = ready_task(task, num_tasks, b, size, max_polls, C)
        # Comparisons of order between those of equality: a chain of four equal ones would compile
        # to a jump through a table.
        if C.has_ffn and kind == C.FFN1:
            if C.tail_rows > 0 and content[1] <= C.tail_rows:
                ffn1_tile(tile, block, content, b.experts.gate_up_E2IH, b, size, LOW_GATE_UP, C)
            else:
                ffn1_tile(tile, block, content, gate_up_E2IH, b, size, GATE_UP, C)
        elif C.has_ffn and kind == C.FFN2:
            if C.tail_rows > 0 and content[1] <= C.tail_rows:
                ffn2_tile(tile, block, content, b.experts.down_EHI, b, size, LOW_DOWN, C)
            else:
                ffn2_tile(tile, block, content, down_EHI, b, size, DOWN, C)
        elif C.has_combine and kind >= C.COMBINE:
            combine_tile(tile, block, b, size, C)
        elif C.has_shared and kind == C.SHARED_FFN1:
            shared_ffn1_tile(tile, block, b, size, C)
        elif C.has_shared and kind == C.SHARED_FFN2:
            shared_ffn2_tile(tile, block, b, size, C)
        elif C.has_route and kind <= C.ROUTE:
            if kind == C.ROUTE:
                route_tile(tile, b, size, C)
        elif C.makes_rows and kind == C.PREFIX:
            prefix_bins(tile, b, size, C)
        elif C.makes_rows and kind == C.SCATTER:
            scatter_tile(tile, b, size, C)
        if C.look_ahead:
            following = claim(b.control, C)
        signal_task(kind, tile, block, b, C)
        stamp(b.control, task, C.DONE, C)
        if not C.look_ahead:
            following = claim(b.control, C)
        task = following
    leave(b.control, num_workers, schedule_id, size, C)
