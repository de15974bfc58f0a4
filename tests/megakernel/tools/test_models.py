"""The shapes add up to what is published about the models as a whole."""

import pytest

from megakernel.tools.models import MODELS, ModelShape

# Billions of parameters of the whole model, from the model cards. Attention, embeddings, dense
# layers and shared experts are 2 to 7 % of them; the rest is routed experts.
TOTAL_BILLIONS = {
    "Qwen3-30B-A3B": 30.5,
    "Qwen3-235B-A22B": 235,
    "Mixtral-8x7B": 46.7,
    "gpt-oss-120b": 116.8,
    "OLMoE": 6.9,
    "DeepSeek-V3 routed": 671,
    "JoyAI-LLM Flash": 48,
}


def test_every_named_model_has_a_shape() -> None:
    assert list(MODELS) == list(TOTAL_BILLIONS)


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
def test_experts_are_nearly_all_of_the_model(shape: ModelShape) -> None:
    per_layer = 3 * shape.num_experts * shape.hidden * shape.intermediate
    share = shape.num_layers * per_layer / (TOTAL_BILLIONS[shape.name] * 1e9)
    assert 0.93 < share < 0.985


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
def test_a_token_cannot_want_more_experts_than_there_are(shape: ModelShape) -> None:
    assert 1 <= shape.top_k <= shape.num_experts
