"""Recording which experts a transformers model chose, and forcing them in a later call."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megakernel.adapters.blocks import FusedBlock
from megakernel.adapters.modules import MoELayer, find_layers, read_experts
from megakernel.adapters.state import LayerState, is_recomputing, keep_replays
from megakernel.api import prepare_replay
from megakernel.placement import Placement
from megakernel.replay import Replay


class RoutingRecord:
    """Which experts every token chose, over all calls of a model while it was recorded."""

    def __init__(self, layers: list[MoELayer]) -> None:
        """Start with no call for each layer."""
        self.num_experts: int = layers[0].experts.num_experts  # type: ignore[assignment]
        self.calls_of_layer: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]

    @property
    def ids_TLK(self) -> Tensor:
        """[T, L, K] int32 expert ids; rows in the order the model ran the tokens, call by call."""
        return self._stacked(0)

    @property
    def weights_TLK(self) -> Tensor:
        """[T, L, K] float32 routing weights of ``ids_TLK``."""
        return self._stacked(1).float()

    def _stacked(self, field: int) -> Tensor:
        num_tokens = [sum(len(call[0]) for call in calls) for calls in self.calls_of_layer]
        if len(set(num_tokens)) != 1 or not self.calls_of_layer[0]:
            raise ValueError(
                "record must hold whole calls of the model, got a number of tokens for each "
                f"layer of {num_tokens}"
            )
        by_layer = [torch.cat([call[field] for call in calls]) for calls in self.calls_of_layer]
        return torch.stack(by_layer, dim=1)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Record the expert choices of every call of a model, swapped or not.

    Args:
        model: a transformers model with experts; under CUDA graphs Python does not run, so record
            without them.

    Yields:
        A record to read ``ids_TLK``, ``weights_TLK`` and ``num_experts`` from, also afterwards.

    Raises:
        ValueError: for a model without experts, or one that is being recorded.
    """
    layers = find_layers(model)
    record = RoutingRecord(layers)
    with ExitStack() as stack:
        for layer, calls in zip(layers, record.calls_of_layer, strict=True):
            stack.callback(_record_layer(layer, calls))
        yield record


def _record_layer(layer: MoELayer, calls: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """Let a layer keep its calls, and return how to end that."""
    if not isinstance(layer.block, FusedBlock):
        return _record_calls(layer.experts, calls).remove
    state = layer.block.megakernel
    if state.recorded is not None:
        raise ValueError("model must not be recorded twice at a time")
    state.recorded = calls
    return partial(setattr, state, "recorded", None)


def _record_calls(experts: nn.Module, calls: list[tuple[Tensor, Tensor]]) -> Any:
    def keep(_: nn.Module, arguments: tuple) -> None:
        _, top_k_index, top_k_weights = arguments
        if is_recomputing():
            return
        calls.append((top_k_index.to(torch.int32, copy=True), top_k_weights.detach().clone()))

    return experts.register_forward_pre_hook(keep)


@contextmanager
def replay_routing(
    model: nn.Module,
    ids_TLK: Any,
    placements: Sequence[Placement | None] | None = None,
) -> Iterator[None]:
    """Force the expert ids of every call inside; the weights of those experts stay live.

    The row tables of all layers are built on entering, so that the calls themselves have no
    histogram, prefix or scatter. This is the semantics of Rollout Routing Replay
    (arXiv 2510.11370), also of its gradients, which flow through the live weights.

    What transformers' gradient checkpointing runs again in a backward has the ids of its forward,
    inside or outside. With checkpointing of another kind the backward must be inside too.

    Args:
        model: a model that ``use_megakernel`` has fused.
        ids_TLK: [T, L, K] integers (a tensor or an array) in [0, E), -1 for no expert: one row
            for each token of a call, in its order, and one layer for each MoE layer.
        placements: experts in slots for each layer, as a plan says; None for those of
            ``use_megakernel``.

    Raises:
        ValueError: on a bad id or shape, on entering; from a call with another number of tokens.
    """
    layers = find_layers(model)
    states = [_fused_state(layer) for layer in layers]
    own = [state.placement for state in states]
    chosen = own if placements is None else one_each("placements", placements, layers)
    ids_TLK = torch.as_tensor(ids_TLK)
    if ids_TLK.ndim != 3 or ids_TLK.shape[1] != len(layers):
        raise ValueError(
            f"ids_TLK must have shape [T, L, K] with L={len(layers)}, got {tuple(ids_TLK.shape)}"
        )
    replays = [
        _prepare(ids_TLK[:, index], layer, placement)
        for index, (layer, placement) in enumerate(zip(layers, chosen, strict=True))
    ]
    before = [state.replay for state in states]
    try:
        for state, replay in zip(states, replays, strict=True):
            state.replay = replay
        with _kept_when_checkpointed(model, states):
            yield
    finally:
        for state, earlier in zip(states, before, strict=True):
            state.replay = earlier


@contextmanager
def _kept_when_checkpointed(model: nn.Module, states: list[LayerState]) -> Iterator[None]:
    """Let transformers' gradient checkpointing keep the replays of each forward."""
    name = "_gradient_checkpointing_func"
    before = [(module, vars(module)[name]) for module in model.modules() if name in vars(module)]
    try:
        for module, checkpoint in before:
            setattr(module, name, keep_replays(checkpoint, states))
        yield
    finally:
        for module, checkpoint in before:
            setattr(module, name, checkpoint)


def _fused_state(layer: MoELayer) -> LayerState:
    if not isinstance(layer.block, FusedBlock):
        raise ValueError(
            "model must have its gates fused by use_megakernel, which computes the weights of "
            f"forced ids, got {type(layer.block).__name__} in {layer.name}"
        )
    return layer.block.megakernel


def _prepare(ids_TK: Tensor, layer: MoELayer, placement: Placement | None) -> Replay:
    """Build one layer's tables, for the config that a live call would choose."""
    experts, config = read_experts(layer.experts), _fused_state(layer).config
    ids_TK = ids_TK.to(experts.down_EHI.device)
    return prepare_replay(ids_TK, experts.num_experts, placement, config, experts)


def one_each(
    name: str, values: Sequence[Placement | None] | None, layers: list[MoELayer]
) -> Sequence[Placement | None]:
    """Return one value for each layer, None for all where nothing is given.

    Raises:
        ValueError: naming the argument when there are more or fewer.
    """
    if values is None:
        return [None] * len(layers)
    if len(values) != len(layers):
        raise ValueError(f"{name} must have one entry for each of {len(layers)} MoE layers, "
                         f"got {len(values)}")  # fmt: skip
    return values
