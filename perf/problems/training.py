"""Forward and backward of the layer in one call, for providers whose output has gradients.

A step may be timed only if its gradients agree with float64, as a forward may only if its output
does. Every step computes the router's gradient too, and returns all gradients in new memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import reference
from perf.problems.providers import Provider, eager
from perf.problems.ready import MOST_TIMES_EAGER_ERROR, rms_error
from perf.problems.tensors import Problem
from perf.problems.tuning import quick_autotuning


class Gradients(NamedTuple):
    """Of the sum of y_TH times an upstream gradient, one for each tensor of the layer."""

    x_TH: Tensor
    router_EH: Tensor
    gate_up_E2IH: Tensor
    down_EHI: Tensor


Step = Callable[[], Gradients]


def make_upstream(problem: Problem) -> Tensor:
    """Return dy_TH: random, shape and dtype of the tokens."""
    random = torch.Generator(problem.x_TH.device).manual_seed(problem.case.seed + 2)
    dy_TH = torch.randn(problem.x_TH.shape, generator=random, device=problem.x_TH.device)
    return dy_TH.to(problem.x_TH.dtype)


def train_step(provider: Provider, problem: Problem) -> Step:
    """Return one call that runs a provider's forward, router included, and its backward.

    Args:
        provider: one that trains.
        problem: its tensors are read and stay without gradients.

    Raises:
        ValueError: if the provider's output has no gradients.
    """
    if not provider.trains:
        raise ValueError(f"provider must train, got {provider.name!r}")
    leaves = [getattr(problem, name).detach().requires_grad_() for name in Gradients._fields]
    call = provider.prepare(replace(problem, **dict(zip(Gradients._fields, leaves, strict=True))))
    dy_TH = make_upstream(problem)
    return lambda: Gradients(*torch.autograd.grad(call(), leaves, dy_TH))


def true_gradients(problem: Problem) -> Gradients:
    """Return the gradients in float64 by the reference; its weights' take 4 times bfloat16's."""
    x_TH, router_EH = (
        tensor.detach().double().requires_grad_() for tensor in (problem.x_TH, problem.router_EH)
    )
    routing = reference.route(x_TH, router_EH, problem.top_k)
    gate_TK = routing.gate_TK.detach().requires_grad_()
    dy_TH = make_upstream(problem).double()
    d_gate_up_E2IH, d_down_EHI = (
        torch.zeros_like(weight, dtype=torch.float64)
        for weight in (problem.gate_up_E2IH, problem.down_EHI)
    )
    # One expert at a time: the weights of all in float64 need not fit beside their gradients.
    for expert in routing.expert_of_TK.unique().tolist():
        gate_up = problem.gate_up_E2IH[expert : expert + 1].detach().double().requires_grad_()
        down = problem.down_EHI[expert : expert + 1].detach().double().requires_grad_()
        ids_TK = torch.where(routing.expert_of_TK == expert, 0, -1)
        reference.moe_by_expert(x_TH, ids_TK, gate_TK, gate_up, down).backward(dy_TH)
        assert gate_up.grad is not None and down.grad is not None
        d_gate_up_E2IH[expert], d_down_EHI[expert] = gate_up.grad[0], down.grad[0]
    assert gate_TK.grad is not None
    routing.gate_TK.backward(gate_TK.grad)
    assert x_TH.grad is not None and router_EH.grad is not None
    return Gradients(x_TH.grad, router_EH.grad, d_gate_up_E2IH, d_down_EHI)


def why_wrong_gradients(
    gradients: Gradients, truth: Gradients, eager_errors: Sequence[float]
) -> str | None:
    """Return why a step must not be timed, or None.

    Args:
        gradients: what the step returned.
        truth: in float64.
        eager_errors: of the eager loop in the same dtype, field by field.
    """
    for name, found, true, eager_error in zip(
        Gradients._fields, gradients, truth, eager_errors, strict=True
    ):
        if found.shape != true.shape:
            return f"wrong gradient of {name}: {tuple(found.shape)}"
        error, limit = rms_error(found, true), MOST_TIMES_EAGER_ERROR * eager_error
        if error > limit:
            return f"wrong gradient of {name}: error {error:.1e} is over {limit:.1e}"
    return None


def prepare_steps(
    problem: Problem, providers: Sequence[Provider]
) -> tuple[dict[str, Step], dict[str, str]]:
    """Return the steps that may be timed by name, and why the others may not."""
    truth = true_gradients(problem)
    plain = train_step(Provider("eager loop", eager, trains=True), problem)()
    eager_errors = [rms_error(found, true) for found, true in zip(plain, truth, strict=True)]
    steps: dict[str, Step] = {}
    skipped: dict[str, str] = {}
    for provider in providers:
        if reason := provider.why_missing(problem.x_TH.device):
            skipped[provider.name] = reason
            continue
        try:
            with quick_autotuning(problem.x_TH.device):
                step = train_step(provider, problem)
                gradients = step()
            reason = why_wrong_gradients(gradients, truth, eager_errors)
        except Exception as error:  # whatever other people's packages raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if reason:
            skipped[provider.name] = reason
        else:
            steps[provider.name] = step
    return steps, skipped
