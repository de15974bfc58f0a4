"""The MoE layers of public models, by name: what the configs are compiled and measured for."""

from dataclasses import dataclass


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
