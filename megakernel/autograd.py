"""The layer under autograd: one launch forward, one launch backward.

The forward keeps its arguments, its results and what :class:`Saved` says; no tensor of a launch's
own memory. The backward is asked only for what autograd asks for.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megakernel.checks.calls import check_gradient_tiles
from megakernel.checks.tensors import check_no_tangent
from megakernel.config import SAVES
from megakernel.experts import MainGrad
from megakernel.launch.call import Call, CallRule
from megakernel.launch.op import launcher
from megakernel.plan.buffers import (
    Buffers,
    Gradients,
    Incoming,
    Rows,
    Saved,
    Slots,
    flatten,
    unflatten,
)
from megakernel.replay import Replay

MAIN = ("gate_up_E2IH", "down_EHI")  # weights that a MainGrad has buffers for

# What can have a gradient, by dotted name, and where a backward launch puts it.
DIFFERENTIABLE = {
    "x_TH": "x_TH",
    "router.weight_EH": "router_weight_EH",
    "router.bias_E": "router_bias_E",
    "experts.gate_up_E2IH": "gate_up_E2IH",
    "experts.down_EHI": "down_EHI",
    "experts.gate_up_bias_E2I": "gate_up_bias_E2I",
    "experts.down_bias_EH": "down_bias_EH",
    "routing.gate_TK": "gate_TK",
    "shared.gate_JH": "shared_gate_JH",
    "shared.up_JH": "shared_up_JH",
    "shared.down_HJ": "shared_down_HJ",
    "shared.token_gate_1H": "token_gate_1H",
}


def wants_gradients(call: Call, save: str) -> bool:
    """Whether autograd follows any input of a call.

    Raises:
        ValueError: for another ``save`` than those there are; for a tensor with a tangent.
    """
    if save not in SAVES:
        raise ValueError(f"save must be one of {SAVES}, got {save!r}")
    inputs = differentiable_of(call)
    for name, tensor in inputs.items():
        check_no_tangent(name, tensor)
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs.values())


def run_for_gradients(
    call: Call, save: str, replay: Replay | None, main_grad: MainGrad | None
) -> dict[str, Tensor]:
    """Launch a layer so that autograd can go back through it.

    Args:
        call: of stages "layer", checked.
        save: "preactivations" or "nothing".
        replay: the one that the call has, if any.
        main_grad: where gradients of expert weights go, if not to autograd.

    Returns:
        those results that have a gradient, by name.

    Raises:
        ValueError: for tiles that the interpreter cannot hold; for main_grad under torch.compile.
    """
    check_gradient_tiles(call.rule.config)
    if main_grad is not None and torch.compiler.is_compiling():
        raise ValueError(
            "main_grad must be None under torch.compile, which would take what is in "
            f"grad_added_to_main_grad now, {main_grad.grad_added_to_main_grad}, for a constant"
        )
    call = with_saved(call, save)
    inputs = differentiable_of(call)
    by_expert = None if replay is None else replay.by_expert()
    results = Layer.apply(call, by_expert, main_grad, tuple(inputs), *inputs.values())
    return dict(zip(results_of(call), results, strict=True))


def differentiable_of(call: Call) -> dict[str, Tensor]:
    """Return the inputs that can have a gradient, by dotted name."""
    b, is_given = call.buffers, call.rule.route == "given"
    # Asked in every call: without a walk through the whole record.
    found = {
        "x_TH": b.x_TH,
        "router.weight_EH": b.router.weight_EH,
        "router.bias_E": b.router.bias_E,
        "experts.gate_up_E2IH": b.experts.gate_up_E2IH,
        "experts.down_EHI": b.experts.down_EHI,
        "experts.gate_up_bias_E2I": b.experts.gate_up_bias_E2I,
        "experts.down_bias_EH": b.experts.down_bias_EH,
        "routing.gate_TK": b.routing.gate_TK if is_given else None,
        "shared.gate_JH": b.shared.gate_JH,
        "shared.up_JH": b.shared.up_JH,
        "shared.down_HJ": b.shared.down_HJ,
        "shared.token_gate_1H": b.shared.token_gate_1H,
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def results_of(call: Call) -> dict[str, Tensor]:
    """Return the call's results that can have a gradient; of given weights there is one."""
    b = call.buffers
    results = {"y_TH": b.y_TH}
    if call.rule.route != "given":
        results |= {"gate_TK": b.routing.gate_TK, "logits_TE": b.routing.logits_TE}
    return {name: tensor for name, tensor in results.items() if tensor is not None}


