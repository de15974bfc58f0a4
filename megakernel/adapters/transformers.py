"""The layer in Hugging Face transformers (5.17 to 5.23): swap, record, replay.

    use_megakernel(model)                              # gate and experts in one launch
    with record_routing(model) as record:
        model(input_ids)
    with replay_routing(model, record.ids_TLK):        # the same experts, live weights
        model(input_ids)

Parameters stay where they are and are read at each call, so ``state_dict`` and training code see
the model they know. There is no backward: call under ``torch.no_grad()``.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from megakernel.adapters.blocks import FusedBlock, LayerState, fuse, megakernel_experts, unfuse
from megakernel.adapters.families import family_of
from megakernel.adapters.modules import MoELayer, check_experts_module, find_layers
from megakernel.config import KernelConfig, default_config
from megakernel.placement import Placement
from megakernel.replay import Replay, prepare_replay

NAME = "megakernel"
Model = TypeVar("Model", bound=nn.Module)


def register_experts() -> None:
    """Make ``experts_implementation="megakernel"`` known to transformers, for this process.

    Needed before a model is built with that name; :func:`use_megakernel` does it by itself.
    """
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(NAME, megakernel_experts)


def use_megakernel(
    model: Model,
    fuse_gate: bool = True,
    config: KernelConfig | None = None,
    placements: Sequence[Placement | None] | None = None,
) -> Model:
    """Run every Mixture-of-Experts layer of a transformers model as one launch, in place.

    Args:
        model: a transformers model; parameters, their names and ``state_dict`` stay as they are.
        fuse_gate: True swaps the whole sparse block, gate included (the families in
            ``adapters.families``); False leaves the gate in PyTorch and runs the experts of any
            model with transformers' experts interface.
        config: how to cut the work; None for the default of each call.
        placements: experts in slots, one for each MoE layer; None for the identity.

    Returns:
        The same model.

    Raises:
        ValueError: before anything is changed, naming what the kernel can not compute: a model
            without experts, a quantised one, a block whose gate is not known, a flag of the
            experts. When the model is called with gradients enabled.
    """
    layers = find_layers(model)
    states = [LayerState(config, p) for p in one_each("placements", placements, layers)]
    for layer in layers:
        check_experts_module(layer.experts)
        if fuse_gate and not isinstance(layer.block, FusedBlock):
            family_of(layer.block)
        if fuse_gate and getattr(layer.experts, "_is_expert_parallel", False):
            raise ValueError("fuse_gate must be False with experts over ranks, got True")
    for layer, state in zip(layers, states, strict=True):
        if fuse_gate:
            fuse(layer.block, state)
        else:
            unfuse(layer.block)
            layer.experts.megakernel = state  # type: ignore[assignment]
    if not fuse_gate:
        _choose_implementation(model, layers)
    return model


def _choose_implementation(model: Any, layers: list[MoELayer]) -> None:
    register_experts()
    model.set_experts_implementation(NAME)  # does nothing, silently, where it is not supported
    for layer in layers:
        chosen = layer.experts.config._experts_implementation  # type: ignore[union-attr]
        if chosen != NAME:
            raise ValueError(
                f"model must let its experts implementation be set, got {chosen!r} in {layer.name}"
            )


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
            if isinstance(layer.block, FusedBlock):
                state = layer.block.megakernel
                if state.recorded is not None:
                    raise ValueError("model must not be recorded twice at a time")
                state.recorded = calls
                stack.callback(setattr, state, "recorded", None)
            else:
                stack.callback(_record_calls(layer.experts, calls).remove)
        yield record


def _record_calls(experts: nn.Module, calls: list[tuple[Tensor, Tensor]]) -> Any:
    def keep(_: nn.Module, arguments: tuple) -> None:
        _, top_k_index, top_k_weights = arguments
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
    (arXiv 2510.11370).

    Args:
        model: a model that :func:`use_megakernel` has fused.
        ids_TLK: [T, L, K] integers (a tensor or an array) in [0, E), -1 for no expert: one row
            for each token of a call, in its order, and one layer for each MoE layer.
        placements: experts in slots for each layer, as a plan says; None for those of
            :func:`use_megakernel`.

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
        yield
    finally:
        for state, earlier in zip(states, before, strict=True):
            state.replay = earlier


def _fused_state(layer: MoELayer) -> LayerState:
    if not isinstance(layer.block, FusedBlock):
        raise ValueError(
            "model must have its gates fused by use_megakernel, which computes the weights of "
            f"forced ids, got {type(layer.block).__name__} in {layer.name}"
        )
    return layer.block.megakernel


def _prepare(ids_TK: Tensor, layer: MoELayer, placement: Placement | None) -> Replay:
    """Build one layer's tables, for the config that a live call would choose."""
    experts: Any = layer.experts
    weight = experts.down_proj
    config = _fused_state(layer).config
    if config is None:
        config = default_config(ids_TK.numel(), len(weight), weight.dtype, weight.device)
    return prepare_replay(ids_TK.to(weight.device), len(weight), placement, config)


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
