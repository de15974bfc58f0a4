"""The launches that training adds to a layer's forward, made from its call, without storage."""

from dataclasses import replace

import torch
from torch import Tensor

from megakernel.autograd import (
    backward_call,
    differentiable_of,
    kept_of,
    results_of,
    with_saved,
)
from megakernel.experts import MainGrad
from megakernel.launch.call import Call

# What a launch is for: a forward that nothing is trained through, one that keeps what a backward
# wants, and backwards: for all gradients, for that of the tokens alone, for all where FFN1 is run
# again, and for all where those of expert weights are added to float32 buffers.
PURPOSES = ("forward", "saving", "backward", "frozen", "anew", "added")
BACKWARDS = PURPOSES[2:]


def for_purpose(call: Call, purpose: str) -> Call:
    """Return the launch for one of ``PURPOSES`` that belongs to a layer's forward call."""
    if purpose == "forward":
        return call
    call = with_saved(call, "nothing" if purpose == "anew" else "preactivations")
    if purpose == "saving":
        return call
    wanted = ["x_TH"] if purpose == "frozen" else list(differentiable_of(call))
    incoming = tuple(results_of(call).values())  # gradients of results look as those do
    buffers = make_main_grad(call) if purpose == "added" else None
    backward = backward_call(kept_of(call.buffers), call.rule, None, wanted, incoming, buffers)
    return with_tables(backward, call) if call.rule.route == "replay" else backward


def make_main_grad(call: Call) -> MainGrad:
    """Return float32 buffers for the gradients of a call's expert weights."""
    experts = call.buffers.experts
    assert experts.gate_up_E2IH is not None and experts.down_EHI is not None
    return MainGrad(experts.gate_up_E2IH.float(), experts.down_EHI.float(), True)


def with_tables(backward: Call, forward: Call) -> Call:
    """Return the backward of a replay, which brings its row tables along."""
    assert forward.buffers.experts.down_EHI is not None
    table_E = _meta(len(forward.buffers.experts.down_EHI))
    rows = forward.buffers.rows._replace(first_row_of_E=table_E, rows_of_E=table_E)
    rule = replace(backward.rule, route="replay")
    buffers = backward.buffers._replace(rows=rows)
    return replace(backward, buffers=buffers, rule=rule, num_tiles=forward.num_tiles)


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")
