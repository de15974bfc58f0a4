import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from balance import Topology, Trace, make_plan
from megakernel import KernelConfig, Placement
from megakernel.adapters.modules import why_refused
from megakernel.adapters.transformers import (
    record_routing,
    register_experts,
    replay_routing,
    use_megakernel,
)
from tests.megakernel.adapters.tiny import (
    DEEPSEEK_V3,
    DOTS,
    GLM4,
    GPT_OSS,
    LLAMA,
    MIXTRAL,
    OLMOE,
    QWEN2,
    QWEN3,
    Family,
    eager,
    make,
    prompt,
    run,
)
from tests.support import assert_same_bits, relative_error

LOGITS_TOLERANCE = 2e-5  # absolute, on logits of size 6
FUSED = [QWEN3, QWEN2, MIXTRAL, OLMOE, GPT_OSS, DEEPSEEK_V3, GLM4]


def each(families: list[Family]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("family", families, ids=str)


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "down_proj")
            and hasattr(module, "is_transposed")]  # fmt: skip


@each(FUSED)
def test_fused_model_agrees_with_eager(family: Family) -> None:
    model = make(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    actual = run(use_megakernel(model), output_router_logits=True)
    expected = eager(family)
    assert float((actual.logits - expected.logits).abs().max()) < LOGITS_TOLERANCE
    assert len(actual.router_logits) == len(expected.router_logits) == family.moe_layers
    for mine, theirs in zip(actual.router_logits, expected.router_logits, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=LOGITS_TOLERANCE)
    after = model.state_dict()
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert_same_bits(actual=after[name], expected=tensor)


@each(FUSED)
def test_the_experts_of_these_models_matter(family: Family) -> None:
    """The comparison with eager would see a wrong expert."""
    model = make(family)
    with torch.no_grad():
        for experts in experts_of(model):
            experts.down_proj.zero_()
    assert float((run(model).logits - eager(family).logits).abs().max()) > 0.1


@each(FUSED)
def test_replayed_logits_are_the_live_ones(family: Family) -> None:
    model = use_megakernel(make(family))
    with record_routing(model) as record:
        live = run(model).logits
    with replay_routing(model, record.ids_TLK):
        replayed = run(model).logits
    assert record.ids_TLK.shape[:2] == (prompt().numel(), family.moe_layers)
    assert_same_bits(actual=replayed, expected=live)


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


def test_experts_of_other_ranks_are_left_out() -> None:
    """Under expert parallelism ids of E and more belong to other ranks, with weight 0."""
    experts = experts_of(use_megakernel(make(OLMOE), fuse_gate=False))[0]
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


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "experts")]


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
    model = use_megakernel(make(QWEN3), fuse_gate)
    run(model)
    other = make(QWEN3)
    with torch.no_grad():
        for experts in experts_of(other):
            experts.gate_up_proj.mul_(1.5)
            experts.down_proj.neg_()
        model.load_state_dict(other.state_dict())  # written in place
    expected = run(other).logits
    assert float((run(model).logits - expected).abs().max()) < LOGITS_TOLERANCE
    for experts, source in zip(experts_of(model), experts_of(make(QWEN3)), strict=True):
        experts.gate_up_proj = nn.Parameter(source.gate_up_proj.detach())  # replaced
        experts.down_proj = source.down_proj
    assert float((run(model).logits - eager(QWEN3).logits).abs().max()) < LOGITS_TOLERANCE


@pytest.mark.parametrize("fuse_gate", [True, False], ids=["fused", "experts"])
def test_gradients_are_refused(fuse_gate: bool) -> None:
    model = use_megakernel(make(MIXTRAL), fuse_gate)
    with pytest.raises(ValueError, match=r"must not require grad.*torch\.no_grad"):
        model(prompt())


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


@pytest.mark.parametrize("fuse_gate", [True, False], ids=["fused", "experts"])
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


# Recording and replay


def test_swapped_and_plain_models_record_the_same_routing() -> None:
    plain, fused = make(OLMOE), use_megakernel(make(OLMOE))
    with record_routing(plain) as expected, record_routing(fused) as actual:
        run(plain)
        run(fused)
    assert torch.equal(actual.ids_TLK, expected.ids_TLK)
    torch.testing.assert_close(actual.weights_TLK, expected.weights_TLK, rtol=1e-5, atol=1e-6)
    assert actual.num_experts == expected.num_experts == 7
    run(plain)
    assert len(expected.ids_TLK) == prompt().numel()  # nothing is recorded afterwards


def test_other_ids_give_the_logits_of_those_experts() -> None:
    """Forced ids reach the output, and their weights come from the live gate."""
    model = use_megakernel(make(MIXTRAL))
    with record_routing(model) as record:
        run(model)
    forced_TLK = (record.ids_TLK + 1) % 5
    with replay_routing(model, forced_TLK.numpy()), record_routing(model) as replayed:
        actual = run(model).logits
    assert torch.equal(replayed.ids_TLK, forced_TLK)
    plain = make(MIXTRAL)
    for layer, ids_TK in enumerate(forced_TLK.long().unbind(1)):
        plain.model.layers[layer].mlp.gate.register_forward_hook(force(ids_TK))
    assert float((actual - run(plain).logits).abs().max()) < LOGITS_TOLERANCE


