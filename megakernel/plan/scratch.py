"""What a launch needs beside its arguments: every tensor that tasks hand to one another."""

import torch

from megakernel.plan.backward_spec import BackwardSpec
from megakernel.plan.schedule import Schedule

Shape = tuple[int, ...]


def scratch_shapes(schedule: Schedule, dtype: torch.dtype) -> dict[str, tuple[Shape, torch.dtype]]:
    """Return shape and dtype of every tensor that tasks hand to one another."""
    spec, num_tiles = schedule.spec, schedule.num_tiles
    num_rows = num_tiles * spec.block_rows
    shapes: dict[str, tuple[Shape, torch.dtype]] = {}
    if isinstance(spec, BackwardSpec):
        shapes |= backward_shapes(spec, schedule, dtype)
    elif spec.has_ffn:
        shapes["h_CI"] = ((num_rows, spec.intermediate), dtype)
    if spec.stages == "layer":  # other stages are given it
        shapes["y_CH"] = ((num_rows, spec.hidden), dtype)
    if spec.num_slices and not spec.is_backward:
        shapes["sigmoid_T"] = ((schedule.num_tokens,), torch.float32)
    if spec.timed:
        shapes["times"] = ((1 + schedule.num_tasks, spec.NUM_TIMES), torch.int64)
    if not spec.makes_rows:
        return shapes
    integers = {
        "base_GB": (schedule.token_tiles, spec.num_bins),
        "total_B": (spec.num_bins,),
        "rank_TK": (schedule.num_tokens, spec.top_k),
        "tile_start_GP": (schedule.token_tiles, spec.slots_pad),
        "num_tiles_1": (1,),
        "row_of_TK": (schedule.num_tokens, spec.top_k),
        "assignment_of_C": (num_rows,),
        "expert_of_tile": (num_tiles,),
        "rows_of_tile": (num_tiles,),
    }
    if spec.is_backward:
        integers |= {"first_row_of_E": (spec.num_experts,), "rows_of_E": (spec.num_experts,)}
    return shapes | {name: (shape, torch.int32) for name, shape in integers.items()}


def backward_shapes(
    spec: BackwardSpec, schedule: Schedule, dtype: torch.dtype
) -> dict[str, tuple[Shape, torch.dtype]]:
    """Return those of a backward launch alone, as far as what is asked for needs them."""
    asked, num_tokens = spec.gradients, schedule.num_tokens
    num_rows = schedule.num_tiles * spec.block_rows
    shapes: dict[str, tuple[Shape, torch.dtype]] = {}
    if asked.recomputes:
        shapes["z_A2I"] = ((num_tokens * spec.top_k, spec.z_width), dtype)
        if spec.num_slices:
            shapes["shared_z_S2I"] = ((spec.num_slices * num_tokens, spec.z_width), dtype)
    if asked.x or asked.gate_up or asked.gate_up_bias or asked.shared_gate or asked.shared_up:
        shapes["dz_C2I"] = ((num_rows, spec.z_width), dtype)
    if asked.down or asked.shared_down:
        shapes["a_CI"] = ((num_rows, spec.intermediate), dtype)
    if asked.x:
        shapes["dx_CH"] = ((num_rows, spec.hidden), dtype)
    if spec.has_ds:
        shapes["ds_CB"] = ((num_rows, spec.i_blocks), torch.float32)
    if spec.has_ds and asked.weighs:
        shapes["dlogits_TE"] = ((num_tokens, spec.num_experts), torch.float32)
    if spec.has_ds and asked.token_gated:
        shapes["dtoken_T"] = ((num_tokens,), torch.float32)
    return shapes
