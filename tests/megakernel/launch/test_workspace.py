"""Scratch of streams: reuse, growth, graphs, what is let go, and errors that outlive a call."""

import pytest
import torch
from torch import Tensor

import megakernel
from megakernel import MegakernelStall, release_workspaces
from megakernel.launch import workspace as module
from megakernel.launch.workspace import MOST_ARENAS, Workspace, workspace_for
from megakernel.plan.buffers import flatten
from megakernel.plan.protocol import Protocol
from tests.helpers.cases import SHAPES
from tests.helpers.compare import assert_same_bits
from tests.helpers.inputs import make_inputs, run
from tests.helpers.specs import PLAIN_SPEC
from tests.helpers.streams import CPU, Streams, make_up_streams

STALL = [1, 0, 3, 2, 3, 8]
BAD_ID = [1, 7, 0, 99]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """Streams and captures without a GPU."""
    return make_up_streams(monkeypatch)


def report(workspace: Workspace, at: int, words: list[int], schedule_id: int = 0) -> None:
    """Report as a launch does: the words first, then their flag."""
    told = workspace.control.report
    told[at + 1 : at + len(words)] = torch.tensor(words[1:], dtype=torch.int32)
    if at == Protocol.STALL_AT:
        told[Protocol.SCHEDULE_AT] = schedule_id
    told[at] = words[0]


def use(num_tokens: int = 40) -> Workspace:
    """Ask for the memory of a launch on the current stream, as a launch does."""
    workspace = workspace_for(CPU)
    workspace.memory_for(PLAIN_SPEC, num_tokens, num_tokens // 5, torch.half)
    return workspace


def use_stream(streams: Streams, stream: int) -> Workspace:
    """Ask for the memory of a launch on a stream."""
    streams.current = stream
    return use()


def test_a_second_call_of_a_shape_reuses_the_views_and_a_larger_one_grows():
    workspace = Workspace(CPU)
    first = workspace.memory_for(PLAIN_SPEC, 40, 8, torch.half)
    arena = workspace.arena
    assert workspace.memory_for(PLAIN_SPEC, 40, 8, torch.half) is first
    workspace.memory_for(PLAIN_SPEC, 10, 4, torch.half)
    assert workspace.arena is arena
    workspace.memory_for(PLAIN_SPEC, 400, 80, torch.half)
    assert workspace.arena.numel() > arena.numel()
    assert workspace.outgrown == []
    assert int(workspace.control.counters.count_nonzero()) == 0


def test_what_is_kept_of_shapes_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "MOST_SHAPES", 3)
    monkeypatch.setattr(module, "MOST_SCHEDULES", 5)
    workspace = Workspace(CPU)
    for num_tokens in range(1, 30):
        used = workspace.memory_for(PLAIN_SPEC, num_tokens, 8, torch.half)
        assert workspace.schedules[used.schedule_id].num_tokens == num_tokens
    assert len(workspace.views) <= 3 and len(workspace.schedules) == 5
    report(workspace, Protocol.STALL_AT, STALL, schedule_id=2)  # one that is forgotten
    with pytest.raises(MegakernelStall, match=r"^task 0 waited for counter 3 to reach 3, saw 2"):
        workspace.raise_errors()


class TestGraphs:
    """What was captured keeps its memory, and capturing allocates nothing."""

    def test_a_graph_takes_over_what_a_call_has_warmed(self, streams: Streams):
        warm = use()
        with streams.capture(stream=5):
            assert use() is warm and warm.captured
        assert use() is not warm  # eager calls make themselves a new one
        assert streams.of(5) is warm

    def test_a_second_larger_graph_takes_over_the_memory_of_its_warm_up(self, streams: Streams):
        use(10)
        with streams.capture(stream=5):
            captured = use(10)
        first_arena, warm = captured.arena, use(400)
        arena, counters = warm.arena, warm.control.counters
        with streams.capture(stream=5):
            used = captured.memory_for(PLAIN_SPEC, 400, 80, torch.half)
        assert captured.arena is arena and captured.control.counters is counters
        assert any(kept is first_arena for kept in captured.outgrown)
        assert_lies_in(used.scratch.h_CI, arena)
        assert streams.of(0) is warm, "what its launches report must still be heard of"
        assert use(400).arena is not arena

    def test_capturing_a_cold_layer_is_refused_and_changes_nothing(self, streams: Streams):
        with streams.capture(stream=5), pytest.raises(RuntimeError, match="before capturing"):
            use()
        use(10)
        with streams.capture(stream=5):
            arena = use(10).arena
            with pytest.raises(RuntimeError, match="before capturing"):
                use(4000)
        assert streams.of(5).arena is arena and streams.of(5).outgrown == []

    def test_memory_a_graph_was_captured_with_is_kept_when_the_workspace_grows(self):
        workspace = Workspace(CPU)
        workspace.memory_for(PLAIN_SPEC, 10, 4, torch.half)
        workspace.captured, arena = True, workspace.arena
        workspace.memory_for(PLAIN_SPEC, 400, 80, torch.half)
        assert any(kept is arena for kept in workspace.outgrown)


