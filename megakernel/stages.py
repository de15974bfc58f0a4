"""Stages of the layer as launches of their own: the experts' rows, and the combine of rows.

``combine_rows(ffn_rows(x_TH, replay, experts), replay.rows.row_of_TK, gate_TK)`` has the bits of
the whole layer. Between the two, rows may travel: a rank sends those of its experts to the tokens'
home, which sums them.
"""

import torch
from torch import Tensor

from megakernel.api import choose_config
from megakernel.checks.calls import MAX_ROWS, check_call, check_replay, check_runnable, check_size
from megakernel.checks.tensors import (
    check_contiguous,
    check_device,
    check_no_grad,
    check_shape,
    check_tensor,
)
from megakernel.checks.values import refuse
from megakernel.config import INTERPRETER, ROWS128, KernelConfig
from megakernel.experts import Experts
from megakernel.launch.collect import combine_call, rows_call
from megakernel.launch.op import launcher
from megakernel.launch.tuned import at_height
from megakernel.replay import Replay


def ffn_rows(
    x_TH: Tensor, replay: Replay, experts: Experts, config: KernelConfig | None = None
) -> Tensor:
    """Run the expert FFN of a replay's rows as one launch: no router, no weights, no combine.

    y[c] = expert(x[t], e) in the row c = row_of_TK[t, k] of each choice, e = expert_of_TK[t, k].
    Accumulates in float32, rounds once; rows have the bits that they have inside ``api.moe``.

    Args:
        x_TH: [T, H] float32, float16 or bfloat16, contiguous; T may be 0.
        replay: from prepare_replay; rows lie as ``replay.rows`` says.
        experts: weights, dtype of x_TH; no shared expert, which serves tokens and has no rows.
        config: how to cut the work, with the replay's ``block_rows``; None for the default.

    Returns:
        y_CH: [C, H], dtype of x_TH, with C = num_tiles · block_rows of the replay. Rows that only
        fill a tile up are not written.

    Raises:
        ValueError: on a bad argument, before any launch.
        MegakernelStall: when a wait inside a launch ran past its bound.
    """
    check_call(x_TH, experts)
    if experts.shared is not None:
        width = len(experts.shared.up_JH)
        raise ValueError(f"experts must have no shared expert, got one of width {width}")
    if not isinstance(replay, Replay):
        raise TypeError(f"replay must come from prepare_replay, got {type(replay).__name__}")
    shape_TK = (len(x_TH), replay.expert_of_TK.shape[1])
    check_replay(replay, None, experts, shape_TK, x_TH)
    config = config or at_height(
        choose_config(None, shape_TK, experts, x_TH, None), replay.block_rows
    )
    if config.block_rows != replay.block_rows:
        raise ValueError(
            f"config must have block_rows={replay.block_rows} as the replay, "
            f"got {config.block_rows}"
        )
    check_size(shape_TK, replay.placement, experts, config)
    y_CH = x_TH.new_empty(replay.num_tiles * replay.block_rows, x_TH.shape[1])
    if replay.num_tiles:
        tables = replay.rows, replay.num_tiles
        launcher()(rows_call(x_TH, replay.expert_of_TK, tables, experts, y_CH, config))
    return y_CH


def combine_rows(
    y_CH: Tensor, row_of_TK: Tensor, gate_TK: Tensor, config: KernelConfig | None = None
) -> Tensor:
    """Sum each token's rows as one launch.

    y[t] = sum over k of gate[t, k] · y[row_of_TK[t, k]], in k order, in float32, rounded once.

    Args:
        y_CH: [C, H] float32, float16 or bfloat16, contiguous; rows that no token names are not
            read.
        row_of_TK: [T, K] int32 or int64 rows, contiguous; -1 is skipped. T may be 0. A bad row is
            refused on the CPU; on a GPU, or traced, where nobody looks, it must not occur.
        gate_TK: [T, K] float weights, contiguous.
        config: how to cut the work; None for the default.

    Returns:
        y_TH: [T, H], dtype of y_CH.

    Raises:
        ValueError: on a bad argument, before any launch.
    """
    check_tensor("y_CH", y_CH, 2)
    check_runnable("y_CH", y_CH)
    check_rows(row_of_TK, y_CH)
    check_tensor("gate_TK", gate_TK, 2)
    check_shape("gate_TK", gate_TK, tuple(row_of_TK.shape))
    check_device("gate_TK", gate_TK, y_CH)
    for name, tensor in (("y_CH", y_CH), ("gate_TK", gate_TK)):
        check_no_grad(name, tensor)
    if config is None:
        config = INTERPRETER if y_CH.device.type == "cpu" else ROWS128
    y_TH = y_CH.new_empty(len(row_of_TK), y_CH.shape[1])
    if len(row_of_TK):
        launcher()(combine_call(y_CH, row_of_TK, gate_TK, y_TH, config))
    return y_TH


def check_rows(row_of_TK: Tensor, y_CH: Tensor) -> None:
    """Check type, shape and place of a map to rows, and on the CPU its values."""
    if row_of_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"row_of_TK must be int32 or int64, got {row_of_TK.dtype}")
    if row_of_TK.ndim != 2 or not row_of_TK.shape[1]:
        raise ValueError(
            f"row_of_TK must have shape [T, K] with K >= 1, got {tuple(row_of_TK.shape)}"
        )
    check_contiguous("row_of_TK", row_of_TK)
    check_device("row_of_TK", row_of_TK, y_CH)
    if len(y_CH) > MAX_ROWS:
        raise ValueError(f"y_CH must have fewer than 2^31 rows, got {len(y_CH)}")
    if row_of_TK.device.type == "cpu" and not torch.compiler.is_compiling():
        bad_TK = (row_of_TK < -1) | (row_of_TK >= len(y_CH))
        refuse(bad_TK, row_of_TK, f"must be -1 or in [0, {len(y_CH)})", "row_of_TK")
