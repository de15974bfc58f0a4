"""One training step of a tiny model, and what its gradients are held to."""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.gradients import relative_error
from tests.megakernel.adapters.tiny import DEEPSEEK_V3, GLM4, Family, make, prompt

Gradients = dict[str, Tensor | None]

# Eager adds the same products in another order, so its error is of the same size and not the same.
SAME_SIZE = 2.0
FLOAT32_ERROR = 1e-5
AUXILIARY_WEIGHT = 0.5  # of the loss that balances experts: enough to matter in every gradient


def make_small(family: Family, dtype: torch.dtype = torch.float32) -> Any:
    """Build a model with one sparse layer; a family may have a dense one before it."""
    layers = {"num_hidden_layers": 3 - family.moe_layers}
    return make(family, router_aux_loss_coef=AUXILIARY_WEIGHT, **layers).to(dtype)


def make_deep(family: Family, dtype: torch.dtype = torch.float32) -> Any:
    """Build a model of two layers."""
    return make(family, router_aux_loss_coef=AUXILIARY_WEIGHT).to(dtype)


def options_of(family: Family) -> dict[str, bool]:
    """Ask for the loss that balances experts where a family has it."""
    return {} if family in (DEEPSEEK_V3, GLM4) else {"output_router_logits": True}


def loss_of(model: Any, **options: Any) -> Tensor:
    """Return the loss of a model in training on a prompt."""
    tokens = prompt(1, 11)
    loss: Tensor = model.train()(tokens, labels=tokens, use_cache=False, **options).loss
    return loss


def step(model: Any, **options: Any) -> Gradients:
    """Run forward and backward, and return the gradient of each parameter."""
    loss_of(model, **options).backward()
    return gradients_of(model)


def gradients_of(model: nn.Module) -> Gradients:
    """Return the gradient of each parameter by name."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@cache
def eager_step(family: Family, is_deep: bool, dtype: torch.dtype) -> Gradients:
    """Return eager's gradients; those of float64 are the truth."""
    model = (make_deep if is_deep else make_small)(family)
    return step(model.to(dtype), **options_of(family))


def assert_as_exact_as_eager(
    actual: Gradients, family: Family, is_deep: bool, dtype: torch.dtype = torch.float32
) -> None:
    """Hold each parameter's gradient to eager's own error, against float64."""
    low, truth = (eager_step(family, is_deep, kind) for kind in (dtype, torch.float64))
    assert_as_exact(actual, low, truth)


def assert_as_exact(actual: Gradients, low: Gradients, truth: Gradients) -> None:
    """Assert that the same parameters have gradients, each within eager's own error.

    Args:
        actual: of the model under test.
        low: eager's in the same dtype.
        truth: eager's in float64.
    """
    there = partial(filter, lambda item: item[1] is not None)
    names = {name for name, _ in there(truth.items())}
    assert {name for name, _ in there(actual.items())} == names != set()
    for name in names:
        own, mine = (relative_error(gradients[name], truth[name]) for gradients in (low, actual))
        assert mine <= max(SAME_SIZE * own, FLOAT32_ERROR), name
