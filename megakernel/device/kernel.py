"""The one persistent kernel: claim a task, wait for what it needs, do it, say so."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from megakernel.device.dispatch import prefix_bins, scatter_tile
from megakernel.device.ffn import combine_tile
from megakernel.device.queue import begin, claim, leave, signal, stamp, wait
from megakernel.device.route import gate_tile
from megakernel.device.shared import ffn1_of, ffn2_of, routed_rows
from megakernel.plan.schedule import (
    count_shared_tiles,
    count_tasks,
    first_table_task,
    phase_of,
    segment_of,
    tail_of,
    tile_of,
)


class Routing(NamedTuple):
    """Which experts serve each token. Fields a route does not use are None."""

    expert_of_TK: Tensor  # int32; input when given or replayed, else output
    gate_TK: Tensor  # input when given, else fp32 output
    logits_TE: Tensor | None  # fp32 output
    slot_of_TK: Tensor | None  # int32 input when split is "slot"
    load_E: Tensor | None = None  # int32 output of a live launch: choices per expert


class Biases(NamedTuple):
    """What is added to sums; None where nothing is."""

    router_E: Tensor | None = None  # to the logits
    correction_E: Tensor | None = None  # to the scores, for choosing only
    gate_up_E2I: Tensor | None = None  # to the sums of FFN1
    down_EH: Tensor | None = None  # to the sums of FFN2


class TokenGate(NamedTuple):
    """What weighs the shared expert; None where the weight is 1."""

    weight_1H: Tensor | None = None
    sigmoid_T: Tensor | None = None  # fp32 scratch, written by the gate tasks


class Slots(NamedTuple):
    """Where experts lie; all None when slots are experts."""

    expert_of_P: Tensor | None  # int32, -1 for an empty slot
    copy_of_P: Tensor | None  # int32, which of its expert's copies a slot holds
    copies_of_E: Tensor | None  # int32, at least 1
    slots_of_EV: Tensor | None  # int32, ends in -1


class Rows(NamedTuple):
    """From assignments to rows: a replay's tables, or scratch; the last five are scratch."""

    row_of_TK: Tensor  # int32, -1 if skipped
    assignment_of_C: Tensor  # int32, defined for filled rows
    expert_of_tile: Tensor  # int32
    rows_of_tile: Tensor  # int32, filled rows, at least 1
    base_GB: Tensor | None = None  # int32, per token tile and bin: count, then first ordinal
    total_B: Tensor | None = None  # int32, assignments per bin
    rank_TK: Tensor | None = None  # int32, rank in its bin within the token tile, -1 if skipped
    tile_start_GP: Tensor | None = None  # int32, a scatter task's own copy of slots' first tiles
    num_tiles_1: Tensor | None = None  # int32, row tiles of the launch, shared ones among them


class Control(NamedTuple):
    """Counters, 128 bytes apart and zero between launches; error words; a timed launch's times."""

    counters: Tensor
    error: Tensor
    report: Tensor  # error words on the host
    times: Tensor | None = None  # int64, see timeline.py; None unless the launch is timed


@triton.jit
def wait_for_tables(control, rows, task, num_tokens, num_tiles, max_polls, C: tl.constexpr):
    """Wait for all scatter tasks; return how many row tiles and tasks there are, or no task."""
    token_tiles = (num_tokens + C.block_tokens - 1) // C.block_tokens
    num_tasks = 0
    if wait(control, C.SCATTER_DONE, token_tiles, task, num_tiles, max_polls, C):
        num_tiles = tl.load(rows.num_tiles_1)
        num_tasks = count_tasks(num_tokens, num_tiles, C)
    return num_tiles, num_tasks


@triton.jit
def run_tail(
    task, index, down, biases, shared_down, token_gate, routing, rows, h_CI, y_CH, y_TH, control,
    num_tokens, num_tiles, max_polls, C: tl.constexpr,
):  # fmt: skip
    """Run a task of the tail: FFN2 of a row tile, or combine of a token tile."""
    is_combine, group, index = tail_of(index, num_tokens, num_tiles, C)
    if is_combine:
        target = num_tiles * C.group_blocks
        ready = wait(control, C.FIRST_GROUP + group, target, task, num_tiles, max_polls, C)
        if C.replay:
            token_tiles = (num_tokens + C.block_tokens - 1) // C.block_tokens
            ready &= wait(control, C.GATE_DONE, token_tiles, task, num_tiles, max_polls, C)
        if ready:
            combine_tile(
                index, group, routing.gate_TK, rows.row_of_TK,
                routed_rows(y_CH, num_tokens, C.hidden, C), y_TH, num_tokens, C,
                y_CH, token_gate.sigmoid_T,
            )  # fmt: skip
    else:
        tile, block = tile_of(index, num_tiles, C.group_blocks, C.tile_group)
        counter = C.first_tile_counter + tile
        if wait(control, counter, C.i_blocks, task, num_tiles, max_polls, C):
            block += group * C.group_blocks
            ffn2_of(tile, block, down, biases, shared_down, rows, h_CI, y_CH, num_tokens, C)
            signal(control, C.FIRST_GROUP + group, C)


