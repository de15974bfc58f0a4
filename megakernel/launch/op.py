"""The launch as a custom op, so that torch.compile(fullgraph=True) can carry it."""

import torch
from torch import Tensor

from megakernel.config import KernelConfig
from megakernel.device.kernel import Biases, Routing, Rows, Slots, TokenGate
from megakernel.launch.run import NO_SLOTS, Layer, SharedWeights, launch
from megakernel.plan.rules import ExpertRule, GateRule


@torch.library.custom_op(
    "megakernel::launch",
    mutates_args=("y_TH", "expert_out_TK", "gate_out_TK", "logits_TE", "load_E", "sigmoid_T"),
)
def _launch(
    x_TH: Tensor,
    router_EH: Tensor | None,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    router_bias_E: Tensor | None,
    correction_bias_E: Tensor | None,
    gate_up_bias_E2I: Tensor | None,
    down_bias_EH: Tensor | None,
    shared_gate_JH: Tensor | None,
    shared_up_JH: Tensor | None,
    shared_down_HJ: Tensor | None,
    token_gate_1H: Tensor | None,
    sigmoid_T: Tensor | None,
    expert_TK: Tensor | None,
    gate_TK: Tensor | None,
    slot_TK: Tensor | None,
    slots: list[Tensor],
    replay_rows: list[Tensor],
    y_TH: Tensor,
    expert_out_TK: Tensor | None,
    gate_out_TK: Tensor | None,
    logits_TE: Tensor | None,
    load_E: Tensor | None,
    route: str,
    split: str,
    gate: list[float],
    expert: list[float],
    num_tiles: int,
    capacity: int,
    seed: int,
    config: list[int],
) -> None:
    ids_TK = expert_TK if expert_out_TK is None else expert_out_TK
    weights_TK = gate_TK if gate_out_TK is None else gate_out_TK
    assert ids_TK is not None and weights_TK is not None
    routing = Routing(ids_TK, weights_TK, logits_TE, slot_TK, load_E)
    layer = Layer(
        x_TH, router_EH, gate_up_E2IH, down_EHI, routing,
        Slots(*slots) if slots else NO_SLOTS,
        Rows(*replay_rows) if replay_rows else None,
        y_TH, Biases(router_bias_E, correction_bias_E, gate_up_bias_E2I, down_bias_EH),
        ExpertRule.decode(expert), SharedWeights(shared_gate_JH, shared_up_JH, shared_down_HJ),
        TokenGate(token_gate_1H, sigmoid_T), capacity, seed,
    )  # fmt: skip
    launch(layer, route, split, GateRule.decode(gate), num_tiles, KernelConfig.decode(config))


@_launch.register_fake
def _(*args: object, **kwargs: object) -> None:
    """Outputs are arguments: nothing to make while tracing."""


def launch_op(
    layer: Layer, route: str, split: str, gate: GateRule, num_tiles: int, config: KernelConfig
) -> None:
    """Call :func:`megakernel.launch.run.launch` through the registered op; same arguments."""
    routing, slots, rows = layer.routing, layer.slots, layer.replay_rows
    ids_are_input, gates_are_input = route != "live", route == "given"
    _launch(
        layer.x_TH,
        layer.router_EH,
        layer.gate_up_E2IH,
        layer.down_EHI,
        *layer.biases,
        *layer.shared,
        *layer.token_gate,
        routing.expert_of_TK if ids_are_input else None,
        routing.gate_TK if gates_are_input else None,
        routing.slot_of_TK,
        [] if slots.expert_of_P is None else list(slots),
        [] if rows is None else list(rows[:4]),
        layer.y_TH,
        None if ids_are_input else routing.expert_of_TK,
        None if gates_are_input else routing.gate_TK,
        routing.logits_TE,
        routing.load_E,
        route,
        split,
        gate.encode(),
        layer.expert_rule.encode(),
        num_tiles,
        layer.capacity,
        layer.seed,
        config.encode(),
    )
