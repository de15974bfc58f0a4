"""How the sparse block of each supported model family routes, and what it adds beside."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megakernel.layer import Router


@dataclass(frozen=True)
class Family:
    """What a sparse block computes around its experts.

    Attributes:
        router: reads the block's gate module as a Router.
        gate: name of that module in the block.
        shared: the shared experts' output for [.., H] hidden states, computed by PyTorch beside
            the launch; None where a family has none.
        returns_weights: whether the block returns its routing weights after its output.
    """

    router: Callable[[Any], Router]
    gate: str = "gate"
    shared: Callable[[Any, Tensor], Tensor] | None = None
    returns_weights: bool = False


def softmax_router(gate: Any) -> Router:
    """Softmax over all experts, then top-k; Mixtral's gate has no flag and always renormalises."""
    return Router(gate.top_k, renormalize=getattr(gate, "norm_topk_prob", True))


def biased_router(gate: Any) -> Router:
    """Top-k of biased logits, then softmax over the k: gpt-oss."""
    return Router(gate.top_k, bias_E=gate.bias)


def sigmoid_router(gate: Any) -> Router:
    """Sigmoid scores, corrected for choosing only, group-limited and scaled: DeepSeek-V3."""
    return Router(
        gate.top_k,
        score="sigmoid",
        renormalize=gate.norm_topk_prob,
        scale=gate.routed_scaling_factor,
        correction_bias_E=gate.e_score_correction_bias,
        num_groups=gate.num_group,
        top_groups=gate.topk_group,
    )


def gated_shared_expert(block: Any, hidden_states: Tensor) -> Tensor:
    """One shared expert, weighted by the sigmoid of a gate of its own: Qwen2-MoE."""
    weight = torch.sigmoid(block.shared_expert_gate(hidden_states))
    return weight * block.shared_expert(hidden_states)


def shared_experts(block: Any, hidden_states: Tensor) -> Tensor:
    """Shared experts of weight one: DeepSeek-V3, GLM4-MoE."""
    return block.shared_experts(hidden_states)


# By class name of the sparse block, so that no model file is imported to look one up.
FAMILIES = {
    "MixtralSparseMoeBlock": Family(softmax_router),
    "Qwen2MoeSparseMoeBlock": Family(softmax_router, shared=gated_shared_expert),
    "Qwen3MoeSparseMoeBlock": Family(softmax_router),
    "OlmoeSparseMoeBlock": Family(softmax_router),
    "GptOssMLP": Family(biased_router, gate="router", returns_weights=True),
    "DeepseekV3MoE": Family(sigmoid_router, shared=shared_experts),
    "Glm4MoeMoE": Family(sigmoid_router, shared=shared_experts),
}


def family_of(block: Any) -> Family:
    """Return the family of a sparse block.

    Raises:
        ValueError: naming the class of a block or gate that is not known here; for a module whose
            ``forward`` was replaced, as hooks for offloading do, which a swap would not reach.
    """
    family = FAMILIES.get(type(block).__name__)
    if family is None:
        raise ValueError(
            f"fuse_gate must be False for {type(block).__name__}: only the gates of "
            f"{', '.join(FAMILIES)} are known"
        )
    gate = getattr(block, family.gate)
    if type(gate).__module__ != type(block).__module__:
        raise ValueError(
            f"fuse_gate must be False with a gate other than the model's own, "
            f"got {type(gate).__name__}"
        )
    for module in (block, gate, block.experts):
        if "forward" in vars(module):
            raise ValueError(
                f"fuse_gate must be False with a replaced forward, got one in "
                f"{type(module).__name__}"
            )
    return family