def assert_lies_in(tensor: Tensor | None, arena: Tensor) -> None:
    assert tensor is not None
    assert tensor.untyped_storage().data_ptr() == arena.untyped_storage().data_ptr()


class TestLettingGo:
    """Streams come and go: their memory does not stay for ever, their errors do."""

    def test_the_arenas_used_least_recently_go_first(self, streams: Streams):
        spaces = [use_stream(streams, stream) for stream in range(MOST_ARENAS)]
        use_stream(streams, 0)
        use_stream(streams, 100)
        held = [space.arena.numel() > 0 for space in spaces]
        assert held == [True, False, *[True] * (MOST_ARENAS - 2)]
        assert spaces[1].views == {} and spaces[1].control.counters.numel() == 0
        assert use_stream(streams, 1) is spaces[1] and spaces[1].arena.numel()

    def test_a_thousand_streams_hold_so_many_arenas(self, streams: Streams):
        for stream in range(1000):
            use_stream(streams, stream)
        held = [space for space in streams.workspaces.values() if space.arena.numel()]
        assert len(held) == MOST_ARENAS

    def test_what_a_graph_holds_is_no_arena_to_let_go(self, streams: Streams):
        use()
        with streams.capture(stream=5):
            captured = use()
        arena = captured.arena
        for stream in range(10, 10 + 2 * MOST_ARENAS):
            use_stream(streams, stream)
        assert captured.arena is arena
        release_workspaces()
        assert captured.arena is arena and not streams.synchronised

    @pytest.mark.parametrize("how", ["other streams", "release_workspaces"])
    def test_an_error_outlives_the_memory(self, how: str, streams: Streams):
        lost = use()
        schedule_id = lost.latest.schedule_id
        report(lost, Protocol.STALL_AT, STALL, schedule_id)
        for stream in range(1, MOST_ARENAS + 1) if how == "other streams" else ():
            use_stream(streams, stream)
        if how == "release_workspaces":
            release_workspaces()
        assert lost.arena.numel() == 0 and lost.latest is None
        with pytest.raises(MegakernelStall, match=r"task 0 \(route.*reach 3, saw 2"):
            megakernel.check()
        megakernel.check()

    def test_the_next_call_takes_new_memory(self, streams: Streams):
        inputs = make_inputs(SHAPES[0])
        expected = run(inputs).y_TH
        release_workspaces("cpu")
        assert streams.of(0).arena.numel() == 0
        assert_same_bits(actual=run(inputs).y_TH, expected=expected)

    def test_one_device_or_all_and_graphs_when_asked_for(self, streams: Streams):
        use()
        with streams.capture(stream=5):
            captured = use()
        captured.outgrown.append(captured.arena)
        eager = use()
        release_workspaces(torch.device("cuda", 3))
        assert eager.arena.numel() and captured.arena.numel()
        release_workspaces(captured=True)
        assert not (eager.arena.numel() or captured.arena.numel() or captured.outgrown)
        assert streams.synchronised == [CPU], "a graph may run on any stream"
        assert not captured.captured