def with_saved(call: Call, save: str) -> Call:
    """Give a call places for what the backward will want."""
    b, rule = call.buffers, call.rule
    assert b.experts.gate_up_E2IH is not None and b.experts.down_EHI is not None
    new = call.tokens.new_empty
    num_tokens = call.tokens.shape[0]
    _, width, _ = b.experts.gate_up_E2IH.shape
    ids_TK = b.routing.expert_of_TK
    assert ids_TK is not None
    saved = Saved()
    if save == "preactivations":
        saved = saved._replace(z_A2I=new(ids_TK.numel(), width))
        if b.shared.up_JH is not None:
            slices = -(-len(b.shared.up_JH) // b.experts.down_EHI.shape[2])
            saved = saved._replace(shared_z_S2I=new(slices * num_tokens, width))
    if b.shared.token_gate_1H is not None:
        saved = saved._replace(sigmoid_T=new(num_tokens, dtype=torch.float32))
    if rule.route == "live" and (rule.router.capped or rule.router.random_second):
        saved = saved._replace(chosen_TK=torch.empty_like(ids_TK))
    return replace(call, buffers=b._replace(saved=saved))


def kept_of(b: Buffers) -> Buffers:
    """Return what of a forward's tensors the backward works from."""
    routing = b.routing._replace(slot_of_TK=None, load_E=None)
    return b._replace(routing=routing, slots=Slots(), rows=Rows(), y_TH=None)


class Layer(torch.autograd.Function):
    """One call of the layer."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        by_expert: Replay | None,
        main_grad: MainGrad | None,
        names: tuple[str, ...],
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        """Launch; ``inputs`` are the tensors of ``call`` that ``names`` say."""
        if call.tokens.shape[0]:
            launcher()(call)
        kept = flatten(kept_of(call.buffers))
        ctx.save_for_backward(*kept.values())
        ctx.kept, ctx.names, ctx.rule = tuple(kept), names, call.rule
        ctx.by_expert, ctx.main_grad = by_expert, main_grad
        ctx.set_materialize_grads(False)
        return tuple(results_of(call).values())

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        """Launch the backward for what is asked for.

        Raises:
            NotImplementedError: if its own derivative is asked for.
        """
        # Autograd would take the result for a constant wherever dy is one.
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "the layer's backward has no derivative: call without create_graph=True"
            )
        buffers = unflatten(dict(zip(ctx.kept, ctx.saved_tensors, strict=True)))
        needed = ctx.needs_input_grad[-len(ctx.names) :]
        wanted = [name for name, asked in zip(ctx.names, needed, strict=True) if asked]
        call = backward_call(buffers, ctx.rule, ctx.by_expert, wanted, incoming, ctx.main_grad)
        if call.tokens.shape[0]:
            launcher()(call)
        places = flatten(call.buffers.gradients)
        if ctx.main_grad is not None:
            finish_main_grad(ctx.main_grad, wanted, bool(call.tokens.shape[0]))
            for name in MAIN:
                places.pop(name, None)
        return None, None, None, None, *(places.get(DIFFERENTIABLE[name]) for name in ctx.names)


def backward_call(
    b: Buffers,
    rule: CallRule,
    by_expert: Replay | None,
    wanted: list[str],
    incoming: tuple[Tensor | None, ...],
    main_grad: MainGrad | None = None,
) -> Call:
    """Collect the backward of a call.

    Args:
        b: what the forward kept.
        rule: of the forward.
        by_expert: row tables in token order; None to make them.
        wanted: dotted names of the tensors whose gradient is asked for.
        incoming: gradients of the results, None for zero.
        main_grad: where gradients of expert weights go, if not to autograd.
    """
    tensors = flatten(b)
    assert b.x_TH is not None
    dy_TH, dgate_TK, dlogits_TE = (*incoming, None, None)[:3]
    dy_TH = torch.zeros_like(b.x_TH) if dy_TH is None else dy_TH.contiguous()
    make = torch.empty_like if len(b.x_TH) else torch.zeros_like
    buffers = {} if main_grad is None else {f"experts.{n}": getattr(main_grad, n) for n in MAIN}
    places = Gradients(**{
        DIFFERENTIABLE[name]: buffers[name] if name in buffers else make(tensors[name])
        for name in wanted
    })  # fmt: skip
    rows, num_tiles = (Rows(), 0) if by_expert is None else (by_expert.rows, by_expert.num_tiles)
    return Call(
        b._replace(
            rows=rows,
            incoming=Incoming(dy_TH, contiguous(dgate_TK), contiguous(dlogits_TE)),
            gradients=places,
        ),
        replace(
            rule,
            stages="backward",
            route="given" if by_expert is None else "replay",
            split="one",
            router=replace(rule.router, capped=False, random_second=False),
        ),
        num_tiles,
        is_added=int(main_grad is not None and main_grad.grad_added_to_main_grad),
    )


def finish_main_grad(main_grad: MainGrad, wanted: list[str], was_launched: bool) -> None:
    """Say that the buffers hold this step's gradients; zero, if there was no token to launch."""
    written = [name for name in MAIN if f"experts.{name}" in wanted]
    if not (was_launched or main_grad.grad_added_to_main_grad):
        for name in written:
            getattr(main_grad, name).zero_()
    main_grad.grad_added_to_main_grad |= bool(written)


def contiguous(gradient: Tensor | None) -> Tensor | None:
    """Return a gradient as the kernel reads it; a copy where autograd hands in a view."""
    return None if gradient is None else gradient.contiguous()
