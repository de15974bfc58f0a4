import pytest
import torch

import reference
from perf.demo.model import DemoModel, ModelConfig, MoEWeights
from perf.demo.text import SHARE_OF_KIND
from perf.demo.train import (
    GroupedMoE,
    TrainConfig,
    balance_loss,
    describe,
    examine,
    make_optimizer,
    pace,
    train,
)

TINY = TrainConfig(steps=40, sequences=4, length=24, warmup_steps=5, learning_rate=0.02)
TEXTS = {kind: [b"def f(self):\n    return self.x\n" * 9] * 40 for kind in SHARE_OF_KIND}


def random_weights(num_experts=6, hidden=8, intermediate=4):
    torch.manual_seed(0)
    shapes = (num_experts, hidden), (num_experts, 2 * intermediate, hidden), None
    router_EH, gate_up_E2IH = (torch.randn(shape, dtype=torch.float64) for shape in shapes[:2])
    down_EHI = torch.randn(num_experts, hidden, intermediate, dtype=torch.float64)
    return MoEWeights(*(w.requires_grad_() for w in (router_EH, gate_up_E2IH, down_EHI)))


@pytest.mark.parametrize("num_tokens", [1, 37], ids=["most-experts-empty", "all-experts-used"])
def test_the_trained_layer_is_the_reference_with_its_gradients(num_tokens):
    weights = random_weights()
    x_TH = torch.randn(num_tokens, 8, dtype=torch.float64, requires_grad=True)
    y_TH, ids_TK = GroupedMoE(top_k=2)(x_TH, weights)
    wanted_TH = reference.moe(x_TH, *weights, top_k=2, expert_of_TK=ids_TK)
    torch.testing.assert_close(y_TH, wanted_TH, rtol=0, atol=1e-12)
    upstream_TH = torch.randn_like(y_TH)
    got = torch.autograd.grad(y_TH, (x_TH, *weights), upstream_TH)
    wanted = torch.autograd.grad(wanted_TH, (x_TH, *weights), upstream_TH)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


def test_balance_loss_is_one_when_balanced_and_grows_with_agreement():
    even = balance_loss(torch.zeros(8, 4), torch.tensor([2, 2, 2, 2]))
    assert even.item() == pytest.approx(1.0)
    one_hot = balance_loss(torch.tensor([[50.0, 0, 0, 0]] * 8), torch.tensor([8, 0, 0, 0]))
    assert one_hot.item() == pytest.approx(4.0)


def test_pace_rises_then_falls_to_zero():
    paces = [pace(step, TrainConfig(steps=100, warmup_steps=10)) for step in range(101)]
    assert paces[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert paces[10] == 1.0 and paces[100] == 0.0
    assert paces[10:] == sorted(paces[10:], reverse=True)


def test_norm_scales_do_not_decay():
    optimizer = make_optimizer(DemoModel(ModelConfig(num_layers=1)), TINY)
    decayed, kept = optimizer.param_groups
    assert all(weight.ndim > 1 for weight in decayed["params"])
    assert kept["weight_decay"] == 0 and len(kept["params"]) == 3


def test_training_learns_a_tiny_text_and_is_examined():
    torch.set_num_threads(1)
    model = train(TINY, TEXTS)
    report = examine(model, TEXTS, TINY.length)
    losses = report["held_out_loss_nats_per_byte"]
    assert set(losses) == set(SHARE_OF_KIND) and max(losses.values()) < 2.0
    assert all(1 <= ratio <= model.config.num_experts for ratio in report["load_max_over_mean_L"])


def test_the_description_names_source_and_licence():
    card = describe(TINY, TEXTS, seconds=1.4)
    assert "PSF-2.0" in card["licence"] and card["training"]["steps"] == TINY.steps
    assert card["bytes_of_kind"]["tests"] == 40 * 9 * 31
