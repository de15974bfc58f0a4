"""What a launch needs beside its arguments: every tensor that tasks hand to one another."""

import torch

from megakernel.plan.schedule import Schedule

Shape = tuple[int, ...]


def scratch_shapes(schedule: Schedule, dtype: torch.dtype) -> dict[str, tuple[Shape, torch.dtype]]:
    """Return shape and dtype of every tensor that tasks hand to one another."""
    spec, num_tiles = schedule.spec, schedule.num_tiles
    num_rows = num_tiles * spec.block_rows
    shapes: dict[str, tuple[Shape, torch.dtype]] = {}
    if spec.has_ffn:
        shapes["h_CI"] = ((num_rows, spec.intermediate), dtype)
    if spec.stages == "layer":  # other stages are given it
        shapes["y_CH"] = ((num_rows, spec.hidden), dtype)
    if spec.num_slices:
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
    return shapes | {name: (shape, torch.int32) for name, shape in integers.items()}
