"""The layer's own gradients of a problem, as autograd hands them out."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megakernel import Experts, KernelConfig, Placement, moe, moe_routed, prepare_replay
from megakernel.device.backward_kernel import backward_kernel
from megakernel.device.kernel import moe_kernel
from megakernel.experts import SharedExpert
from tests.helpers.dialects import TINY, Dialect, place
from tests.helpers.gradients import Gradients, Incoming, Problem, relative_error, tensors_of
from tests.helpers.inputs import poison_scratch

# Two blocks of I and of H, the last of each short, and two workers.
CONFIG = replace(TINY, block_h=32, num_workers=2)


@dataclass(frozen=True, eq=False)
class Trained:
    """What one forward and backward gave.

    Attributes:
        y_TH: the output.
        served_TK: ids after drops, -1 where a choice was dropped; None for a given routing.
        gradients: by name, as the oracle has them.
    """

    y_TH: Tensor
    served_TK: Tensor | None
    gradients: Gradients


def with_leaves(
    problem: Problem, device: torch.device | str = "cpu"
) -> tuple[Problem, dict[str, Tensor]]:
    """Return the problem on a device, on tensors that ask for a gradient, and those by name."""
    inputs, router = problem.inputs, problem.router
    tensors = {"x_TH": inputs.x_TH} | tensors_of(inputs.experts)
    if problem.given_TK is None:
        tensors |= {"router.weight_EH": inputs.router_EH, "router.bias_E": router.bias_E}
    else:
        tensors["routing.gate_TK"] = problem.given_TK
    # A copy keeps the strides of a turned weight.
    leaves = {
        name: tensor.detach().to(device, copy=True).requires_grad_()
        for name, tensor in tensors.items()
        if tensor is not None
    }
    inputs = replace(
        inputs,
        x_TH=leaves["x_TH"],
        router_EH=leaves.get("router.weight_EH", inputs.router_EH.to(device)),
        experts=experts_of(inputs.experts, leaves),
    )
    correction_E = router.correction_bias_E
    router = replace(
        router,
        bias_E=leaves.get("router.bias_E"),
        correction_bias_E=None if correction_E is None else correction_E.to(device),
    )
    return Problem(
        inputs,
        router,
        problem.expert_of_TK.to(device),
        leaves.get("routing.gate_TK"),
        Incoming(*(None if d is None else d.to(device) for d in problem.incoming)),
    ), leaves


def experts_of(experts: Experts, leaves: dict[str, Tensor]) -> Experts:
    """Return the experts with other tensors of the same kind."""
    own = {n.removeprefix("experts."): t for n, t in leaves.items() if n.startswith("experts.")}
    shared = {n.removeprefix("shared."): t for n, t in leaves.items() if n.startswith("shared.")}
    if experts.shared is not None:
        names = ("gate_JH", "up_JH", "down_HJ", "token_gate_1H")
        own["shared"] = SharedExpert(*(shared.get(name) for name in names))  # type: ignore
    return replace(experts, **own)


def train(
    problem: Problem,
    dialect: Dialect,
    config: KernelConfig = CONFIG,
    save: str = "preactivations",
    placement: Placement | None = None,
    replays: bool | None = None,
    device: torch.device | str = "cpu",
) -> Trained:
    """Run one forward and backward of a problem, all scratch being NaN before each.

    Args:
        problem: see ``make_problem``.
        dialect: it was made of.
        config: how to cut the work.
        save: see ``api.moe``.
        placement: instead of the dialect's own.
        replays: whether the routing is replayed; as the dialect says when None.
        device: where to run.
    """
    problem, leaves = with_leaves(problem, device)
    inputs, ids_TK = problem.inputs, problem.expert_of_TK
    placement = placement or place(dialect.split, ids_TK)
    options = {"placement": placement, "config": config, "save": save}
    poison_scratch()
    if problem.given_TK is not None:
        y_TH = moe_routed(inputs.x_TH, ids_TK, problem.given_TK, inputs.experts, **options)
        results, served_TK = [y_TH], None
    else:
        if dialect.route == "replay" if replays is None else replays:
            num_experts = inputs.experts.num_experts
            options["replay"] = prepare_replay(ids_TK, num_experts, placement, config)
        out = moe(inputs.x_TH, inputs.router_EH, inputs.experts, problem.router, **options)
        results, served_TK = [out.y_TH, out.gate_TK, out.logits_TE], out.expert_of_TK
    poison_scratch()
    given = [(r, d) for r, d in zip(results, problem.incoming, strict=False) if d is not None]
    torch.autograd.backward([r for r, _ in given], [d for _, d in given])
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return Trained(results[0].detach(), served_TK, gradients)


def errors_beyond(
    problem: Problem, trained: Trained, dtype: torch.dtype
) -> dict[str, tuple[float, float]]:
    """Return (error, allowed) of each gradient that is further off than it may be.

    Allowed is eager's own error in the dtype, or the rounding of the gradient's dtype where eager
    computes in a wider one; of float32, 1e-5.
    """
    served_TK = None if trained.served_TK is None else trained.served_TK.long().cpu()
    oracle = problem.gradients(served_TK)
    eager = problem.gradients(served_TK, dtype)
    assert trained.gradients.keys() == oracle.keys()
    beyond = {}
    for name, truth in oracle.items():
        own = trained.gradients[name].cpu()
        least = 1e-5 if own.dtype == torch.float32 else torch.finfo(own.dtype).eps / 2
        allowed = max(least, relative_error(eager[name], truth))
        error = relative_error(own, truth)
        if not error <= allowed:
            beyond[name] = (error, allowed)
    return beyond


def count_launches() -> list[str]:
    """Return a list that gets the name of each kernel launched from now on."""
    launches: list[str] = []
    for name, kernel in (("forward", moe_kernel), ("backward", backward_kernel)):
        kernel.pre_run_hooks[:] = [lambda *_, name=name, **__: launches.append(name)]
    return launches
