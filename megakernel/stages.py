"""Stages of the layer as launches of their own: the experts' rows, and their combine.

``combine_rows(ffn_rows(x_TH, replay, experts), replay.rows.row_of_TK, gate_TK)`` has the bits of
the layer. Between the two, rows may travel: experts on another rank return theirs to the tokens'
home, which sums them.
"""

import torch
from torch import Tensor
from triton import cdiv

from megakernel.api import choose_config
from megakernel.calls import combine_call, rows_call
from megakernel.checks.calls import MAX_ROWS, check_call, check_replay, check_size
from megakernel.checks.tensors import (
    check_contiguous,
    check_device,
    check_integers,
    check_no_grad,
    check_shape,
    check_tensor,
)
from megakernel.config import FLOAT32, INTERPRETER, ROWS128, KernelConfig
from megakernel.experts import Experts
from megakernel.launch.op import launcher
from megakernel.replay import Replay


def ffn_rows(
    x_TH: Tensor, replay: Replay, experts: Experts, config: KernelConfig | None = None
) -> Tensor:
    """Run the expert FFN of a replay's rows as one launch, without weights and without combine.

    y[c] = expert(x[t], e) for the row c = row_of_TK[t, k] of each choice, e = expert_of_TK[t, k].
    Accumulates in float32, rounds once; the bits are those of the rows inside ``api.moe``.

    Args:
        x_TH: [T, H] float32, float16 or bfloat16, contiguous; T may be 0.
        replay: from prepare_replay; its placement says where rows lie.
        experts: weights, dtype of x_TH; without a shared expert, which has no rows.
        config: how to cut the work; None for the shipped default, at the replay's height.

    Returns:
        y_CH: [C, H], dtype of x_TH, with C = replay.num_tiles · replay.block_rows of the replay of
        the config's height; rows that pad a tile are not written.

    Raises:
        ValueError: on a bad argument, before any launch.
        MegakernelStall: when a wait inside a launch ran past its bound.
    """
    check_call(x_TH, experts)
    if experts.shared is not None:
        raise ValueError(
            "experts must have no shared expert, which serves tokens and not rows, got one of "
            f"width {len(experts.shared.up_JH)}"
        )
    if not isinstance(replay, Replay):
        raise TypeError(f"replay must come from prepare_replay, got {type(replay).__name__}")
    shape_TK = (len(x_TH), replay.expert_of_TK.shape[1])
    check_replay(replay, None, experts, shape_TK, x_TH)
    config = choose_config(config or height_of(replay, x_TH), shape_TK, experts, x_TH, replay)
    replay = replay.of_height(config.block_rows)
    check_size(shape_TK, replay.placement, experts, config)
    y_CH = x_TH.new_empty(replay.num_tiles * replay.block_rows, x_TH.shape[1])
    if replay.num_tiles:
        tables = replay.rows, replay.num_tiles
        launcher()(rows_call(x_TH, replay.expert_of_TK, tables, experts, y_CH, config))
    return y_CH
