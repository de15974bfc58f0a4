"""Layers that checkpointing runs again: the routing and the bits of the first time."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megakernel import prepare_replay
from megakernel.adapters.state import refer
from megakernel.adapters.transformers import record_routing, replay_routing, use_megakernel
from tests.helpers.compare import assert_same_bits
from tests.megakernel.adapters.tiny import FEW, blocks_of, experts_of
from tests.megakernel.adapters.training import Gradients, gradients_of, loss_of, make_small, step

KINDS = pytest.mark.parametrize(
    "reentrant",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["without reentry", "reentrant"],
)
H, E, K, T = 56, 3, 2, 11


def checkpointed(reentrant: bool) -> Any:
    model = use_megakernel(make_small(FEW))
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def check_same(actual: Gradients, expected: Gradients) -> None:
    for name, gradient in expected.items():
        assert_same_bits(actual=actual[name], expected=gradient)


def draw_ids() -> torch.Tensor:
    return torch.stack([torch.randperm(E)[:K] for _ in range(T)])[:, None]


@pytest.mark.parametrize("reentrant", [False, True], ids=["without reentry", "reentrant"])
def test_checkpointing_changes_no_bit_and_records_each_call_once(reentrant: bool) -> None:
    expected = step(use_megakernel(make_small(FEW)))
    model = checkpointed(reentrant)
    with record_routing(model) as record:
        check_same(step(model), expected)
    assert len(record.ids_TLK) == T


def test_recording_beside_eager_experts_records_each_call_once() -> None:
    model = make_small(FEW)
    with record_routing(model) as record:
        for layer in model.model.layers:
            hidden = torch.randn(1, T, H, requires_grad=True)
            checkpoint(layer.mlp, hidden, use_reentrant=False).sum().backward()
    assert len(record.ids_TLK) == T


@pytest.mark.slow
@KINDS
def test_the_auxiliary_loss_trains_a_checkpointed_router(reentrant: bool) -> None:
    """A reentrant checkpoint hands out logits without a graph, to eager models too."""
    name = "model.layers.0.mlp.gate.weight"
    options = {"output_router_logits": True}
    expected = step(use_megakernel(make_small(FEW)), **({} if reentrant else options))
    assert_same_bits(
        actual=step(checkpointed(reentrant), **options)[name], expected=expected[name]
    )


@KINDS
def test_a_checkpoint_runs_again_with_the_ids_of_its_own_forward(reentrant: bool) -> None:
    """Backward comes outside, after another forward under other ids of the same shape."""
    first, second = draw_ids(), draw_ids()
    plain = use_megakernel(make_small(FEW))
    with replay_routing(plain, first):
        expected = step(plain)
    model = checkpointed(reentrant)
    with replay_routing(model, first):
        loss = loss_of(model)
    with replay_routing(model, second):
        loss_of(model)
        loss.backward()
    check_same(gradients_of(model), expected)
    assert model.model.layers[0].mlp.megakernel.replay is None


@pytest.mark.parametrize("inside", ["none", "another"])
def test_other_checkpoints_must_go_back_inside_the_replay(inside: str) -> None:
    """They would run the layer again with another routing, and the gradient would be wrong."""
    model = use_megakernel(make_small(FEW))
    hidden = torch.randn(1, T, H, requires_grad=True)
    with replay_routing(model, draw_ids()):
        y = checkpoint(blocks_of(model)[0], hidden, use_reentrant=False)
    around = contextlib.nullcontext() if inside == "none" else replay_routing(model, draw_ids())
    refused = pytest.raises(ValueError, match="backward must run inside the replay_routing")
    with around, refused:
        y.sum().backward()


def test_a_checkpoint_of_a_live_forward_must_not_go_back_inside_a_replay() -> None:
    model = use_megakernel(make_small(FEW))
    hidden = torch.randn(1, T, H, requires_grad=True)
    y = checkpoint(blocks_of(model)[0], hidden, use_reentrant=False)
    refused = pytest.raises(ValueError, match="backward must run inside the replay_routing")
    with replay_routing(model, draw_ids()), refused:
        y.sum().backward()


@KINDS
def test_other_checkpoints_inside_the_replay_are_right(reentrant: bool) -> None:
    model = use_megakernel(make_small(FEW))
    found = []
    for run in (checkpoint, lambda block, x, **_: block(x)):
        hidden = torch.randn(1, T, H, generator=torch.Generator().manual_seed(2))
        hidden.requires_grad_()
        down = experts_of(model)[0].down_proj
        down.grad = None
        with replay_routing(model, torch.arange(T)[:, None, None] % 2 + torch.arange(K)):
            run(blocks_of(model)[0], hidden, use_reentrant=reentrant).square().sum().backward()
        found.append((hidden.grad, down.grad))
    for actual, expected in zip(*found, strict=True):
        assert_same_bits(actual=actual, expected=expected)


def test_a_replay_that_is_gone_is_told_from_every_other() -> None:
    """A later one may lie at its address."""
    replay = prepare_replay(draw_ids()[:, 0], E)
    assert refer(replay) == refer(replay) != refer(None)
    for _ in range(20):
        other = replace(replay)
        earlier = refer(other)
        del other
        other = replace(replay)
        assert earlier != refer(other) and earlier != refer(None)
