"""Scratch memory of each stream: who owns it, when it goes, and what launches left in its report.

A workspace has an arena that grows with the launches of its stream. PyTorch's allocator gives an
arena to the stream that uses it, so memory that is let go while a launch still runs on it is used
again behind that launch only. What the host reads, the report, is never let go.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megakernel.errors import MegakernelStall
from megakernel.launch.memory import Memory, make_memory, place
from megakernel.launch.report import describe_bad_input, describe_stall
from megakernel.launch.streams import TURN, is_capturing, stream_of, with_index
from megakernel.plan.buffers import Control
from megakernel.plan.protocol import Protocol
from megakernel.plan.schedule import Schedule
from megakernel.plan.scratch import scratch_shapes
from megakernel.plan.spec import KernelSpec

NOT_WARM = "call the layer once with the same shapes before capturing it in a CUDA graph"
MOST_ARENAS = 8  # of a device, beside those of CUDA graphs
MOST_SHAPES = 512  # launch shapes whose views a workspace keeps
MOST_SCHEDULES = 4096  # more than there are launches waiting, any of which may report one


@dataclass
class Workspace:
    """Memory that launches of one stream share, one after another."""

    device: torch.device
    arena: Tensor = field(init=False)
    control: Control = field(init=False)
    report: np.ndarray = field(init=False)  # the words of control.report, quicker to look at
    schedules: dict[int, Schedule] = field(default_factory=dict)  # by the number a report has
    num_schedules: int = 0  # so far
    views: dict[tuple, Memory] = field(default_factory=dict)
    latest: Memory | None = None  # of the last launch, unless that failed
    captured: bool = False
    outgrown: list[Tensor] = field(default_factory=list)  # that a graph still points at

    def __post_init__(self) -> None:
        """Allocate the error words; arena and counters grow with the first launch."""
        # Memory that outlives the call is normal memory, whatever mode the first call comes in:
        # PyTorch lets nobody change a tensor of inference mode outside of it.
        with torch.inference_mode(False):
            error = torch.zeros(Protocol.ERROR_WORDS, dtype=torch.int32, device=self.device)
            report = torch.zeros(
                Protocol.ERROR_WORDS,
                dtype=torch.int32,
                device="cpu",
                pin_memory=self.device.type == "cuda",
            )
            self.arena, counters = make_arena(self.device, 0, 0)
        self.control = Control(counters, error, report)
        self.report = report.numpy()

    def memory_for(
        self, spec: KernelSpec, num_tokens: int, num_tiles: int, dtype: torch.dtype
    ) -> Memory:
        """Return the views for a launch, growing the memory if it has never been so large."""
        key = (spec, num_tokens, num_tiles, dtype)
        found = self.views.get(key)
        if found is None:
            if len(self.views) >= MOST_SHAPES:
                self.views.clear()
            schedule = Schedule(spec, num_tokens, num_tiles, counted=not spec.makes_rows)
            found = self._make_memory(schedule, dtype)
            self.views[key] = found
        self.latest = found
        return found

    def _make_memory(self, schedule: Schedule, dtype: torch.dtype) -> Memory:
        shapes = scratch_shapes(schedule, dtype)
        _, size_bytes = place(shapes)
        self._grow(size_bytes, schedule.num_counters * schedule.spec.COUNTER_STRIDE)
        self.num_schedules += 1
        self.schedules[self.num_schedules] = schedule
        if not self.captured:  # a graph may report its schedule at any time
            self.schedules.pop(self.num_schedules - MOST_SCHEDULES, None)
        with torch.inference_mode(False):
            return make_memory(self.arena, shapes, schedule, self.num_schedules)

    def _grow(self, arena_bytes: int, counter_words: int) -> None:
        if self.holds(arena_bytes, counter_words):
            return
        if is_capturing(self.device):
            arena, counters = find_warm(self.device, arena_bytes, counter_words).give()
        else:
            arena, counters = make_arena(
                self.device,
                max(arena_bytes, self.arena.numel()),
                max(counter_words, self.control.counters.numel()),
            )
        if self.captured:
            self.outgrown += [self.arena, self.control.counters]
        self._use(arena, counters)

    def _use(self, arena: Tensor, counters: Tensor) -> None:
        self.views.clear()
        self.arena, self.control = arena, self.control._replace(counters=counters)

    def holds(self, arena_bytes: int, counter_words: int) -> bool:
        """Whether the memory is large enough."""
        return arena_bytes <= self.arena.numel() and counter_words <= self.control.counters.numel()

    def give(self) -> tuple[Tensor, Tensor]:
        """Let go of arena and counters, and return them; errors are still heard of."""
        given = self.arena, self.control.counters
        self._use(*make_arena(self.device, 0, 0))
        self.latest = None
        return given

    def release(self) -> None:
        """Let go of all memory, a graph's too, which must not be replayed any more."""
        if self.captured:  # it may have been made on another stream than it is used on
            torch.cuda.synchronize(self.device)
        self.give()
        self.outgrown.clear()
        self.captured = False

    def fill_scratch(self, byte: int) -> None:
        """Fill the arena, so that a launch that reads what it has not written shows."""
        self.arena.fill_(byte)

    def reset(self) -> None:
        """Bring counters and error words back to zero, which a launch that failed did not."""
        for words in (self.control.counters, self.control.error):
            words.zero_()
        self.latest = None

    def raise_errors(self) -> None:
        """Raise what earlier launches reported, once. Does not synchronise.

        The report has two boxes. A launch fills an empty one and then sets its flag, and touches
        no full one; so what belongs to a flag is read after it, and only flags are cleared.
        """
        stalled, refused = self.report[Protocol.STALL_AT], self.report[Protocol.INPUT_AT]
        if not (stalled or refused):
            return
        words, texts = self.report.tolist(), []
        if stalled:
            texts.append(describe_stall(words, self.schedules.get(words[Protocol.SCHEDULE_AT])))
            self.report[Protocol.STALL_AT] = 0
            self.latest = None
        if refused:
            texts.append(describe_bad_input(words))
            self.report[Protocol.INPUT_AT] = 0
        raise (MegakernelStall if stalled else ValueError)("; also: ".join(texts))


