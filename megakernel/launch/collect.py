"""From what a user hands in to one call: tensors by owner, rules, integers."""

from typing import NamedTuple

from torch import Tensor

from megakernel.config import KernelConfig
from megakernel.experts import Experts
from megakernel.launch.call import Call, CallRule
from megakernel.placement import Placement
from megakernel.plan.buffers import (
    Buffers,
    ExpertTensors,
    RouterTensors,
    Routing,
    Rows,
    SharedTensors,
    Slots,
)
from megakernel.plan.rules import RouterRule
from megakernel.router import Router

# The tables of a placement, how copies share tokens (see KernelSpec), and the slots it names.
Places = tuple[Slots, str, Tensor | None]


class MoEOutput(NamedTuple):
    """What the layer returns.

    ``expert_of_TK`` holds logical ids, best first, or the forced ids under replay; -1 is a choice
    without an expert. ``gate_TK`` is fp32, 0 where the id is -1. ``logits_TE`` is fp32, with the
    router's bias. ``load_E`` is int32, choices per expert before any is dropped over capacity.
    """

    y_TH: Tensor
    expert_of_TK: Tensor
    gate_TK: Tensor
    logits_TE: Tensor
    load_E: Tensor


def routed_call(
    x_TH: Tensor,
    router_weight_EH: Tensor,
    router: Router,
    experts: Experts,
    out: MoEOutput,
    places: Places,
    rows: tuple[Rows, int] | None,
    config: KernelConfig,
) -> Call:
    """Collect a call whose weights the router makes, for ids that it chooses or a replay brings.

    Args:
        x_TH, router_weight_EH, router, experts, config: as in ``api.moe``, checked.
        out: what the launch writes.
        places: of the experts.
        rows: a replay's tables and how many row tiles they fill; None to route live.
    """
    slots, split, slot_of_TK = places
    tables, num_tiles = (Rows(), 0) if rows is None else rows
    load_E = out.load_E if rows is None else None
    buffers = Buffers(
        x_TH,
        RouterTensors(router_weight_EH, router.bias_E, router.correction_bias_E),
        tensors_of(experts),
        shared_of(experts),
        Routing(out.expert_of_TK, out.gate_TK, out.logits_TE, slot_of_TK, load_E),
        slots,
        tables,
        y_TH=out.y_TH,
    )
    route = "live" if rows is None else "replay"
    rule = CallRule("layer", route, split, router.rule, experts.rule, experts.transposed, config)
    return Call(buffers, rule, num_tiles, router.capacity or 0, router.random_second_seed or 0)


def given_call(
    x_TH: Tensor,
    expert_of_TK: Tensor,
    gate_TK: Tensor,
    experts: Experts,
    places: Places,
    y_TH: Tensor,
    config: KernelConfig,
) -> Call:
    """Collect a call whose routing is given; arguments as in ``api.moe_routed``, checked."""
    slots, split, slot_of_TK = places
    buffers = Buffers(
        x_TH,
        experts=tensors_of(experts),
        shared=shared_of(experts),
        routing=Routing(expert_of_TK, gate_TK, slot_of_TK=slot_of_TK),
        slots=slots,
        y_TH=y_TH,
    )
    rules = RouterRule(), experts.rule, experts.transposed
    return Call(buffers, CallRule("layer", "given", split, *rules, config))


def tensors_of(experts: Experts) -> ExpertTensors:
    """Return the routed experts' tensors."""
    return ExpertTensors(
        experts.gate_up_E2IH, experts.down_EHI, experts.gate_up_bias_E2I, experts.down_bias_EH
    )


def shared_of(experts: Experts) -> SharedTensors:
    """Return the shared expert's tensors."""
    shared = experts.shared
    if shared is None:
        return SharedTensors()
    return SharedTensors(shared.gate_JH, shared.up_JH, shared.down_HJ, shared.token_gate_1H)


def slots_of(placement: Placement | None) -> Places:
    """Return the tables of a placement, how copies share tokens, and the slots that it names."""
    if placement is None:
        return Slots(), "one", None
    split = "even" if placement.slot_of_TK is None else "slot"
    return placement.slots, split, placement.slot_int32_TK
