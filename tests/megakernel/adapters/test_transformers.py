import copy

import pytest
import torch
from torch import nn

import megakernel.launch.op
from megakernel import Placement
from megakernel.adapters.transformers import (
    record_routing,
    register_experts,
    replay_routing,
    use_megakernel,
)
from tests.helpers.compare import assert_same_bits, relative_error
from tests.megakernel.adapters.tiny import (
    DEEPSEEK_V3,
    DOTS,
    FUSED,
    GLM4,
    GPT_OSS,
    LLAMA,
    LOGITS_TOLERANCE,
    MIXTRAL,
    OLMOE,
    QWEN2,
    QWEN3,
    Family,
    blocks_of,
    each,
    eager,
    experts_of,
    make,
    prompt,
    run,
)


@each(FUSED)
def test_fused_model_agrees_with_eager(family: Family) -> None:
    model = make(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    actual = run(use_megakernel(model), output_router_logits=True)
    expected = eager(family)
    assert float((actual.logits - expected.logits).abs().max()) < LOGITS_TOLERANCE
    recorded = [output.get("router_logits") or () for output in (actual, expected)]
    assert len(recorded[1]) == (family.moe_layers if records_router_logits(family) else 0)
    for mine, theirs in zip(*recorded, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=LOGITS_TOLERANCE)
    after = model.state_dict()
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert_same_bits(actual=after[name], expected=tensor)


def records_router_logits(family: Family) -> bool:
    """DeepSeek-V3 and GLM4-MoE do so only in later versions."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3PreTrainedModel

    later = "router_logits" in DeepseekV3PreTrainedModel._can_record_outputs
    return later or family not in (DEEPSEEK_V3, GLM4)


@each(FUSED)
def test_the_experts_of_these_models_matter(family: Family) -> None:
    """The comparison with eager would see a wrong expert."""
    model = make(family)
    with torch.no_grad():
        for experts in experts_of(model):
            experts.down_proj.zero_()
    assert float((run(model).logits - eager(family).logits).abs().max()) > 0.1


@each([QWEN2, GPT_OSS, DEEPSEEK_V3])
def test_a_block_is_one_launch_and_calls_none_of_its_modules(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = use_megakernel(make(family))
    launches, called = [], []
    launch = megakernel.launch.op.launch
    monkeypatch.setattr(megakernel.launch.op, "launch", lambda call: launches.append(launch(call)))
    for block in blocks_of(model):
        for module in list(block.modules())[1:]:
            module.register_forward_pre_hook(lambda module, _: called.append(type(module)))
    run(model)
    assert len(launches) == family.moe_layers
    assert called == []


@each([MIXTRAL, GPT_OSS, DEEPSEEK_V3, DOTS])
def test_experts_implementation_agrees_with_eager(family: Family) -> None:
    model = use_megakernel(make(family), fuse_gate=False)
    assert model.get_experts_implementation() == {"": "megakernel"}
    actual = run(model, output_router_logits=True)
    assert float((actual.logits - eager(family).logits).abs().max()) < LOGITS_TOLERANCE


def test_experts_implementation_can_be_chosen_when_the_model_is_built() -> None:
    register_experts()
    model = make(OLMOE, "megakernel")
    assert float((run(model).logits - eager(OLMOE).logits).abs().max()) < LOGITS_TOLERANCE


def test_experts_of_other_ranks_are_left_out() -> None:
    """Under expert parallelism ids of E and more belong to other ranks, with weight 0."""
    experts = experts_of(use_megakernel(make(OLMOE), fuse_gate=False))[0]
    if not hasattr(experts, "_is_expert_parallel"):
        pytest.skip("needs a version with expert parallelism")
    hidden = torch.randn(4, 56)
    ids = torch.tensor([[0, 7, 3], [7, 7, 7], [1, 2, 6], [6, 0, 7]])
    weights = torch.rand(4, 3).masked_fill(ids >= 7, 0.0)
    experts._is_expert_parallel = True
    with torch.no_grad():
        actual = experts(hidden, ids, weights)
        experts.config._experts_implementation = "eager"
        expected = experts(hidden, ids, weights)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=LOGITS_TOLERANCE)


def test_a_fused_model_can_go_back_to_its_own_gate() -> None:
    model = use_megakernel(make(QWEN3))
    use_megakernel(model, fuse_gate=False)
    plain = make(QWEN3)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    model.set_experts_implementation("eager")
    assert_same_bits(actual=run(model).logits, expected=eager(QWEN3).logits)


def test_a_fused_model_can_be_copied_saved_and_loaded(tmp_path) -> None:
    model = use_megakernel(make(QWEN3))
    live = run(model).logits
    assert_same_bits(actual=run(copy.deepcopy(model)).logits, expected=live)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same_bits(actual=run(use_megakernel(loaded)).logits, expected=live)


@each(FUSED)
def test_bf16_error_of_a_block_is_below_eagers(family: Family) -> None:
    """Both against float32, on what eager's layers see."""
    model = make(family).to(torch.bfloat16)
    inputs = inputs_of_blocks(model)
    low = outputs_of(model, inputs)
    fused = outputs_of(use_megakernel(model), inputs)
    truth = outputs_of(make(family).to(torch.bfloat16).float(), [x.float() for x in inputs])
    assert len(truth) == family.moe_layers
    for mine, theirs, expected in zip(fused, low, truth, strict=True):
        own_error = relative_error(actual=theirs, expected=expected)
        assert relative_error(actual=mine, expected=expected) < own_error


def inputs_of_blocks(model: nn.Module) -> list[torch.Tensor]:
    inputs: list[torch.Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        for block in blocks_of(model)
    ]
    run(model)
    for hook in hooks:
        hook.remove()
    return inputs


def outputs_of(model: nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        outputs = [block(x) for block, x in zip(blocks_of(model), inputs, strict=True)]
    return [y[0] if isinstance(y, tuple) else y for y in outputs]  # gpt-oss adds its weights


@each([QWEN2, GLM4])
def test_bf16_error_of_logits_is_below_eagers(family: Family) -> None:
    """For models whose rounding changes no expert choice, which would hide every other error."""
    model = make(family).to(torch.bfloat16)
    full = make(family).to(torch.bfloat16).float()
    with record_routing(model) as low_record, record_routing(full) as full_record:
        low, truth = run(model).logits, run(full).logits
    assert torch.equal(sets(low_record.ids_TLK), sets(full_record.ids_TLK))
    fused = run(use_megakernel(model)).logits
    own_error = relative_error(actual=low, expected=truth)
    assert relative_error(actual=fused, expected=truth) < own_error


def sets(ids_TLK: torch.Tensor) -> torch.Tensor:
    return ids_TLK.sort(-1).values


# Weights


@pytest.mark.parametrize("fuse_gate", [True, False], ids=["fused", "experts"])
def test_new_weights_are_seen_at_the_next_call(fuse_gate: bool) -> None:
    model, other = use_megakernel(make(QWEN2), fuse_gate), make(QWEN2)
    run(model)
    with torch.no_grad():
        for parameter in other.model.layers.parameters():
            parameter.mul_(1.1)
        model.load_state_dict(other.state_dict())  # written in place
    assert float((run(model).logits - run(other).logits).abs().max()) < LOGITS_TOLERANCE
    for experts in [*experts_of(model), *experts_of(other)]:  # replaced
        experts.down_proj = nn.Parameter(-experts.down_proj.detach())
    assert float((run(model).logits - run(other).logits).abs().max()) < LOGITS_TOLERANCE


# Generation and compilation


@pytest.mark.parametrize("fuse_gate", [True, False], ids=["fused", "experts"])
def test_generation_gives_eagers_tokens(fuse_gate: bool) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = make(QWEN3).generate(prompt(2, 5), **options)
    model = use_megakernel(make(QWEN3), fuse_gate)
    with record_routing(model) as record:
        actual = model.generate(prompt(2, 5), **options)
    assert torch.equal(actual, expected)
    assert len(record.ids_TLK) == 2 * 5 + 3 * 2  # one prefill, then three decode steps


@pytest.mark.parametrize(
    "fuse_gate", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["fused", "experts"]
)
def test_compiles_without_a_graph_break(fuse_gate: bool) -> None:
    model = use_megakernel(make(MIXTRAL), fuse_gate)
    expected = run(model).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_same_bits(actual=run(compiled).logits, expected=expected)
    if fuse_gate:
        with record_routing(model) as record:
            run(compiled)
        with replay_routing(model, record.ids_TLK):
            assert_same_bits(actual=run(compiled).logits, expected=expected)


def test_placements_must_be_one_for_each_layer() -> None:
    with pytest.raises(ValueError, match="placements must have one entry for each of 2"):
        use_megakernel(make(MIXTRAL), placements=[None])


@pytest.mark.parametrize("fuse_gate", [True, False], ids=["fused", "experts"])
def test_placement_of_each_layer_changes_no_bit(fuse_gate: bool) -> None:
    expected = run(use_megakernel(make(MIXTRAL), fuse_gate)).logits
    placements = [Placement(torch.tensor([4, 0, 3, 2, 1, 0])), None]
    model = use_megakernel(make(MIXTRAL), fuse_gate, placements=placements)
    assert_same_bits(actual=run(model).logits, expected=expected)


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="got LlamaForCausalLM without any"):
        use_megakernel(make(LLAMA))


def test_a_quantised_model_is_refused() -> None:
    model = make(MIXTRAL)
    model.hf_quantizer = nn.Identity()
    with pytest.raises(ValueError, match="must not be quantised, got hf_quantizer=Identity"):
        use_megakernel(model)


def test_noise_in_training_is_refused() -> None:
    model = use_megakernel(make(MIXTRAL)).train()
    for layer in model.model.layers:
        layer.mlp.jitter_noise = 0.1
    with pytest.raises(ValueError, match=r"router_jitter_noise must be 0 in training, got 0\.1"):
        run(model)
