"""The MoE layers of public models, by name: what the configs are compiled and measured for."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megakernel.experts import Experts, SharedExpert
from megakernel.router import Router


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model's MoE layers; shared experts and dense layers are not counted.

    Attributes:
        name: as on the model card.
        num_experts: E.
        top_k: K.
        hidden: H.
        intermediate: I.
        num_layers: L.
    """

    name: str
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    num_layers: int


# Sources: the models' published config.json files; JoyAI-LLM Flash: arXiv 2604.03044.
_SHAPES = (
    ModelShape("Qwen3-30B-A3B", 128, 8, 2048, 768, 48),
    ModelShape("Qwen3-235B-A22B", 128, 8, 4096, 1536, 94),
    ModelShape("Mixtral-8x7B", 8, 2, 4096, 14336, 32),
    ModelShape("gpt-oss-120b", 128, 4, 2880, 2880, 36),
    ModelShape("OLMoE", 64, 8, 2048, 1024, 16),
    ModelShape("DeepSeek-V3 routed", 256, 8, 7168, 2048, 58),
    ModelShape("JoyAI-LLM Flash", 256, 8, 2048, 768, 39),
)
MODELS = {shape.name: shape for shape in _SHAPES}


def plain(model: ModelShape) -> tuple[Router, Experts]:
    """Softmax over the chosen experts and SwiGLU, without biases."""
    E, H, I = model.num_experts, model.hidden, model.intermediate
    return Router(model.top_k), Experts(_meta(E, 2 * I, H), _meta(E, H, I))


def gpt_oss(model: ModelShape) -> tuple[Router, Experts]:
    """Biases everywhere; gate and up rows alternate, and both weights are transposed."""
    E, H, I = model.num_experts, model.hidden, model.intermediate
    experts = Experts(
        _meta(E, H, 2 * I).mT, _meta(E, I, H).mT, _meta(E, 2 * I), _meta(E, H),
        "clamped_swiglu", interleaved=True, transposed=True,
    )  # fmt: skip
    return Router(model.top_k, bias_E=_meta(E)), experts


def deepseek_v3(model: ModelShape) -> tuple[Router, Experts]:
    """Sigmoid scores, 4 of 8 groups, and one shared expert as wide as a routed one."""
    E, H, I = model.num_experts, model.hidden, model.intermediate
    router = Router(
        model.top_k, "sigmoid", scale=2.5, correction_bias_E=_meta(E, dtype=torch.float32),
        num_groups=8, top_groups=4,
    )  # fmt: skip
    shared = SharedExpert(_meta(I, H), _meta(I, H), _meta(H, I))
    return router, Experts(_meta(E, 2 * I, H), _meta(E, H, I), shared=shared)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# What a layer computes, as a caller would hand it in, bfloat16 and without storage.
KINDS: dict[str, Callable[[ModelShape], tuple[Router, Experts]]] = {
    "plain": plain,
    "gpt-oss": gpt_oss,
    "DeepSeek-V3": deepseek_v3,
}
KIND_OF_MODEL = {name: "plain" for name in MODELS} | {
    "gpt-oss-120b": "gpt-oss",
    "DeepSeek-V3 routed": "DeepSeek-V3",
}