def force(ids_TK: torch.Tensor):
    def reweigh(_: nn.Module, __: tuple, output: tuple) -> tuple:
        weights_TK = output[0].softmax(-1).gather(1, ids_TK)
        return output[0], weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK

    return reweigh


def test_a_recorded_batch_is_planned_and_replayed_with_the_plan() -> None:
    model = use_megakernel(make(QWEN3))
    with record_routing(model) as record:
        live = run(model).logits
    source_rank_T = torch.arange(len(record.ids_TLK)) % 2
    trace = Trace(
        record.ids_TLK.numpy(), torch.zeros_like(source_rank_T).numpy(), source_rank_T.numpy(),
        record.num_experts,
    )  # fmt: skip
    plan = make_plan(trace, Topology(num_nodes=1, ranks_per_node=2, spare_slots_per_rank=1))
    placements = [
        Placement(
            torch.as_tensor(plan.expert_of_P(0, layer)), torch.as_tensor(plan.slot_of_TK(0, layer))
        )
        for layer in range(trace.num_layers)
    ]
    assert max(placement.max_copies for placement in placements) > 1
    with replay_routing(model, record.ids_TLK, placements):
        planned = run(model).logits
    assert_same_bits(actual=planned, expected=live)


@pytest.mark.parametrize("fuse_gate", [True, False], ids=["fused", "experts"])
def test_placement_of_each_layer_changes_no_bit(fuse_gate: bool) -> None:
    expected = run(use_megakernel(make(MIXTRAL), fuse_gate)).logits
    placements = [Placement(torch.tensor([4, 0, 3, 2, 1, 0])), None]
    model = use_megakernel(make(MIXTRAL), fuse_gate, placements=placements)
    assert_same_bits(actual=run(model).logits, expected=expected)


def test_config_is_used_by_live_calls_and_replay() -> None:
    config = KernelConfig(
        num_workers=3, block_rows=16, block_i=16, block_h=32, step=32, block_tokens=16,
        block_experts=16, select_tokens=16,
    )  # fmt: skip
    model = use_megakernel(make(MIXTRAL), config=config)
    with record_routing(model) as record:
        live = run(model).logits
    with replay_routing(model, record.ids_TLK):
        assert_same_bits(actual=run(model).logits, expected=live)
    assert float((live - eager(MIXTRAL).logits).abs().max()) < LOGITS_TOLERANCE


@pytest.mark.parametrize(
    ("ids_TLK", "message"),
    [
        (torch.zeros(18, 3, 2).int(), r"shape \[T, L, K\] with L=2, got \(18, 3, 2\)"),
        (torch.zeros(18, 2).int(), r"shape \[T, L, K\] with L=2, got \(18, 2\)"),
        (torch.tensor([0, 5]).expand(18, 2, 2), r"must be .*, got 5"),
    ],
    ids=["layers", "axes", "range"],
)  # fmt: skip
def test_bad_ids_are_refused_on_entering(ids_TLK: torch.Tensor, message: str) -> None:
    model = use_megakernel(make(MIXTRAL))
    with pytest.raises(ValueError, match=message), replay_routing(model, ids_TLK):
        pass


def test_replay_of_another_number_of_tokens_is_refused_and_leaves_the_model_live() -> None:
    model = use_megakernel(make(MIXTRAL))
    ids_TLK = torch.tensor([0, 1]).expand(17, 2, 2)
    refused = pytest.raises(ValueError, match=r"replay must be prepared for \[T, K\] = \(18, 2\)")
    with refused, replay_routing(model, ids_TLK):
        run(model)
    assert float((run(model).logits - eager(MIXTRAL).logits).abs().max()) < LOGITS_TOLERANCE


def test_replay_needs_a_fused_gate() -> None:
    refused = pytest.raises(ValueError, match=r"gates fused.*MixtralSparseMoeBlock in .*mlp")
    with refused, replay_routing(make(MIXTRAL), torch.zeros(18, 2, 2, dtype=torch.int32)):
        pass


def test_a_model_is_recorded_once_at_a_time() -> None:
    model = use_megakernel(make(MIXTRAL))
    with record_routing(model):
        refused = pytest.raises(ValueError, match="must not be recorded twice")
        with refused, record_routing(model):
            pass
    with record_routing(model) as record:
        pass
    with pytest.raises(ValueError, match=r"whole calls of the model, got .*\[0, 0\]"):
        assert record.ids_TLK is None


# Refusals


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="got LlamaForCausalLM without any"):
        use_megakernel(make(LLAMA))


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


def test_a_quantised_model_is_refused() -> None:
    model = make(MIXTRAL)
    model.hf_quantizer = nn.Identity()
    with pytest.raises(ValueError, match="must not be quantised, got hf_quantizer=Identity"):
        use_megakernel(model)


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


def test_noise_in_training_is_refused() -> None:
    model = use_megakernel(make(MIXTRAL)).train()
    for layer in model.model.layers:
        layer.mlp.jitter_noise = 0.1
    with pytest.raises(ValueError, match=r"router_jitter_noise must be 0 in training, got 0\.1"):
        run(model)


def test_placements_must_be_one_for_each_layer() -> None:
    with pytest.raises(ValueError, match="placements must have one entry for each of 2"):
        use_megakernel(make(MIXTRAL), placements=[None])
