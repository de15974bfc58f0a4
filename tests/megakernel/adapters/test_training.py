"""Training steps of swapped models: each gradient is eager's, within eager's own error."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import megakernel.launch.op
from megakernel import Placement
from megakernel.adapters.transformers import record_routing, replay_routing, use_megakernel
from megakernel.launch.call import Call
from tests.helpers.compare import assert_same_bits
from tests.megakernel.adapters.tiny import (
    DEEPSEEK_V3,
    FEW,
    FUSED,
    GLM4,
    GPT_OSS,
    MIXTRAL,
    OLMOE,
    QWEN2,
    QWEN3,
    Family,
    blocks_of,
    each,
)
from tests.megakernel.adapters.training import (
    Gradients,
    assert_as_exact,
    assert_as_exact_as_eager,
    eager_step,
    make_deep,
    make_small,
    options_of,
    step,
)


@pytest.mark.parametrize(
    "family",
    [
        QWEN2,
        GPT_OSS,
        DEEPSEEK_V3,
        *(pytest.param(f, marks=pytest.mark.slow) for f in (QWEN3, MIXTRAL, OLMOE, GLM4)),
    ],
    ids=str,
)
def test_gradients_of_a_fused_model(family: Family) -> None:
    """Also of the router, which the loss that balances experts trains through its logits."""
    model = use_megakernel(make_small(family))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert_as_exact_as_eager(step(model, **options_of(family)), family, is_deep=False)
    for name, buffer in model.named_buffers():  # the correction bias among them
        assert not buffer.requires_grad
        assert_same_bits(actual=buffer, expected=buffers[name])


@each([MIXTRAL, GPT_OSS])
def test_gradients_through_the_experts_implementation(family: Family) -> None:
    model = use_megakernel(make_small(family), fuse_gate=False)
    assert_as_exact_as_eager(step(model, **options_of(family)), family, is_deep=False)


@pytest.mark.slow
@pytest.mark.parametrize("fuse_gate", [True, False], ids=["fused", "experts"])
@each(FUSED)
def test_gradients_of_more_layers(family: Family, fuse_gate: bool) -> None:
    model = use_megakernel(make_deep(family), fuse_gate)
    assert_as_exact_as_eager(step(model, **options_of(family)), family, is_deep=True)


@each([OLMOE])
def test_the_router_learns_from_the_loss_that_balances_experts(family: Family) -> None:
    """Without it the router's gradient is another: the tests above would see a lost one."""
    model = use_megakernel(make_small(family))
    name = "model.layers.0.mlp.gate.weight"
    without, with_it = step(model)[name], eager_step(family, False, torch.float32)[name]
    assert float((without - with_it).norm() / with_it.norm()) > 0.1


@pytest.mark.parametrize("family", [QWEN2, pytest.param(GLM4, marks=pytest.mark.slow)], ids=str)
def test_bf16_gradients(family: Family) -> None:
    """For models whose rounding changes no expert choice, which would hide every other error."""
    low, full = make_small(family, torch.bfloat16), make_small(family, torch.bfloat16).double()
    with record_routing(low) as low_record, record_routing(full) as full_record:
        expected, truth = (step(model, **options_of(family)) for model in (low, full))
    assert torch.equal(*(r.ids_TLK.sort(-1).values for r in (low_record, full_record)))
    model = use_megakernel(make_small(family, torch.bfloat16))
    assert_as_exact(step(model, **options_of(family)), expected, truth)


@pytest.mark.parametrize("fuse_gate", [True, False], ids=["fused", "experts"])
@pytest.mark.parametrize("save", ["preactivations", "nothing"])
def test_a_layer_is_one_launch_forward_and_one_backward_from_what_was_asked_to_be_kept(
    save: str, fuse_gate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Call] = []
    launch = megakernel.launch.op.launch
    monkeypatch.setattr("megakernel.launch.op.launch", lambda c: (calls.append(c), launch(c)))
    step(use_megakernel(make_small(FEW), fuse_gate, save=save))
    assert [call.rule.stages for call in calls] == ["layer", "backward"]
    assert [call.buffers.saved.z_A2I is None for call in calls] == [save == "nothing"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("fuse_gate", [True, False], ids=["fused", "experts"])
def test_keeping_nothing_changes_no_bit(fuse_gate: bool) -> None:
    kept = step(use_megakernel(make_small(QWEN2), fuse_gate))
    check_same(step(use_megakernel(make_small(QWEN2), fuse_gate, save="nothing")), kept)


def check_same(actual: Gradients, expected: Gradients) -> None:
    """Assert equal bits of every gradient."""
    assert {n for n in actual if actual[n] is None} == {n for n in actual if expected[n] is None}
    for name, gradient in expected.items():
        if gradient is not None:
            assert_same_bits(actual=actual[name], expected=gradient)


def test_another_save_is_refused_before_anything_is_changed() -> None:
    model = make_small(MIXTRAL)
    with pytest.raises(ValueError, match=r"save must be one of .*'nothing'.*got 'all'"):
        use_megakernel(model, save="all")
    assert type(blocks_of(model)[0]).__name__ == "MixtralSparseMoeBlock"


# Replay in training


def test_replay_of_a_recording_changes_no_bit_of_a_gradient() -> None:
    """Whatever the placement: a plan may change every step."""
    model = use_megakernel(make_small(OLMOE))
    with record_routing(model) as record:
        live = step(model, **options_of(OLMOE))
    assert record.weights_TLK.grad_fn is None
    model = use_megakernel(make_small(OLMOE))
    placements = [Placement(torch.tensor([4, 0, 3, 2, 1, 0, 6, 5, 5]))]
    with replay_routing(model, record.ids_TLK, placements):
        check_same(step(model, **options_of(OLMOE)), live)


def test_under_replay_gradients_flow_through_the_weights_of_the_forced_experts() -> None:
    """Against eager with a router that has no choice left."""
    ids_TK = torch.stack([torch.randperm(7)[:3] for _ in range(11)])

    def force(model):
        gate = model.model.layers[0].mlp.gate
        gate.forward = lambda hidden: forced_router(gate.weight, hidden.view(-1, 56), ids_TK)
        return model

    low, truth = (step(force(make_small(QWEN3).to(d))) for d in (torch.float32, torch.float64))
    model = use_megakernel(make_small(QWEN3))
    with replay_routing(model, ids_TK[:, None]):
        assert_as_exact(step(model), low, truth)


def forced_router(
    weight_EH: Tensor, x_TH: Tensor, ids_TK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weigh given experts as Qwen3-MoE does."""
    logits_TE = linear(x_TH, weight_EH)
    gate_TK = logits_TE.softmax(-1).gather(1, ids_TK)
    return logits_TE, gate_TK / gate_TK.sum(-1, keepdim=True), ids_TK


@pytest.mark.slow
@each([DEEPSEEK_V3])
def test_gradients_add_up_over_steps(family: Family) -> None:
    """A second backward adds to ``.grad``, and its graph is its own."""
    model = use_megakernel(make_small(family))
    once = {n: g.clone() for n, g in step(model).items() if g is not None}
    twice = step(model)
    for name, gradient in once.items():
        assert_same_bits(actual=twice[name], expected=gradient + gradient)