@pytest.mark.parametrize(
    ("at", "words", "error", "message"),
    [
        (Protocol.STALL_AT, STALL, MegakernelStall, r"task 0 \(route.*counter 3.*reach 3, saw 2"),
        (
            Protocol.STALL_AT,
            [1, 14, 9, 0, 1, 2],
            MegakernelStall,
            r"task 14 \(combine, .* group 0\)",
        ),
        (Protocol.INPUT_AT, BAD_ID, ValueError, r"expert_of_TK\[7, 0\].*99"),
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
def test_a_report_is_raised_once(at, words, error, message):
    workspace = Workspace(CPU)
    used = workspace.memory_for(PLAIN_SPEC, 40, 8, torch.half)
    report(workspace, at, words, used.schedule_id)
    with pytest.raises(error, match=message):
        workspace.raise_errors()
    workspace.raise_errors()
    assert (workspace.latest is None) == (error is MegakernelStall)


def test_both_kinds_of_error_are_raised_at_once():
    workspace = Workspace(CPU)
    used = workspace.memory_for(PLAIN_SPEC, 40, 8, torch.half)
    report(workspace, Protocol.INPUT_AT, BAD_ID)
    report(workspace, Protocol.STALL_AT, STALL, used.schedule_id)
    with pytest.raises(MegakernelStall, match=r"saw 2.*; also: expert_of_TK\[7, 0\].*99"):
        workspace.raise_errors()
    workspace.raise_errors()


class ReportedMeanwhile:
    """A report into which a launch writes an error while the host reads another."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.words = workspace.report

    def __getitem__(self, place: int) -> int:
        return self.words[place]

    def __setitem__(self, place: int, value: int) -> None:
        self.words[place] = value

    def tolist(self) -> list[int]:
        words = self.words.tolist()  # of the error that was there already
        report(self.workspace, Protocol.INPUT_AT, BAD_ID)
        return words


def test_an_error_that_arrives_while_another_is_read_is_neither_lost_nor_torn():
    workspace = Workspace(CPU)
    used = workspace.memory_for(PLAIN_SPEC, 40, 8, torch.half)
    report(workspace, Protocol.STALL_AT, STALL, used.schedule_id)
    words = workspace.report
    workspace.report = ReportedMeanwhile(workspace)
    with pytest.raises(MegakernelStall, match=r"not valid$"):
        workspace.raise_errors()
    workspace.report = words
    with pytest.raises(ValueError, match=r"expert_of_TK\[7, 0\].*99"):
        workspace.raise_errors()


def test_words_without_a_flag_are_not_looked_at():
    workspace = Workspace(CPU)
    workspace.report[Protocol.INPUT_AT + 1 :] = 99
    workspace.raise_errors()
    assert workspace.report[Protocol.INPUT_AT + 1] == 99


class TestModes:
    """Whatever mode the first call comes in, the memory serves calls of every other."""

    def test_a_first_call_in_inference_mode_spoils_nothing(self, streams: Streams):
        inputs = make_inputs(SHAPES[0])
        with torch.inference_mode():
            expected = run(inputs).y_TH.clone()
        workspace = streams.of(0)
        kept = {"arena": workspace.arena, **flatten(workspace.control)}
        kept |= flatten(workspace.latest.scratch) | flatten(workspace.latest.rows)
        assert [name for name, tensor in kept.items() if tensor.is_inference()] == []
        report(workspace, Protocol.INPUT_AT, BAD_ID)
        with pytest.raises(ValueError, match=r"expert_of_TK\[7, 0\].*99"):
            megakernel.check()
        workspace.fill_scratch(0xFF)
        workspace.reset()
        assert_same_bits(actual=run(inputs).y_TH, expected=expected)

    def test_so_does_growing_and_letting_go_in_inference_mode(self, streams: Streams):
        with torch.inference_mode():
            workspace = use(10)
            use(400)
            release_workspaces()
            use(20)
        use(500).reset()
        used = workspace.latest
        workspace.control.counters.fill_(0)
        assert used is None and not workspace.control.counters.is_inference()

    def test_so_does_a_graph_captured_in_inference_mode(self, streams: Streams):
        inputs = make_inputs(SHAPES[0])
        with torch.inference_mode():
            expected = run(inputs).y_TH.clone()
            with streams.capture(stream=5):
                run(inputs)
        captured = streams.of(5)
        assert captured.captured and not captured.arena.is_inference()
        captured.reset()
        with streams.capture(stream=5):  # the interpreter runs it at once
            assert_same_bits(actual=run(inputs).y_TH, expected=expected)

    def test_a_first_call_under_another_default_device(self, streams: Streams):
        inputs = make_inputs(SHAPES[0])
        with torch.device("meta"):
            out = run(inputs)
        assert_same_bits(actual=run(inputs).y_TH, expected=out.y_TH)


def test_the_current_gpu_is_the_one_its_tensors_name(monkeypatch):
    """``cuda`` is ``cuda:1`` where that is current: one workspace, whoever asks."""
    asked = []

    class Stream:
        cuda_stream = 7

    def current_stream(device: torch.device) -> Stream:
        asked.append(device)
        return Stream()

    expected = Workspace(CPU)
    expected.memory_for(PLAIN_SPEC, 10, 4, torch.half)
    named = torch.device("cuda", 1)
    monkeypatch.setattr(module, "_workspaces", {(named, 7): expected})
    monkeypatch.setattr(module, "is_capturing", lambda device: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    assert workspace_for(torch.device("cuda")) is expected
    assert workspace_for(named) is expected
    assert set(asked) == {named}
    release_workspaces("cuda")
    assert expected.arena.numel() == 0
