"""What a transformers module holds, read as the kernel's records, or why the kernel refuses it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from megakernel.layer import Experts

# The flags of transformers' experts interface, with the only value this kernel computes.
FLAGS = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
SILU_CLASSES = ("SiLU", "SiLUActivation")


class MoELayer(NamedTuple):
    """One Mixture-of-Experts layer of a model: the sparse block, and the experts in it."""

    name: str
    block: nn.Module
    experts: nn.Module


def find_layers(model: nn.Module) -> list[MoELayer]:
    """Return the layers of a model whose experts follow transformers' interface, in model order.

    Raises:
        ValueError: for a quantised model, and for one without such experts.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"model must not be quantised, got hf_quantizer={type(model.hf_quantizer).__name__}"
        )
    layers = list(_walk(model))
    if not layers:
        raise ValueError(
            "model must have experts that follow transformers' experts interface, "
            f"got {type(model).__name__} without any"
        )
    return layers


def _walk(model: nn.Module) -> Iterator[MoELayer]:
    for name, block in model.named_modules():
        for child in block.children():
            if hasattr(child, "is_transposed") and hasattr(child, "down_proj"):
                yield MoELayer(name, block, child)


def why_refused(experts: Any) -> str | None:
    """Return the flag or property that the kernel can not compute, with its value, or None."""
    for flag, computed in FLAGS.items():
        value = getattr(experts, flag, computed)  # 5.17 has no has_post_expert_norm
        if value != computed:
            return f"{flag}={value}"
    if type(experts)._apply_gate.__name__ != "_default_apply_gate":
        return "an _apply_gate of its own"
    if type(experts.act_fn).__name__ not in SILU_CLASSES:
        return f"act_fn={type(experts.act_fn).__name__}"
    for name in ("gate_up_proj", "down_proj"):
        if not getattr(experts, name).is_floating_point():
            return f"{name} of {getattr(experts, name).dtype}"
    return None


def check_experts_module(experts: nn.Module) -> None:
    """Raise ValueError, naming the flag, for experts that the kernel can not compute."""
    if reason := why_refused(experts):
        raise ValueError(
            f"experts must be plain gated SiLU experts, got {type(experts).__name__} with "
            f"{reason}: keep transformers' 'grouped_mm' implementation for this model"
        )


def read_experts(experts: Any) -> Experts:
    """Return the module's parameters as they are now: never a copy, so never a stale one."""
    return Experts(local(experts.gate_up_proj), local(experts.down_proj))


def local(weight: Tensor) -> Tensor:
    """Return a weight that lies on this device as a whole.

    Raises:
        ValueError: for a DTensor, of which the kernel could only see a shard.
    """
    if hasattr(weight, "to_local"):
        raise ValueError(f"weights must be local tensors, got {type(weight).__name__}")
    return weight
