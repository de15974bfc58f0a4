"""Launches of the backward alone: what the forward would have kept, the Python machine makes."""

from typing import TYPE_CHECKING

import torch

from megakernel import KernelConfig, MainGrad, prepare_replay
from megakernel.api import make_output
from megakernel.autograd import backward_call, differentiable_of, kept_of, with_saved
from megakernel.launch.call import Call
from megakernel.launch.collect import given_call, routed_call, slots_of
from megakernel.launch.run import launch as run
from megakernel.plan.buffers import Buffers, Gradients
from megakernel.replay import Replay
from tests.helpers.plan.machines import machine_of

if TYPE_CHECKING:
    from tests.helpers.race.layer.launches import Launch


def call_backward(launch: "Launch", config: KernelConfig) -> Gradients:
    """Run the backward of a launch, and return what it writes."""
    replay = replay_of(launch, config)
    forward = forward_call(launch, replay, config)
    kept = launch.kept_of(forward)
    b = kept.routing
    incoming = (kept.x_TH, b.gate_TK, b.logits_TE)  # as good as any
    call = backward_call(
        kept, forward.rule, replay, asked_of(launch, forward), incoming, main_grad_of(launch)
    )
    run(call)
    return call.buffers.gradients


def replay_of(launch: "Launch", config: KernelConfig) -> Replay | None:
    """Return the row tables of a replay, by expert."""
    if launch.route != "replay":
        return None
    return prepare_replay(launch.ids_TK, launch.num_experts, None, config)


def forward_call(launch: "Launch", replay: Replay | None, config: KernelConfig) -> Call:
    """Return the call of the forward, with places for what it keeps."""
    layer, ids_TK = launch.layer, launch.ids_TK
    if launch.route == "given":
        gate_TK = torch.full(ids_TK.shape, 0.5)
        y_TH = torch.zeros_like(layer.x_TH)
        given = layer.x_TH, ids_TK, gate_TK, layer.experts
        return with_saved(given_call(*given, slots_of(None), y_TH, config), launch.save)
    out = make_output(layer.x_TH, tuple(ids_TK.shape), launch.num_experts, replay)
    rows = None if replay is None else (replay.rows, replay.num_tiles)
    parts = layer.x_TH, layer.router_EH, layer.router, layer.experts
    return with_saved(routed_call(*parts, out, slots_of(None), rows, config), launch.save)


def run_forward(forward: Call) -> Buffers:
    """Return what the backward works from; no launch makes it."""
    return kept_of(machine_of(forward).run())


def asked_of(launch: "Launch", forward: Call) -> list[str]:
    """Return the names of what has a gradient."""
    return [*(launch.asks or differentiable_of(forward))]


def main_grad_of(launch: "Launch") -> MainGrad | None:
    """Return buffers that hold an earlier micro-batch's gradients, if they are added to."""
    if not launch.is_added:
        return None
    experts = launch.layer.experts
    weights = experts.gate_up_E2IH, experts.down_EHI
    return MainGrad(*(torch.ones(weight.shape) for weight in weights), True)
