"""Where scratch lies: names, sizes, alignment."""

from dataclasses import replace

import torch

from megakernel.launch.memory import ALIGNMENT_BYTES, place
from megakernel.plan.schedule import Schedule
from megakernel.plan.scratch import scratch_shapes
from tests.helpers.specs import PLAIN_SPEC

SCHEDULE = Schedule(PLAIN_SPEC, num_tokens=40, num_tiles=8)


def test_scratch_of_a_live_launch_has_the_named_shapes():
    shapes = {name: shape for name, (shape, _) in scratch_shapes(SCHEDULE, torch.half).items()}
    rows = 8 * PLAIN_SPEC.block_rows
    assert shapes["h_CI"] == (rows, PLAIN_SPEC.intermediate)
    assert shapes["y_CH"] == (rows, PLAIN_SPEC.hidden)
    assert shapes["row_of_TK"] == (40, PLAIN_SPEC.top_k)
    assert shapes["assignment_of_C"] == (rows,)


def test_a_replay_needs_no_tables():
    replay = replace(SCHEDULE, spec=replace(PLAIN_SPEC, route="replay"))
    assert set(scratch_shapes(replay, torch.half)) == {"h_CI", "y_CH"}


def test_tensors_are_aligned_and_do_not_overlap():
    shapes = scratch_shapes(SCHEDULE, torch.float32)
    offsets, size_bytes = place(shapes)
    ends = [*list(offsets.values())[1:], size_bytes]
    for (name, (shape, dtype)), end in zip(shapes.items(), ends, strict=True):
        assert offsets[name] % ALIGNMENT_BYTES == 0
        assert offsets[name] + torch.Size(shape).numel() * dtype.itemsize <= end
