"""What a transformers module holds, read as the kernel's records, or why the kernel refuses it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from megakernel.experts import Experts, SharedExpert

# By class name of transformers' activations.
ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}
GPT_OSS_CLASS, GPT_OSS_ALPHA = "GptOssExperts", 1.702


class MoELayer(NamedTuple):
    """One Mixture-of-Experts layer of a model: the sparse block, and the experts in it.

    ``experts`` holds the parameters; in the block a wrapper may stand around it.
    """

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
        for child in () if is_wrapper(block) else map(unwrap, block.children()):
            if hasattr(child, "is_transposed") and hasattr(child, "down_proj"):
                yield MoELayer(name, block, child)


def is_wrapper(module: nn.Module) -> bool:
    """Say whether a module wraps another one, as peft's do."""
    return hasattr(module, "base_layer")


def unwrap(module: Any) -> Any:
    """Return the module inside all wrappers."""
    while is_wrapper(module):
        module = module.base_layer
    return module


def why_refused(experts: Any) -> str | None:
    """Return the flag or property that the kernel can not compute, with its value, or None."""
    if getattr(experts, "has_post_expert_norm", False):  # absent in 5.17
        return "has_post_expert_norm=True"
    if _is_gpt_oss(experts):
        if experts.alpha != GPT_OSS_ALPHA:
            return f"alpha={experts.alpha}"
    elif type(experts)._apply_gate.__name__ != "_default_apply_gate":
        return "an _apply_gate of its own"
    elif not experts.is_concatenated:
        return "is_concatenated=False"
    elif type(experts.act_fn).__name__ not in ACTIVATIONS:
        return f"act_fn={type(experts.act_fn).__name__}"
    for name in (_up_name(experts), "down_proj"):
        if not getattr(experts, name).is_floating_point():
            return f"{name} of {getattr(experts, name).dtype}"
    return None


def _is_gpt_oss(experts: Any) -> bool:
    return GPT_OSS_CLASS in (cls.__name__ for cls in type(experts).__mro__)


def _up_name(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def check_experts_module(experts: nn.Module) -> None:
    """Raise ValueError, naming the flag, for experts that the kernel can not compute."""
    if reason := why_refused(experts):
        raise ValueError(
            f"experts must be of a kind that the kernel computes, got {type(experts).__name__} "
            f"with {reason}: keep transformers' 'grouped_mm' implementation for this model"
        )


def read_experts(experts: Any, shared: SharedExpert | None = None) -> Experts:
    """Return the module's parameters as they are now: never a copy, so never a stale one.

    A parametrization of torch is computed here, and a part of what autograd sees.
    """
    up_name = _up_name(experts)
    up, down = local(getattr(experts, up_name)), local(experts.down_proj)
    if experts.is_transposed:
        up, down = up.mT, down.mT
    biases: tuple[Tensor | None, Tensor | None] = (None, None)
    if experts.has_bias:
        biases = local(getattr(experts, f"{up_name}_bias")), local(experts.down_proj_bias)
    transposed = bool(experts.is_transposed)
    if _is_gpt_oss(experts):
        return Experts(
            up, down, *biases, "clamped_swiglu", experts.limit, interleaved=True,
            transposed=transposed,
        )  # fmt: skip
    activation = ACTIVATIONS[type(experts.act_fn).__name__]
    return Experts(
        up, down, *biases, activation, has_gate=experts.has_gate, shared=shared,
        transposed=transposed,
    )  # fmt: skip


def local(weight: Tensor) -> Tensor:
    """Return a weight that lies on this device as a whole.

    Raises:
        ValueError: for a DTensor, of which the kernel could only see a shard.
    """
    if hasattr(weight, "to_local"):
        raise ValueError(f"weights must be local tensors, got {type(weight).__name__}")
    return weight
