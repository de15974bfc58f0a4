"""How the sparse block of each supported model family routes, and which expert serves all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from megakernel.adapters.modules import local, unwrap
from megakernel.experts import SharedExpert
from megakernel.router import Router


@dataclass(frozen=True)
class Family:
    """What a sparse block computes around its experts.

    Attributes:
        router: reads the block's gate module as a Router.
        gate: name of that module in the block.
        shared: name in the block of the MLP that serves every token; None for none.
        shared_gate: name of the linear layer that weighs it; None for weight 1.
        returns_weights: whether the block returns its routing weights after its output.
    """

    router: Callable[[Any], Router]
    gate: str = "gate"
    shared: str | None = None
    shared_gate: str | None = None
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


# By class name of the sparse block, so that no model file is imported to look one up.
FAMILIES = {
    "MixtralSparseMoeBlock": Family(softmax_router),
    "Qwen2MoeSparseMoeBlock": Family(
        softmax_router, shared="shared_expert", shared_gate="shared_expert_gate"
    ),
    "Qwen3MoeSparseMoeBlock": Family(softmax_router),
    "OlmoeSparseMoeBlock": Family(softmax_router),
    "GptOssMLP": Family(biased_router, gate="router", returns_weights=True),
    "DeepseekV3MoE": Family(sigmoid_router, shared="shared_experts"),
    "Glm4MoeMoE": Family(sigmoid_router, shared="shared_experts"),
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
    replaced = [m for m in block.modules() if "forward" in vars(m)]
    if replaced:
        raise ValueError(
            "fuse_gate must be False with a replaced forward, got one in "
            f"{type(replaced[0]).__name__}"
        )
    check_shared(block, family)
    return family


def check_shared(block: Any, family: Family) -> None:
    """Raise ValueError unless the shared expert is of the routed experts' kind, without biases."""
    if family.shared is None:
        return
    mlp = getattr(block, family.shared)
    mine, routed = type(mlp.act_fn).__name__, type(unwrap(block.experts).act_fn).__name__
    if mine != routed:
        raise ValueError(f"{family.shared} must have the act_fn of experts, {routed}, got {mine}")
    linears = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    linears += [getattr(block, family.shared_gate)] if family.shared_gate else []
    for linear in linears:
        if type(linear) is not nn.Linear or linear.bias is not None:
            raise ValueError(
                f"{family.shared} must be made of plain linear layers without bias, got {linear}"
            )


def read_shared(block: Any, family: Family) -> SharedExpert | None:
    """Return the shared expert's parameters as they are now."""
    if family.shared is None:
        return None
    mlp = getattr(block, family.shared)
    linears = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    linears += [getattr(block, family.shared_gate)] if family.shared_gate else []
    return SharedExpert(*(local(linear.weight) for linear in linears))
