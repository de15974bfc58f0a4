"""The one persistent kernel of the backward: claim a task, wait for what it needs, do it, say so.

It shares claims, waits and signals with the forward's kernel, and what it runs again of it.
"""

import triton
import triton.language as tl

from megakernel.device.backward import (
    dh_tile,
    dx_sum_tile,
    dx_tile,
    shared_dh_tile,
    shared_dx_tile,
)
from megakernel.device.dispatch import prefix_bins, scatter_tile
from megakernel.device.ffn import ffn1_tile
from megakernel.device.gradients import (
    dbias_tile,
    ddown_tile,
    dgate_up_tile,
    drouter_tile,
    dtoken_gate_tile,
    shared_ddown_tile,
    shared_dgate_up_tile,
)
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
from megakernel.device.shared import shared_ffn1_tile
from megakernel.device.weighing import ds_tile
from megakernel.plan.order import count_tasks, first_table_task, sizes_of


@triton.jit
def run_dispatch(kind, tile, b, size, C: tl.constexpr):
    """Run a task that sorts the ids into rows."""
    if kind == C.ROUTE:
        route_tile(tile, b, size, C)
    elif kind == C.PREFIX:
        prefix_bins(tile, b, size, C)
    elif kind == C.SCATTER:
        scatter_tile(tile, b, size, C)


@triton.jit
def run_shared(kind, tile, block, b, size, C: tl.constexpr):
    """Run a task of the shared expert."""
    if C.recomputes and kind == C.SHARED_FFN1:
        shared_ffn1_tile(tile, block, b, size, C)
    elif kind == C.SHARED_DH:
        shared_dh_tile(tile, block, b, size, C)
    elif C.gradients.x and kind == C.SHARED_DX:
        shared_dx_tile(tile, block, b, size, C)
    elif C.shared_matrices > 0 and kind == C.SHARED_DGATE_UP:
        shared_dgate_up_tile(tile, block, b, size, C)
    elif C.gradients.shared_down and kind == C.SHARED_DDOWN:
        shared_ddown_tile(tile, block, b, size, C)
    elif C.gradients.token_gate and kind == C.DTOKEN_GATE:
        dtoken_gate_tile(tile, b, size, C)


@triton.jit
def run_gradient(kind, tile, block, is_added, b, size, C: tl.constexpr):
    """Run a task that writes the gradient of a weight or bias."""
    if C.gradients.gate_up and kind == C.DGATE_UP:
        dgate_up_tile(tile, block, is_added, b, size, C)
    elif C.gradients.down and kind == C.DDOWN:
        ddown_tile(tile, block, is_added, b, size, C)
    elif (C.gradients.router or C.gradients.router_bias) and kind == C.DROUTER:
        drouter_tile(tile, block, b, size, C)
    elif (C.gradients.gate_up_bias or C.gradients.down_bias) and kind == C.DBIAS:
        dbias_tile(tile, block, b, size, C)


@triton.jit(
    do_not_specialize=[
        "num_tokens", "num_tiles", "is_added", "schedule_id", "num_workers", "max_polls",
    ]
)  # fmt: skip
def backward_kernel(
    b, gate_up_E2IH, down_EHI, num_tokens, num_tiles, is_added, schedule_id, num_workers,
    max_polls, C: tl.constexpr,
):  # fmt: skip
    """Run the task list of the layer's backward.

    Grid: (num_workers,), any number; a program claims tasks until none is left.
    Reads, Writes: the tensors of ``b``, see plan/buffers.py. Gradients of expert weights are added
    to what is there if ``is_added`` is not 0.
    Order: see plan/backward_order.py; every wait is for lower ids, every signal follows a barrier.
    Limits: those of the forward.
    """
    DH_RULE: tl.constexpr = C.dh_rule
    DX_RULE: tl.constexpr = C.dx_rule
    FFN1_RULE: tl.constexpr = C.ffn1_rule
    size = sizes_of(num_tokens, num_tiles, 0, 0, not C.makes_rows, C)
    num_tasks = count_tasks(size, C)
    tables_from = num_tasks
    if C.makes_rows:
        tables_from = first_table_task(size, C)
    task = claim(b.control, C)
    while task < num_tasks:
        begin(b.control, task, C)
        if C.makes_rows and task >= tables_from:
            tables_from = num_tasks  # what a worker has once acquired stays visible to it
            num_tiles = count_made_tiles(task, b, size, max_polls, C)
            size = sizes_of(num_tokens, max(num_tiles, 0), 0, 0, True, C)
            num_tasks = count_tasks(size, C) if num_tiles >= 0 else 0
        kind, tile, block, content = ready_task(task, num_tasks, b, size, max_polls, C)
        if kind == C.DH:
            dh_tile(tile, block, content, down_EHI, b, size, DH_RULE, C)
        elif C.gradients.x and kind == C.DX:
            dx_tile(tile, block, content, gate_up_E2IH, b, DX_RULE, C)
        elif C.recomputes and kind == C.FFN1:
            ffn1_tile(tile, block, content, b.experts.gate_up_E2IH, b, size, FFN1_RULE, C)
        elif C.gradients.x and kind == C.DX_SUM:
            dx_sum_tile(tile, block, b, size, C)
        elif C.has_ds and kind == C.DS:
            ds_tile(tile, b, size, C)
        elif C.makes_rows and kind <= C.SCATTER:
            run_dispatch(kind, tile, b, size, C)
        else:
            run_gradient(kind, tile, block, is_added, b, size, C)
            if C.num_slices > 0:
                run_shared(kind, tile, block, b, size, C)
        if C.look_ahead:
            following = claim(b.control, C)
        signal_task(kind, tile, block, b, C)
        stamp(b.control, task, C.DONE, C)
        if not C.look_ahead:
            following = claim(b.control, C)
        task = following
    leave(b.control, num_workers, schedule_id, size, C)
