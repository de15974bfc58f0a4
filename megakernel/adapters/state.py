"""What a layer of a host's model does on top of its weights, also when it is run again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from megakernel.config import SAVES, KernelConfig
from megakernel.placement import Placement
from megakernel.replay import Replay


@dataclass
class LayerState:
    """What a layer does on top of its weights. Plain data: it is in no ``state_dict``.

    Attributes:
        config: how to cut the work; None for the default of each call.
        placement: experts in slots; None for the identity.
        save: "preactivations" or "nothing", what a forward keeps for its backward.
        replay: forced routing; None to route live.
        recorded: where (ids, weights) of each call go; None when nobody records.
        latest: the replay of the latest call that was no recomputation; None if it routed live.
    """

    config: KernelConfig | None = None
    placement: Placement | None = None
    save: str = "preactivations"
    replay: Replay | None = None
    recorded: list[tuple[Tensor, Tensor]] | None = None
    latest: "ref[Replay] | None" = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError on another ``save``."""
        if self.save not in SAVES:
            raise ValueError(f"save must be one of {SAVES}, got {self.save!r}")

    def choose_replay(self) -> Replay | None:
        """Return the replay of the call that begins.

        Raises:
            ValueError: for a recomputation under another routing than its forward had.
        """
        if torch.compiler.is_compiling():  # a graph is recomputed with the tables of its forward
            return self.replay
        if not is_recomputing():
            self.latest = refer(self.replay)
        elif self.latest != refer(self.replay):
            raise ValueError(
                "backward must run inside the replay_routing of its forward where checkpointing "
                "runs the layer again, got another routing"
            )
        return self.replay

    def record(self, expert_of_TK: Tensor, gate_TK: Tensor) -> None:
        """Keep a call's routing, if somebody records; that of a recomputation is known already."""
        if self.recorded is not None and not is_recomputing():
            self.recorded.append((expert_of_TK, gate_TK.detach()))


def refer(replay: Replay | None) -> "ref[Replay] | None":
    """Return what tells a replay from all others, also from later ones at its address."""
    return None if replay is None else ref(replay)


def is_recomputing() -> bool:
    """Say whether a backward is running: checkpointing then runs forwards again."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


Checkpoint = Callable[..., Any]


def keep_replays(checkpoint: Checkpoint, states: Sequence[LayerState]) -> Checkpoint:
    """Let what a checkpoint runs again have the replays that it had at first.

    Args:
        checkpoint: runs a function on arguments, as ``torch.utils.checkpoint.checkpoint`` does.
        states: of the layers that the function may call.
    """

    def run(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        replays = [state.replay for state in states]

        def run_forced(*arguments: Any, **options: Any) -> Any:
            with forced(states, replays):
                return function(*arguments, **options)

        return checkpoint(run_forced, *arguments, **options)

    return run


@contextmanager
def forced(states: Sequence[LayerState], replays: Sequence[Replay | None]) -> Iterator[None]:
    """Give layers the replays that they had in an earlier forward."""
    before = [(state.replay, state.latest) for state in states]
    try:
        for state, replay in zip(states, replays, strict=True):
            state.replay, state.latest = replay, refer(replay)
        yield
    finally:
        for state, (replay, latest) in zip(states, before, strict=True):
            state.replay, state.latest = replay, latest
