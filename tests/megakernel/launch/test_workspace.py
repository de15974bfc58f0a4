"""Scratch: sizes, reuse, growth, and errors kept from one call to the next."""

from dataclasses import replace

import pytest
import torch

from megakernel.errors import MegakernelStall
from megakernel.launch.workspace import ALIGNMENT_BYTES, Workspace, place, scratch_shapes
from megakernel.plan.protocol import Protocol
from megakernel.plan.schedule import Schedule
from tests.helpers.specs import PLAIN_SPEC

CPU = torch.device("cpu")
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


def test_a_second_call_of_a_shape_reuses_the_views_and_a_larger_one_grows():
    workspace = Workspace(CPU)
    first = workspace.memory_for(PLAIN_SPEC, 40, 8, torch.half)
    arena = workspace.arena
    assert workspace.memory_for(PLAIN_SPEC, 40, 8, torch.half) is first
    workspace.memory_for(PLAIN_SPEC, 10, 4, torch.half)
    assert workspace.arena is arena
    workspace.memory_for(PLAIN_SPEC, 400, 80, torch.half)
    assert workspace.arena.numel() > arena.numel()
    assert workspace.outgrown_arenas == []
    assert int(workspace.control.counters.count_nonzero()) == 0


def test_memory_a_graph_was_captured_with_is_kept_when_the_workspace_grows():
    workspace = Workspace(CPU)
    workspace.memory_for(PLAIN_SPEC, 10, 4, torch.half)
    workspace.captured, arena = True, workspace.arena
    workspace.memory_for(PLAIN_SPEC, 400, 80, torch.half)
    assert any(kept is arena for kept in workspace.outgrown_arenas)
    workspace.outgrown_counters[0].fill_(3)
    workspace.reset()  # after a stall the older graph must find zeros too
    assert int(workspace.outgrown_counters[0].count_nonzero()) == 0


def test_a_second_larger_graph_takes_over_the_memory_of_its_warm_up(monkeypatch):
    """The device says it is capturing; everything else runs for real."""
    captured, warm = Workspace(CPU), Workspace(CPU)
    captured.memory_for(PLAIN_SPEC, 10, 4, torch.half)
    captured.captured, first_arena = True, captured.arena
    warm.memory_for(PLAIN_SPEC, 400, 80, torch.half)
    spaces = {(CPU, 1): captured, (CPU, 2): warm}
    monkeypatch.setattr("megakernel.launch.workspace._workspaces", spaces)
    monkeypatch.setattr("megakernel.launch.workspace.is_capturing", lambda device: True)
    memory = captured.memory_for(PLAIN_SPEC, 400, 80, torch.half)
    assert captured.arena is warm.arena and captured.control.counters is warm.control.counters
    assert any(kept is first_arena for kept in captured.outgrown_arenas)
    assert (
        memory.scratch.h_CI.untyped_storage().data_ptr() == warm.arena.untyped_storage().data_ptr()
    )
    assert spaces == {(CPU, 1): captured}
    with pytest.raises(RuntimeError, match="before capturing"):
        captured.memory_for(PLAIN_SPEC, 4000, 800, torch.half)


@pytest.mark.parametrize(
    ("at", "words", "error", "message"),
    [
        (
            Protocol.STALL_AT,
            [1, 0, 3, 2, 3, 8],
            MegakernelStall,
            r"task 0 \(route.*counter 3.*reach 3, saw 2",
        ),
        (
            Protocol.STALL_AT,
            [1, 14, 9, 0, 1, 2],
            MegakernelStall,
            r"task 14 \(combine, .* group 0\)",
        ),
        (Protocol.INPUT_AT, [1, 7, 0, 99], ValueError, r"expert_of_TK\[7, 0\].*99"),
        (Protocol.INPUT_AT, [2, 7, 1, 3], ValueError, r"expert_of_TK\[7, 1\].*differ.*3"),
        (Protocol.INPUT_AT, [3, 7, 1, 3], ValueError, r"slot_of_TK\[7, 1\].*chosen expert.*3"),
    ],
    ids=[
        "stall",
        "stall in a list of two row tiles",
        "id out of range",
        "id twice",
        "slot of another expert",
    ],
)
def test_a_report_is_raised_once_and_leaves_a_clean_workspace(at, words, error, message):
    workspace = Workspace(CPU)
    used = workspace.memory_for(PLAIN_SPEC, 40, 8, torch.half)
    workspace.control.counters[3] = 9
    report = workspace.control.report
    report[at : at + len(words)] = torch.tensor(words, dtype=torch.int32)
    report[Protocol.SCHEDULE_AT] = used.schedule_id
    with pytest.raises(error, match=message):
        workspace.raise_errors()
    workspace.raise_errors()
    assert int(workspace.control.counters[3]) == (0 if error is MegakernelStall else 9)
