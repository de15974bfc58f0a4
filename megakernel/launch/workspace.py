"""Scratch memory: where bytes live, who owns them, and what a launch left in the error words."""

from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from torch import Tensor

from megakernel.errors import MegakernelStall
from megakernel.launch.report import describe_bad_input, describe_stall
from megakernel.plan.buffers import Control, Rows, Scratch
from megakernel.plan.protocol import Protocol
from megakernel.plan.schedule import Schedule
from megakernel.plan.scratch import Shape, scratch_shapes
from megakernel.plan.spec import KernelSpec

ALIGNMENT_BYTES = 256
NOT_WARM = "call the layer once with the same shapes before capturing it in a CUDA graph"


def place(shapes: dict[str, tuple[Shape, torch.dtype]]) -> tuple[dict[str, int], int]:
    """Return each tensor's byte offset and the bytes they take together."""
    offsets, end = {}, 0
    for name, (shape, dtype) in shapes.items():
        offsets[name] = end
        size_bytes = max(prod(shape), 1) * dtype.itemsize
        end += -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return offsets, end


@dataclass(frozen=True)
class Memory:
    """Views of the arena for one launch shape.

    Attributes:
        schedule_id: place of the schedule among those of the workspace.
        schedule: what is launched.
        scratch: what tasks hand to later ones.
        rows: the row tables; all None where they come with the call.
        times: None unless the launch is timed.
    """

    schedule_id: int
    schedule: Schedule
    scratch: Scratch
    rows: Rows
    times: Tensor | None


@dataclass
class Workspace:
    """Memory that launches of one stream share, one after another."""

    device: torch.device
    arena: Tensor = field(init=False)
    control: Control = field(init=False)
    report: np.ndarray = field(init=False)  # the words of control.report, quicker to look at
    schedules: list[Schedule] = field(default_factory=list)
    views: dict[tuple, Memory] = field(default_factory=dict)
    latest: Memory | None = None  # of the last launch, unless that failed
    captured: bool = False
    outgrown_arenas: list[Tensor] = field(default_factory=list)
    outgrown_counters: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Allocate the error words; arena and counters grow with the first launch."""
        self.arena = torch.empty(0, dtype=torch.uint8, device=self.device)
        error = torch.zeros(Protocol.ERROR_WORDS, dtype=torch.int32, device=self.device)
        on_gpu = self.device.type == "cuda"
        report = torch.zeros(Protocol.ERROR_WORDS, dtype=torch.int32, pin_memory=on_gpu)
        self.control = Control(
            torch.zeros(0, dtype=torch.int32, device=self.device), error, report
        )
        self.report = report.numpy()

    def memory_for(
        self, spec: KernelSpec, num_tokens: int, num_tiles: int, dtype: torch.dtype
    ) -> Memory:
        """Return the views for a launch, growing the memory if it has never been so large."""
        key = (spec, num_tokens, num_tiles, dtype)
        found = self.views.get(key)
        if found is None:
            schedule = Schedule(spec, num_tokens, num_tiles, counted=not spec.makes_rows)
            found = self._make_memory(schedule, dtype)
            self.views[key] = found
        self.latest = found
        return found

    def _make_memory(self, schedule: Schedule, dtype: torch.dtype) -> Memory:
        shapes = scratch_shapes(schedule, dtype)
        offsets, size_bytes = place(shapes)
        self._grow(size_bytes, schedule.num_counters * schedule.spec.COUNTER_STRIDE)
        views = {}
        for name, (shape, kind) in shapes.items():
            used_bytes = prod(shape) * kind.itemsize
            flat = self.arena[offsets[name] : offsets[name] + used_bytes]
            views[name] = flat.view(kind).view(shape)
        scratch = Scratch(**{name: views.get(name) for name in Scratch._fields})
        rows = Rows(**{name: views.get(name) for name in Rows._fields})
        self.schedules.append(schedule)
        return Memory(len(self.schedules) - 1, schedule, scratch, rows, views.get("times"))

    def _grow(self, arena_bytes: int, counter_words: int) -> None:
        if self.holds(arena_bytes, counter_words):
            return
        if self.captured:  # the graph still points at the memory it was captured with
            self.outgrown_arenas.append(self.arena)
            self.outgrown_counters.append(self.control.counters)
        self.views.clear()
        if is_capturing(self.device):
            donor = take_warm(self.device, arena_bytes, counter_words)
            self.arena, counters = donor.arena, donor.control.counters
        else:
            arena_bytes = max(arena_bytes, self.arena.numel())
            counter_words = max(counter_words, self.control.counters.numel())
            self.arena = torch.empty(arena_bytes, dtype=torch.uint8, device=self.device)
            counters = torch.zeros(counter_words, dtype=torch.int32, device=self.device)
        self.control = self.control._replace(counters=counters)

    def holds(self, arena_bytes: int, counter_words: int) -> bool:
        """Whether the memory is large enough."""
        return arena_bytes <= self.arena.numel() and counter_words <= self.control.counters.numel()

    def fill_scratch(self, byte: int) -> None:
        """Fill the arena, so that a launch that reads what it has not written shows."""
        self.arena.fill_(byte)

    def reset(self) -> None:
        """Bring counters and error words back to what a launch must find, graphs' included."""
        for words in (self.control.counters, self.control.error, *self.outgrown_counters):
            words.zero_()
        self.latest = None

    def raise_errors(self) -> None:
        """Raise what an earlier launch reported, once. Does not synchronise."""
        if not (self.report[Protocol.STALL_AT] or self.report[Protocol.INPUT_AT]):
            return
        words = self.report.tolist()
        self.report[:] = 0
        if words[Protocol.STALL_AT]:
            self.reset()
            schedule = self.schedules[words[Protocol.SCHEDULE_AT]]
            raise MegakernelStall(describe_stall(words, schedule))
        raise ValueError(describe_bad_input(words))


_workspaces: dict[tuple[torch.device, int], Workspace] = {}


def workspace_for(device: torch.device) -> Workspace:
    """Return the workspace of the current stream.

    A CUDA graph keeps the memory it was captured with: it takes over what an eager call has
    warmed, so that capturing allocates and zeroes nothing, and eager calls make themselves a new
    workspace. Graphs captured on one stream share one, so replay them one after another.

    Raises:
        RuntimeError: if capturing starts before any call has warmed a workspace.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _workspaces.get((device, stream))
    capturing = is_capturing(device)
    if found is None:
        found = take_warm(device, 0, 0) if capturing else Workspace(device)
        _workspaces[device, stream] = found
    found.captured |= capturing
    return found


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def take_warm(device: torch.device, arena_bytes: int, counter_words: int) -> Workspace:
    """Remove and return the largest workspace of the device that no graph owns, if it is enough.

    Raises:
        RuntimeError: if there is none.
    """
    warm = [
        key
        for key, space in _workspaces.items()
        if key[0] == device and not space.captured and space.holds(arena_bytes, counter_words)
    ]
    if not warm:
        raise RuntimeError(NOT_WARM)
    return _workspaces.pop(max(warm, key=lambda key: _workspaces[key].arena.numel()))


def fill_all_scratch(byte: int) -> None:
    """Fill the scratch of every workspace there is, see :meth:`Workspace.fill_scratch`."""
    for workspace in _workspaces.values():
        workspace.fill_scratch(byte)


def check() -> None:
    """Wait for all launches and raise what they reported.

    Raises:
        MegakernelStall: if a wait inside a launch ran past its bound.
        ValueError: if a launch met a bad id or slot, which it skipped.
    """
    for (device, _), workspace in list(_workspaces.items()):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        workspace.raise_errors()
