"""The backward call of every dialect, made from what the Python machine's forward leaves."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megakernel import MainGrad, Replay, prepare_replay
from megakernel.autograd import backward_call, differentiable_of, kept_of, with_saved
from megakernel.launch.call import Call
from tests.helpers.dialects import TINY, Dialect, make_dialect, place
from tests.helpers.gradients import Gradients, Problem, make_problem
from tests.helpers.plan.machines import machine_of


@dataclass(frozen=True, eq=False)
class Backward:
    """A backward call, and the problem it belongs to.

    Attributes:
        call: the launch.
        problem: inputs and incoming gradients.
        served_TK: ids with -1 where a choice was dropped; None for a routing that is not live.
    """

    call: Call
    problem: Problem
    served_TK: Tensor | None

    @property
    def truth(self) -> Gradients:
        """The float64 gradients by autograd through the reference."""
        return self.problem.gradients(self.served_TK)


def make_backward(
    dialect: Dialect,
    save: str = "preactivations",
    wanted: tuple[str, ...] | None = None,
    is_added: bool = False,
    exact: bool = False,
) -> Backward:
    """Return the backward of a dialect.

    Args:
        dialect: of stage "layer".
        save: see ``megakernel.moe``.
        wanted: dotted names of what has a gradient; None for all that can have one.
        is_added: whether gradients of expert weights are added to buffers that hold something.
        exact: whether the forward rounds nothing.
    """
    call, problem = with_saved(make_dialect(dialect), save), make_problem(dialect)
    kept = machine_of(call, exact).run()
    names = [*differentiable_of(call)] if wanted is None else [*wanted]
    by_expert = None
    if dialect.route == "replay":
        by_expert = replay_of(dialect, problem.expert_of_TK)
    main_grad = main_grad_of(call) if is_added else None
    backward = backward_call(
        kept_of(kept), call.rule, by_expert, names, tuple(problem.incoming), main_grad
    )
    served_TK = kept.routing.expert_of_TK if dialect.route == "live" else None
    return Backward(backward, problem, None if served_TK is None else served_TK.long())


def replay_of(dialect: Dialect, ids_TK: Tensor) -> Replay:
    """Return the row tables by expert, in token order."""
    num_experts = dialect.sizes.get("E", 4)
    placement = place(dialect.split, ids_TK)
    return prepare_replay(ids_TK.int(), num_experts, placement, TINY).by_expert()


def main_grad_of(call: Call) -> MainGrad:
    """Return buffers that an earlier micro-batch has written to."""
    b = call.buffers.experts
    generator = torch.Generator().manual_seed(4)
    assert b.gate_up_E2IH is not None and b.down_EHI is not None
    gate_up, down = (
        torch.empty_like(weight, dtype=torch.float32).normal_(generator=generator)
        for weight in (b.gate_up_E2IH, b.down_EHI)
    )
    return MainGrad(gate_up, down, grad_added_to_main_grad=True)