@triton.jit
def run_dispatch(
    task, kind, index, routing, slots, rows, control, num_tokens, num_tiles, capacity, max_polls,
    C: tl.constexpr,
):  # fmt: skip
    """Run a task between the gate and the row tables: prefix or scatter."""
    token_tiles = (num_tokens + C.block_tokens - 1) // C.block_tokens
    if kind == C.PREFIX:
        if wait(control, C.GATE_DONE, token_tiles, task, num_tiles, max_polls, C):
            prefix_bins(index, rows, num_tokens, C)
            signal(control, C.PREFIX_DONE, C)
    elif wait(control, C.PREFIX_DONE, C.prefix_blocks, task, num_tiles, max_polls, C):
        scatter_tile(index, routing, slots, rows, num_tokens, capacity, C)
        signal(control, C.SCATTER_DONE, C)


@triton.jit(
    do_not_specialize=[
        "num_tokens", "num_tiles", "capacity", "seed", "schedule_id", "num_workers", "max_polls",
    ]
)  # fmt: skip
def moe_kernel(
    x_TH, router_EH, gate_up, down, biases, shared_gate, shared_up, shared_down, token_gate,
    routing, slots, rows, h_CI, y_CH, y_TH, control,
    num_tokens, num_tiles, capacity, seed, schedule_id, num_workers, max_polls, C: tl.constexpr,
):  # fmt: skip
    """Run the layer's task list.

    Grid: (num_workers,), any number; a program claims tasks until none is left.
    Reads: x_TH, router_EH, biases, token_gate, and the weights of the experts (pointers, or
    descriptors when C.weight_tma).
    Writes: y_TH, the outputs in ``routing``, and scratch.
    Order: see schedule.py; every wait is for lower ids, every signal follows a barrier.
    Limits: T·K and the number of padded rows below 2^31; products with a width are 64-bit.
    """
    shared_tiles = count_shared_tiles(num_tokens, C)
    tables_from = first_table_task(num_tokens, shared_tiles, C)
    num_tasks = count_tasks(num_tokens, num_tiles, C)  # live, the most there can be
    task = claim(control, C)
    while task < num_tasks:
        begin(control, task, C)
        if not C.replay:  # noqa: SIM102  (known when compiling; the next is not)
            if task >= tables_from:
                tables_from = num_tasks  # what a worker has once acquired stays visible to it
                num_tiles, num_tasks = wait_for_tables(
                    control, rows, task, num_tokens, num_tiles, max_polls, C
                )
        if task < num_tasks:
            kind, index = phase_of(task, num_tokens, num_tiles, C)
            if kind == C.TAIL:
                run_tail(
                    task, index, down, biases, shared_down, token_gate, routing, rows, h_CI, y_CH,
                    y_TH, control, num_tokens, num_tiles, max_polls, C,
                )  # fmt: skip
            elif kind == C.FFN1:
                first, tiles, index = segment_of(index, num_tiles, shared_tiles, C)
                tile, block = tile_of(index, tiles, C.i_blocks, C.tile_group)
                tile += first
                ffn1_of(
                    tile, block, x_TH, gate_up, biases, shared_gate, shared_up, rows, h_CI,
                    num_tokens, C,
                )  # fmt: skip
                signal(control, C.first_tile_counter + tile, C)
            elif kind == C.GATE:
                gate_tile(
                    index, x_TH, router_EH, biases, token_gate, routing, slots, rows, control,
                    num_tokens, seed, C,
                )  # fmt: skip
                signal(control, C.GATE_DONE, C)
            elif not C.replay:
                run_dispatch(
                    task, kind, index, routing, slots, rows, control, num_tokens, num_tiles,
                    capacity, max_polls, C,
                )  # fmt: skip
        stamp(control, task, C.DONE, C)
        task = claim(control, C)
    leave(control, num_workers, C.first_tile_counter + num_tiles, schedule_id, C)
