"""Streams and captures where there is no GPU: what the launch asks PyTorch about, made up.

Everything else is real: workspaces of the CPU, and launches in the interpreter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

from megakernel.launch import run, workspace
from megakernel.launch.workspace import Workspace

CPU = torch.device("cpu")


@dataclass
class Streams:
    """The current stream, and whether a graph is being captured on it."""

    current: int = 0
    capturing: bool = False
    workspaces: dict[tuple[torch.device, int], Workspace] = field(default_factory=dict)
    synchronised: list[torch.device] = field(default_factory=list)

    def of(self, stream: int) -> Workspace:
        """Return the workspace of a stream."""
        return self.workspaces[CPU, stream]

    @contextmanager
    def capture(self, stream: int) -> Iterator[None]:
        """Capture a graph on a stream inside a ``with``."""
        before = self.current
        self.current, self.capturing = stream, True
        yield
        self.current, self.capturing = before, False


def make_up_streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """Start with no workspace at all, on stream 0, until the end of the test."""
    made_up = Streams()
    monkeypatch.setattr(workspace, "_workspaces", made_up.workspaces)
    monkeypatch.setattr(workspace, "stream_of", lambda device: made_up.current)
    for module in (workspace, run):
        monkeypatch.setattr(module, "is_capturing", lambda device: made_up.capturing)
    monkeypatch.setattr(torch.cuda, "synchronize", made_up.synchronised.append)
    return made_up
