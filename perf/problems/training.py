"""Steps of training, for providers whose output has gradients: both passes, or the backward.

A step may be timed only if its gradients agree with float64, as a forward may only if its output
does. Every step gives the router's gradient too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import reference
from megakernel import MainGrad
from perf.problems.providers import OURS, Call, Provider, eager, ours_live
from perf.problems.ready import MOST_TIMES_EAGER_ERROR, Ready, prepare_each, rms_error
from perf.problems.tensors import Problem

# Our layer as it may be trained; a given routing has no router to train.
OURS_TRAINING = (
    *OURS[:2],
    Provider("ours saving nothing", partial(ours_live, save="nothing"), is_ours=True, trains=True),
    Provider("ours to float32", ours_live, is_ours=True, trains=True, main_grad="overwritten"),
    Provider("ours added to float32", ours_live, is_ours=True, trains=True, main_grad="added"),
)
PASSES = ("backward", "train")


class Gradients(NamedTuple):
    """Of the sum of y_TH times an upstream gradient, one for each tensor of the layer."""

    x_TH: Tensor
    router_EH: Tensor
    gate_up_E2IH: Tensor
    down_EHI: Tensor


@dataclass
class Step:
    """One call of a provider's backward, with its forward or without.

    Without, the forward has run before: once on each stream, for a graph can hold only what hangs
    on its own stream. Gradients are new memory, or the float32 buffers.

    Attributes:
        call: the forward, router included.
        leaves: what is differentiated, in the order of Gradients.
        dy_TH: the upstream gradient.
        has_forward: whether the call runs it each time.
        main_grad: the float32 buffers; None without.
        is_added: whether gradients are added to what is in them.
    """

    call: Call
    leaves: list[Tensor]
    dy_TH: Tensor
    has_forward: bool
    main_grad: MainGrad | None = None
    is_added: bool = False
    _output_TH: Tensor | None = field(default=None, init=False)
    _made_on: int | None = field(default=None, init=False)

    def __call__(self) -> Gradients:
        """Run it."""
        if self.main_grad is not None:
            self.main_grad.grad_added_to_main_grad = self.is_added
        y_TH = self.call() if self.has_forward else self.output()
        dx_TH, drouter_EH, *weights = torch.autograd.grad(
            y_TH, self.leaves, self.dy_TH, retain_graph=not self.has_forward,
            allow_unused=self.main_grad is not None,
        )  # fmt: skip
        if self.main_grad is not None:
            weights = [self.main_grad.gate_up_E2IH, self.main_grad.down_EHI]
        return Gradients(dx_TH, drouter_EH, *weights)

    def output(self) -> Tensor:
        """Return what the forward gave on this stream; it runs the first time."""
        on_gpu = self.dy_TH.device.type == "cuda"
        stream = torch.cuda.current_stream(self.dy_TH.device).cuda_stream if on_gpu else 0
        if self._output_TH is None or self._made_on != stream:
            self._output_TH, self._made_on = self.call(), stream
        return self._output_TH


def make_upstream(problem: Problem) -> Tensor:
    """Return dy_TH: random, shape and dtype of the tokens."""
    random = torch.Generator(problem.x_TH.device).manual_seed(problem.case.seed + 2)
    dy_TH = torch.randn(problem.x_TH.shape, generator=random, device=problem.x_TH.device)
    return dy_TH.to(problem.x_TH.dtype)


def make_step(provider: Provider, problem: Problem, part: str = "train") -> Step:
    """Return one call that runs a provider's forward, router included, and its backward.

    Args:
        provider: one that trains.
        problem: its tensors are read and stay without gradients.
        part: of PASSES; "backward" for a forward that runs once, ahead.

    Raises:
        ValueError: if the provider's output has no gradients.
    """
    if not provider.trains:
        raise ValueError(f"provider must train, got {provider.name!r}")
    leaves = [getattr(problem, name).detach().requires_grad_() for name in Gradients._fields]
    main_grad = make_main_grad(problem) if provider.main_grad else None
    own = replace(
        problem, **dict(zip(Gradients._fields, leaves, strict=True)), main_grad=main_grad
    )
    return Step(
        provider.prepare(own), leaves, make_upstream(problem), part == "train", main_grad,
        provider.main_grad == "added",
    )  # fmt: skip


def make_main_grad(problem: Problem) -> MainGrad:
    """Return float32 buffers of zeros, to which a first backward may add."""
    gate_up, down = (
        torch.zeros_like(weight, dtype=torch.float32)
        for weight in (problem.gate_up_E2IH, problem.down_EHI)
    )
    return MainGrad(gate_up, down)


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
    problem: Problem,
    providers: Sequence[Provider],
    say: Callable[[str], object] = lambda text: 0,
    part: str = "train",
) -> Ready[Step]:
    """Prepare, run and check a step of each; a peer that breaks is skipped with its error.

    Args:
        problem: the tensors.
        providers: whom to prepare.
        say: told the name of each.
        part: of PASSES.
    """
    truth = true_gradients(problem)
    plain = make_step(Provider("eager loop", eager, trains=True), problem)()
    eager_errors = [rms_error(found, true) for found, true in zip(plain, truth, strict=True)]
    del plain

    def check(provider: Provider) -> tuple[Step, str | None]:
        step = make_step(provider, problem, part)
        return step, why_wrong_gradients(step(), truth, eager_errors)

    return prepare_each(providers, check, problem.x_TH.device, say)
