import pytest
from torch import nn

from megakernel.adapters.transformers import use_megakernel
from tests.megakernel.adapters.tiny import DOTS, MIXTRAL, QWEN2, make


def test_an_unknown_gate_is_refused_by_its_block() -> None:
    with pytest.raises(ValueError, match="fuse_gate must be False for Dots1MoE"):
        use_megakernel(make(DOTS))


def test_wrapped_gates_and_replaced_forwards_are_refused() -> None:
    model = make(MIXTRAL)
    block = model.model.layers[1].mlp
    block.forward = block.forward  # as hooks that move weights between devices do
    with pytest.raises(ValueError, match="replaced forward, got one in MixtralSparseMoeBlock"):
        use_megakernel(model)
    del block.forward
    block.gate = nn.Linear(56, 5)
    with pytest.raises(ValueError, match="other than the model's own, got Linear"):
        use_megakernel(model)


def test_shared_experts_of_another_kind_are_refused() -> None:
    model = make(QWEN2)
    block = model.model.layers[1].mlp
    block.shared_expert.act_fn = nn.ReLU()
    with pytest.raises(ValueError, match=r"shared_expert must have the act_fn .* got ReLU"):
        use_megakernel(model)
    block.shared_expert.act_fn = block.experts.act_fn
    block.shared_expert_gate = nn.Linear(56, 1)
    with pytest.raises(ValueError, match="shared_expert must be made of plain linear layers"):
        use_megakernel(model)
