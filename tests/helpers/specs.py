"""Calls, specs and task lists of small problems, for tests below the public face."""

import torch
from torch import Tensor

from megakernel import Experts, KernelConfig, Placement, Replay, Router
from megakernel.api import make_output
from megakernel.launch.call import Call, make_spec
from megakernel.launch.collect import given_call, routed_call, slots_of
from megakernel.plan.schedule import Schedule
from megakernel.plan.spec import KernelSpec
from tests.helpers.cases import SHAPES
from tests.helpers.inputs import SMALL, Inputs, make_inputs


def live_call(
    inputs: Inputs,
    *,
    router: Router | None = None,
    placement: Placement | None = None,
    config: KernelConfig = SMALL,
) -> Call:
    """Return the call of a live layer, with outputs of its own."""
    router = router or inputs.router
    experts, shape_TK = inputs.experts, (len(inputs.x_TH), router.top_k)
    out = make_output(inputs.x_TH, shape_TK, experts.num_experts, None)
    layer = inputs.x_TH, inputs.router_EH, router, experts
    return routed_call(*layer, out, slots_of(placement), None, config)


def replay_call(
    inputs: Inputs, replay: Replay, *, router: Router | None = None, config: KernelConfig = SMALL
) -> Call:
    """Return the call of a replayed layer, with outputs of its own."""
    router = router or inputs.router
    experts, shape_TK = inputs.experts, (len(inputs.x_TH), router.top_k)
    out = make_output(inputs.x_TH, shape_TK, experts.num_experts, replay)
    layer = inputs.x_TH, inputs.router_EH, router, experts
    rows = replay.rows, replay.num_tiles
    return routed_call(*layer, out, slots_of(None), rows, config)


def routed_given_call(
    inputs: Inputs,
    expert_of_TK: Tensor,
    gate_TK: Tensor,
    *,
    placement: Placement | None = None,
    config: KernelConfig = SMALL,
) -> Call:
    """Return the call of a layer whose routing is given, with an output of its own."""
    y_TH = torch.empty_like(inputs.x_TH)
    places = slots_of(placement)
    experts: Experts = inputs.experts
    return given_call(inputs.x_TH, expert_of_TK, gate_TK, experts, places, y_TH, config)


PLAIN_SPEC: KernelSpec = make_spec(live_call(make_inputs(SHAPES[0])))
PLAIN_SCHEDULE = Schedule(PLAIN_SPEC, num_tokens=40, num_tiles=8)
