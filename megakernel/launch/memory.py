"""Where the bytes of a launch's scratch lie."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from megakernel.plan.buffers import Rows, Saved, Scratch
from megakernel.plan.schedule import Schedule
from megakernel.plan.scratch import Shape

ALIGNMENT_BYTES = 256


@dataclass(frozen=True)
class Memory:
    """Views of the arena for one launch shape.

    Attributes:
        schedule_id: number of the schedule among those of the workspace.
        schedule: what is launched.
        scratch: what tasks hand to later ones.
        rows: the row tables; all None where they come with the call.
        saved: what a backward makes again, if the forward did not keep it.
        times: None unless the launch is timed.
    """

    schedule_id: int
    schedule: Schedule
    scratch: Scratch
    rows: Rows
    saved: Saved
    times: Tensor | None


def place(shapes: dict[str, tuple[Shape, torch.dtype]]) -> tuple[dict[str, int], int]:
    """Return each tensor's byte offset and the bytes they take together."""
    offsets, end = {}, 0
    for name, (shape, dtype) in shapes.items():
        offsets[name] = end
        size_bytes = max(prod(shape), 1) * dtype.itemsize
        end += -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return offsets, end


def make_views(arena: Tensor, shapes: dict[str, tuple[Shape, torch.dtype]]) -> dict[str, Tensor]:
    """Return the tensors of an arena that is large enough for them."""
    offsets, _ = place(shapes)
    views = {}
    for name, (shape, dtype) in shapes.items():
        used_bytes = prod(shape) * dtype.itemsize
        flat = arena[offsets[name] : offsets[name] + used_bytes]
        views[name] = flat.view(dtype).view(shape)
    return views


def make_memory(
    arena: Tensor,
    shapes: dict[str, tuple[Shape, torch.dtype]],
    schedule: Schedule,
    schedule_id: int,
) -> Memory:
    """Return the views for a schedule, sorted by owner."""
    views = make_views(arena, shapes)
    scratch = Scratch(**{name: views.get(name) for name in Scratch._fields})
    rows = Rows(**{name: views.get(name) for name in Rows._fields})
    saved = Saved(**{name: views.get(name) for name in ("z_A2I", "shared_z_S2I")})
    return Memory(schedule_id, schedule, scratch, rows, saved, views.get("times"))
