"""Random transformers models, small enough for the interpreter, with experts that matter.

The default initializer_range would make the experts' output vanish next to the residual, and any
wrong answer with it.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 56,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "initializer_range": 0.25,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True, eq=False)
class Family:
    """A model class of transformers and the sizes of its sparse layers."""

    name: str
    reason: str
    sizes: dict[str, Any] = field(default_factory=dict)
    moe_layers: int = 2

    def __str__(self) -> str:
        return self.name


DEEPSEEK = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
QWEN3 = Family(
    "Qwen3Moe",
    "softmax, renormalised; odd number of experts",
    {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
     "norm_topk_prob": True},
)  # fmt: skip
FEW = Family(
    "Qwen3Moe",
    "the fewest experts: where only routing or bits matter",
    {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
)
QWEN2 = Family(
    "Qwen2Moe",
    "softmax, not renormalised; a shared expert with a gate of its own",
    {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
     "shared_expert_intermediate_size": 24, "norm_topk_prob": False},
)  # fmt: skip
MIXTRAL = Family(
    "Mixtral", "float32 routing weights", {"num_local_experts": 5, "num_experts_per_tok": 2}
)
OLMOE = Family(
    "Olmoe",
    "softmax, not renormalised; no shared expert",
    {"num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": False},
)
DEEPSEEK_V3 = Family(
    "DeepseekV3",
    "sigmoid, correction bias, groups, scale, shared experts, a dense first layer",
    {**DEEPSEEK, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "kv_lora_rank": 16,
     "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 12,
     "num_key_value_heads": 4, "head_dim": 8},
    moe_layers=1,
)  # fmt: skip
GLM4 = Family(
    "Glm4Moe",
    "as DeepSeek-V3, but its own classes",
    {**DEEPSEEK, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5},
    moe_layers=1,
)
DOTS = Family(
    "Dots1",
    "has the experts interface, but a block that is not known here",
    {**DEEPSEEK, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
    moe_layers=1,
)
GPT_OSS = Family(
    "GptOss",
    "biases, transposed and interleaved weights, clamped activation",
    {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 48},
)
LLAMA = Family("Llama", "has no experts", moe_layers=0)

FUSED = [QWEN3, QWEN2, MIXTRAL, OLMOE, GPT_OSS, DEEPSEEK_V3, GLM4]  # gates that are known
LOGITS_TOLERANCE = 2e-5  # absolute, on logits of size 6


def make(family: Family, implementation: str = "eager", **changes: Any) -> Any:
    """Build the model of a family: the same weights each time for the same changes of sizes."""
    import transformers

    sizes = {**SIZES, **family.sizes, **changes}
    config = getattr(transformers, f"{family.name}Config")(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.name}ForCausalLM")(config).eval()
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.copy_(torch.randn_like(buffer) * 0.3)
    if family.moe_layers:
        model.set_experts_implementation(implementation)
    return model


def prompt(batch: int = 2, length: int = 9) -> Tensor:
    """Draw token ids."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


@cache
def eager(family: Family) -> Any:
    """Return what eager transformers gives for the prompt, router logits included."""
    return run(make(family), output_router_logits=True)


def run(model: Any, **options: Any) -> Any:
    """Call a model on the prompt, without gradients."""
    with torch.no_grad():
        return model(prompt(), **options)


def each(families: list[Family]) -> pytest.MarkDecorator:
    """Run a test for each family."""
    return pytest.mark.parametrize("family", families, ids=str)


def experts_of(model: nn.Module) -> list[Any]:
    """Return the experts modules of a model."""
    return [module.experts for module in blocks_of(model)]


def blocks_of(model: nn.Module) -> list[Any]:
    """Return the sparse blocks of a model."""
    return [module for module in model.modules() if hasattr(module, "experts")]
