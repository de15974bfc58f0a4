from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megakernel.adapters.modules import why_refused
from megakernel.adapters.transformers import register_experts, use_megakernel
from tests.megakernel.adapters.tiny import (
    GPT_OSS,
    LOGITS_TOLERANCE,
    MIXTRAL,
    experts_of,
    make,
    run,
)


@pytest.mark.parametrize(
    ("activation", "flags"),
    [
        ("gelu", {}),
        ("gelu_pytorch_tanh", {"is_transposed": True}),
        ("relu", {"has_bias": True}),
        ("relu2", {"has_gate": False}),
        ("silu", {"has_gate": False, "has_bias": True, "is_transposed": True}),
    ],
)
def test_other_kinds_of_experts_agree_with_transformers(activation: str, flags: dict) -> None:
    """Against its ``batched_mm``, which computes every flag of the interface."""
    experts = make_experts(activation, flags)
    routing = torch.rand(9, 5).topk(2)
    hidden = torch.randn(9, 48)
    register_experts()
    with torch.no_grad():
        expected = experts(hidden, routing.indices, routing.values)
        experts.config._experts_implementation = "megakernel"
        actual = experts(hidden, routing.indices, routing.values)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=LOGITS_TOLERANCE)


def make_experts(activation: str, flags: dict) -> nn.Module:
    """Build experts of the interface with some flags: H = 48, I = 32, E = 5."""
    from transformers.activations import ACT2FN
    from transformers.integrations.moe import use_experts_implementation

    class AnyExperts(nn.Module):
        def __init__(self, config: SimpleNamespace) -> None:
            super().__init__()
            self.num_experts, self.act_fn = 5, ACT2FN[activation]

        def forward(self, *_: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

    config = SimpleNamespace(_experts_implementation="batched_mm")
    experts = use_experts_implementation(**flags)(AnyExperts)(config)
    name, rows = ("gate_up_proj", 64) if experts.has_gate else ("up_proj", 32)
    for weight, shape in ((name, (5, rows, 48)), ("down_proj", (5, 48, 32))):
        if experts.is_transposed:
            shape = (shape[0], shape[2], shape[1])
        bias = (5, rows if weight == name else 48)
        experts.register_parameter(weight, nn.Parameter(torch.randn(shape) * 0.15))
        experts.register_parameter(f"{weight}_bias", nn.Parameter(torch.randn(bias)))
    return experts


@pytest.mark.parametrize("fuse_gate", [True, False], ids=["fused", "experts"])
@pytest.mark.parametrize(
    ("name", "value"), [("has_post_expert_norm", True), ("is_concatenated", False)]
)
def test_experts_are_refused_by_flag(name: str, value: bool, fuse_gate: bool) -> None:
    model = make(MIXTRAL)
    setattr(experts_of(model)[1], name, value)
    with pytest.raises(ValueError, match=f"MixtralExperts with {name}={value}"):
        use_megakernel(model, fuse_gate)
    assert type(model.model.layers[0].mlp).__name__ == "MixtralSparseMoeBlock"  # as it was
    assert model.get_experts_implementation() == {"": "eager"}


def test_refused_experts_do_not_run_when_chosen_by_name() -> None:
    register_experts()
    model = make(MIXTRAL, "megakernel")
    experts_of(model)[0].has_post_expert_norm = True
    with pytest.raises(ValueError, match="MixtralExperts with has_post_expert_norm=True"):
        run(model)


def test_other_activations_gates_and_dtypes_are_refused() -> None:
    experts = experts_of(make(MIXTRAL))[0]
    assert why_refused(experts) is None
    experts.act_fn = nn.Mish()
    assert why_refused(experts) == "act_fn=Mish"
    experts.act_fn = nn.SiLU()
    experts.down_proj = nn.Parameter(torch.zeros(5, 56, 40, dtype=torch.int8), requires_grad=False)
    assert why_refused(experts) == "down_proj of torch.int8"
    own = type("Own", (type(experts),), {"_apply_gate": lambda self, gate_up: gate_up})
    experts.__class__ = own
    assert why_refused(experts) == "an _apply_gate of its own"


def test_gpt_oss_with_another_alpha_is_refused() -> None:
    model = make(GPT_OSS)
    experts_of(model)[0].alpha = 1.5
    with pytest.raises(ValueError, match=r"GptOssExperts with alpha=1\.5"):
        use_megakernel(model)
