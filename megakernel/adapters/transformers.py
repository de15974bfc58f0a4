"""The layer in Hugging Face transformers (5.17 to 5.23): swap, record, replay.

    use_megakernel(model)                              # gate and experts in one launch
    with record_routing(model) as record:
        model(input_ids)
    with replay_routing(model, record.ids_TLK):        # the same experts, live weights
        model(input_ids)

Parameters stay where they are and are read at each call, so ``state_dict`` and training code see
the model they know. Each layer's gradients are one launch more.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from megakernel.adapters.blocks import FusedBlock, fuse, megakernel_experts, unfuse
from megakernel.adapters.families import family_of
from megakernel.adapters.modules import MoELayer, check_experts_module, find_layers
from megakernel.adapters.recording import RoutingRecord, one_each, record_routing, replay_routing
from megakernel.adapters.state import LayerState
from megakernel.config import KernelConfig
from megakernel.placement import Placement

__all__ = [
    "RoutingRecord",
    "record_routing",
    "register_experts",
    "replay_routing",
    "use_megakernel",
]

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
    save: str = "preactivations",
) -> Model:
    """Run every Mixture-of-Experts layer of a transformers model as one launch, in place.

    Args:
        model: a transformers model; parameters, their names and ``state_dict`` stay as they are.
        fuse_gate: True swaps the whole sparse block, gate included (the families in
            ``adapters.families``); False leaves the gate in PyTorch and runs the experts of any
            model with transformers' experts interface.
        config: how to cut the work; None for the default of each call.
        placements: experts in slots, one for each MoE layer; None for the identity.
        save: what a forward keeps for its backward: "preactivations", or "nothing", which takes
            less memory and runs the first product again.

    Returns:
        The same model.

    Raises:
        ValueError: before anything is changed, naming what the kernel can not compute: a model
            without experts, a quantised one, a block whose gate is not known, a flag of the
            experts.
    """
    layers = find_layers(model)
    states = [LayerState(config, p, save) for p in one_each("placements", placements, layers)]
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
