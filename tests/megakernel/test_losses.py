"""Balance losses against the reference, on what a launch returns; the bias loop converges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel import Experts, Router, moe
from megakernel.losses import (
    balanced_correction_bias,
    expert_capacity,
    gshard_loss,
    max_violation,
    switch_loss,
)
from reference import choose, count_load, losses
from tests.helpers.inputs import SMALL


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 1000))
def test_losses_and_biases_agree_with_the_reference(num_tokens: int, num_experts: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator)
    ids_TK = choose(logits_TE, max(1, num_experts // 2))
    load_E = count_load(ids_TK, num_experts)
    bias_E = torch.randn(num_experts, generator=generator)
    assert switch_loss(logits_TE, load_E, 0.1).item() == pytest.approx(
        losses.switch_loss(logits_TE, load_E, 0.1), rel=1e-5
    )
    assert gshard_loss(logits_TE, ids_TK, 0.1).item() == pytest.approx(
        losses.gshard_loss(logits_TE, ids_TK, 0.1), rel=1e-5
    )
    expected_E = losses.balanced_correction_bias(bias_E, load_E, 0.01)
    torch.testing.assert_close(balanced_correction_bias(bias_E, load_E, 0.01), expected_E)


def test_uniform_routing_gives_the_closed_forms():
    logits_TE, load_E = torch.zeros(12, 4), torch.tensor([6, 6, 6, 6], dtype=torch.int32)
    ids_TK = torch.arange(12)[:, None] % 4
    assert switch_loss(logits_TE, load_E).item() == pytest.approx(0.01)
    assert gshard_loss(logits_TE, ids_TK, weight=1.0).item() == pytest.approx(1 / 16)
    assert max_violation(load_E) == 0.0


def test_the_losses_pull_logits_away_from_the_loaded_expert():
    logits_TE = torch.zeros(8, 4, requires_grad=True)
    ids_TK = torch.zeros(8, 1, dtype=torch.int32)
    for loss in (switch_loss(logits_TE, count_load(ids_TK, 4)), gshard_loss(logits_TE, ids_TK)):
        (grad_TE,) = torch.autograd.grad(loss, logits_TE)
        assert (grad_TE[:, 0] > 0).all() and (grad_TE[:, 1:] < 0).all()


def test_the_bias_loop_drives_the_violation_of_a_fixed_skew_down():
    """Expert 0 starts in every token; after the loop nobody has much more than the mean."""
    generator = torch.Generator().manual_seed(1)
    logits_TE = torch.randn(512, 8, generator=generator) + torch.linspace(3, 0, 8)
    bias_E = torch.zeros(8)
    seen = []
    for _ in range(300):
        ids_TK = choose(logits_TE, 2, kind="sigmoid", correction_bias_E=bias_E)
        load_E = count_load(ids_TK, 8)
        seen.append(max_violation(load_E))
        bias_E = balanced_correction_bias(bias_E, load_E, rate=0.003)
    assert seen[0] > 1.0 and max(seen[-20:]) < 0.1


def test_the_loop_runs_on_the_load_that_a_launch_returns():
    generator = torch.Generator().manual_seed(2)
    x_TH, weight_EH = torch.randn(2, 24, 16, generator=generator).unbind()
    weight_EH = 0.05 * weight_EH[:4]
    weight_EH[:, 0] = torch.tensor([0.8, 0.0, 0.0, 0.0])  # expert 0 leads in every token
    x_TH[:, 0] = 1.0
    experts = Experts(torch.zeros(4, 32, 16), torch.zeros(4, 16, 16))
    router = Router(1, "sigmoid", correction_bias_E=torch.zeros(4))
    assert router.correction_bias_E is not None
    seen = []
    for _ in range(12):
        load_E = moe(x_TH, weight_EH, experts, router, config=SMALL).load_E
        seen.append(max_violation(load_E))
        router.correction_bias_E.copy_(
            balanced_correction_bias(router.correction_bias_E, load_E, rate=0.02)
        )
    assert seen[0] == 3.0 and max(seen[-3:]) < 1.0


def test_capacity_rounds_up_and_is_never_zero():
    assert expert_capacity(100, 8) == 13  # 12.5 tokens per expert
    assert expert_capacity(100, 8, top_k=2, factor=1.25) == 32  # 31.25
    assert expert_capacity(1, 64) == 1
