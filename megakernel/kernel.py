"""The one persistent kernel: claim a task, wait for what it needs, do it, say so."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from megakernel.dispatch import prefix_bins, scatter_tile
from megakernel.gate import gate_tile
from megakernel.queue import begin, claim, leave, signal, stamp, wait
from megakernel.schedule import count_tasks, phase_of, tail_of, tile_of
from megakernel.shared import ffn1_of, ffn2_of, routed_rows, routed_tiles, scatters_before
from megakernel.tiles import combine_tile


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
    """From assignments to rows. The first four are scratch of a live launch."""

    base_GB: Tensor | None  # int32, per token tile and bin: count, then first ordinal
    total_B: Tensor | None  # int32, assignments per bin
    rank_TK: Tensor | None  # int32, rank in its bin within the token tile, -1 if skipped
    tile_start_GP: Tensor | None  # int32, a scatter task's own copy of the slots' first tiles
    row_of_TK: Tensor  # int32, -1 if skipped
    assignment_of_C: Tensor  # int32, defined for filled rows
    expert_of_tile: Tensor  # int32, defined for tiles with rows
    rows_of_tile: Tensor  # int32, filled rows of a row tile


class Control(NamedTuple):
    """Counters, 128 bytes apart and zero between launches; error words; a timed launch's times."""

    counters: Tensor
    error: Tensor
    report: Tensor  # error words on the host
    times: Tensor | None = None  # int64, see timeline.py; None unless the launch is timed


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
    token_tiles = (num_tokens + C.block_tokens - 1) // C.block_tokens
    num_tasks = count_tasks(num_tokens, num_tiles, C)
    scatters_seen = 0  # what a worker has once acquired, it need not poll for again
    task = claim(control, C)
    while task < num_tasks:
        begin(control, task, C)
        kind, index = phase_of(task, num_tokens, num_tiles, C)
        if kind == C.TAIL:
            is_combine, group, index = tail_of(index, num_tokens, num_tiles, C)
            if is_combine:
                ready = wait(
                    control, C.FIRST_GROUP + group, num_tiles * C.group_blocks,
                    task, max_polls, C,
                )  # fmt: skip
                if C.replay:
                    ready &= wait(control, C.GATE_DONE, token_tiles, task, max_polls, C)
                if ready:
                    combine_tile(
                        index, group, routing.gate_TK, rows.row_of_TK,
                        routed_rows(y_CH, num_tokens, C.hidden, C), y_TH, num_tokens, C,
                        y_CH, token_gate.sigmoid_T,
                    )  # fmt: skip
            else:
                tile, block = tile_of(index, num_tiles, C.group_blocks, C.tile_group)
                counter = C.first_tile_counter + tile
                if wait(control, counter, C.i_blocks, task, max_polls, C):
                    block += group * C.group_blocks
                    ffn2_of(
                        tile, block, down, biases, shared_down, rows, h_CI, y_CH, num_tokens, C
                    )
                    signal(control, C.FIRST_GROUP + group, C)
        elif kind == C.FFN1:
            tile, block = tile_of(index, num_tiles, C.i_blocks, C.tile_group)
            ready = task >= 0
            if not C.replay:
                target = scatters_before(tile, token_tiles, num_tokens, C)
                if scatters_seen < target:  # noqa: SIM102  (wait has effects)
                    if wait(control, C.SCATTER_DONE, target, task, max_polls, C):
                        scatters_seen = target
                ready = scatters_seen >= target
            if ready:
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
            if kind == C.PREFIX:
                if wait(control, C.GATE_DONE, token_tiles, task, max_polls, C):
                    prefix_bins(index, rows, num_tokens, C)
                    signal(control, C.PREFIX_DONE, C)
            elif wait(control, C.PREFIX_DONE, C.prefix_blocks, task, max_polls, C):
                scatter_tile(
                    index, routing, slots, rows, num_tokens,
                    routed_tiles(num_tiles, num_tokens, C), capacity, C,
                )  # fmt: skip
                signal(control, C.SCATTER_DONE, C)
        stamp(control, task, C.DONE, C)
        task = claim(control, C)
    leave(control, num_workers, C.first_tile_counter + num_tiles, schedule_id, C)