def make_arena(
    device: torch.device, arena_bytes: int, counter_words: int
) -> tuple[Tensor, Tensor]:
    """Allocate an arena, and counters at zero, on the current stream."""
    with torch.inference_mode(False):
        return (
            torch.empty(arena_bytes, dtype=torch.uint8, device=device),
            torch.zeros(counter_words, dtype=torch.int32, device=device),
        )


_workspaces: dict[tuple[torch.device, int], Workspace] = {}  # least recently used first


def workspace_for(device: torch.device) -> Workspace:
    """Return the workspace of the device's current stream.

    A CUDA graph keeps the memory it was captured with: it takes over what an eager call has
    warmed, so that capturing allocates and zeroes nothing, and eager calls make themselves a new
    workspace. Graphs captured on one stream share one, so replay them one after another.

    Raises:
        RuntimeError: if capturing starts before any call has warmed a workspace.
    """
    device = with_index(device)
    key = (device, stream_of(device))
    capturing = is_capturing(device)
    with TURN:
        found = _workspaces.pop(key, None)
        if found is None:
            found = take_warm(device) if capturing else Workspace(device)
        _workspaces[key] = found
        if not (capturing or found.arena.numel()):
            release_oldest(device)
        found.captured |= capturing
        return found


def release_oldest(device: torch.device) -> None:
    """Make room for one more arena: those used least recently go first, graphs' stay."""
    held = [
        space
        for (owner, _), space in _workspaces.items()
        if owner == device and not space.captured and space.arena.numel()
    ]
    for space in held[: max(len(held) + 1 - MOST_ARENAS, 0)]:
        space.release()


def take_warm(device: torch.device) -> Workspace:
    """Remove the largest workspace that no graph owns from its stream, and return it.

    Raises:
        RuntimeError: if there is none.
    """
    warm = find_warm(device, 1, 1)
    del _workspaces[next(key for key, space in _workspaces.items() if space is warm)]
    return warm


def find_warm(device: torch.device, arena_bytes: int, counter_words: int) -> Workspace:
    """Return the largest workspace of the device that no graph owns, if it is enough.

    Raises:
        RuntimeError: if there is none.
    """
    warm = [
        space
        for (owner, _), space in _workspaces.items()
        if owner == device and not space.captured and space.holds(arena_bytes, counter_words)
    ]
    if not warm:
        raise RuntimeError(NOT_WARM)
    return max(warm, key=lambda space: space.arena.numel())


def release_workspaces(
    device: torch.device | str | None = None, *, captured: bool = False
) -> None:
    """Give the layer's scratch memory back to PyTorch's allocator; a later call takes new.

    Calls need not have finished, and what they report is still raised. The allocator keeps the
    memory for itself until ``torch.cuda.empty_cache()``.

    Args:
        device: whose memory; that of every device when None.
        captured: whether also what CUDA graphs were captured with (synchronises). Those graphs
            must not be replayed any more.
    """
    wanted = None if device is None else with_index(torch.device(device))
    with TURN:
        for (owner, _), space in _workspaces.items():
            if wanted in (None, owner) and (captured or not space.captured):
                space.release()


def fill_all_scratch(byte: int) -> None:
    """Fill the scratch of every workspace there is, see :meth:`Workspace.fill_scratch`."""
    with TURN:
        for workspace in _workspaces.values():
            workspace.fill_scratch(byte)


def check() -> None:
    """Wait for all launches and raise what they reported, of one stream at a time.

    Raises:
        MegakernelStall: if a wait inside a launch ran past its bound.
        ValueError: if a launch met a bad id or slot, which it skipped.
    """
    with TURN:
        spaces = list(_workspaces.items())
    for device in {device for (device, _), _ in spaces if device.type == "cuda"}:
        torch.cuda.synchronize(device)  # without the turn: others may go on launching
    with TURN:
        for _, workspace in spaces:
            workspace.raise_errors()
