"""The public face: check the arguments, choose how to run, launch once."""

import torch
from torch import Tensor

from megakernel.checks.calls import (
    check_call,
    check_placement,
    check_replay,
    check_router,
    check_routing_tensors,
    check_size,
)
from megakernel.config import KernelConfig
from megakernel.device.kernel import Biases, Routing, TokenGate
from megakernel.experts import Experts, MoEOutput, Router, SharedExpert
from megakernel.launch.op import launch_op
from megakernel.launch.run import NO_SHARED, NO_SLOTS, NO_TOKEN_GATE, Layer, SharedWeights, launch
from megakernel.launch.tuned import at_height, default_config
from megakernel.placement import Placement
from megakernel.replay import Replay


def moe(
    x_TH: Tensor,
    router_weight_EH: Tensor,
    experts: Experts,
    router: Router,
    *,
    replay: Replay | None = None,
    placement: Placement | None = None,
    config: KernelConfig | None = None,
) -> MoEOutput:
    """Run gate, dispatch, expert FFN and combine as one launch.

    y[t] = sum over k of gate[t, k] · expert(x[t], e), with e = expert_of_TK[t, k], plus the shared
    expert if there is one. By default expert(x, e) = down[e] · (silu(gate_rows[e] · x) *
    (up_rows[e] · x)). Accumulates in float32, sums over k in k order, rounds once. The
    bits do not depend on the number of workers, the placement, the split over replicas, replay or
    live, or on the other tokens of the call, given one config. (A capacity makes the choices of a
    token depend on the tokens before it.)

    Args:
        x_TH: [T, H] float32, float16 or bfloat16, contiguous; T may be 0.
        router_weight_EH: [E, H], dtype of x_TH or float32, contiguous.
        experts: weights, dtype of x_TH, and what they compute.
        router: how experts are chosen and weighted.
        replay: recorded routing from prepare_replay; the gate then only weighs the given ids.
            Choices that the recording has as -1, such as those dropped over capacity, are absent
            from a renormalised sum.
        placement: experts in slots; identity when None. With a replay, the one it was made for.
        config: how to cut the work; None for the shipped default.

    Returns:
        MoEOutput: y_TH in the dtype of x_TH.

    Raises:
        ValueError: on a bad argument, before any launch; on a GPU also when an earlier launch met
            a bad slot (which it skipped).
        MegakernelStall: when a wait inside a launch ran past its bound.
    """
    check_call(x_TH, experts)
    check_router(router_weight_EH, router, experts, x_TH, placement if replay is None else None)
    shape_TK = (len(x_TH), router.top_k)
    config = choose_config(config, shape_TK, experts, x_TH, replay)
    if replay is None:
        check_placement(placement, experts, shape_TK, x_TH)
        expert_of_TK = x_TH.new_empty(shape_TK, dtype=torch.int32)
        make_load = x_TH.new_empty if len(x_TH) else x_TH.new_zeros
        load_E = make_load(experts.num_experts, dtype=torch.int32)
    else:
        check_replay(replay, placement, experts, shape_TK, x_TH)
        replay = replay.of_height(config.block_rows)
        expert_of_TK, load_E = replay.expert_of_TK, replay.load_E
    gate_TK = x_TH.new_empty(shape_TK, dtype=torch.float32)
    logits_TE = x_TH.new_empty((len(x_TH), experts.num_experts), dtype=torch.float32)
    y_TH = torch.empty_like(x_TH)
    routing = Routing(expert_of_TK, gate_TK, logits_TE, None, load_E if replay is None else None)
    if len(x_TH):
        start(x_TH, router_weight_EH, router, experts, routing, replay, placement, y_TH, config)
    return MoEOutput(y_TH, expert_of_TK, gate_TK, logits_TE, load_E)


def moe_routed(
    x_TH: Tensor,
    expert_of_TK: Tensor,
    gate_TK: Tensor,
    experts: Experts,
    *,
    placement: Placement | None = None,
    config: KernelConfig | None = None,
) -> Tensor:
    """Run dispatch, expert FFN and combine as one launch; the routing is given.

    Args:
        x_TH: [T, H] float32, float16 or bfloat16, contiguous; T may be 0.
        expert_of_TK: [T, K] int32 or int64 ids in [0, E), distinct within a token; -1 is skipped.
        gate_TK: [T, K] float weights, applied in float32.
        experts: weights, dtype of x_TH.
        placement: experts in slots; identity when None.
        config: how to cut the work; None for the shipped default.

    Returns:
        y_TH: [T, H], dtype of x_TH.

    Raises:
        ValueError: on a bad argument, before any launch. On a GPU ids are not looked at, since
            that would synchronise: a bad id is skipped in the launch and raised by the next call
            or by megakernel.check().
        MegakernelStall: when a wait inside a launch ran past its bound.
    """
    check_call(x_TH, experts)
    check_routing_tensors(expert_of_TK, gate_TK, experts, x_TH)
    shape_TK = (len(x_TH), expert_of_TK.shape[1])
    check_placement(placement, experts, shape_TK, x_TH)
    config = choose_config(config, shape_TK, experts, x_TH, None)
    y_TH = torch.empty_like(x_TH)
    routing = Routing(expert_of_TK, gate_TK, None, None)
    if len(x_TH):
        start(x_TH, None, Router(shape_TK[1]), experts, routing, None, placement, y_TH, config)
    return y_TH


def start(
    x_TH: Tensor,
    router_EH: Tensor | None,
    router: Router,
    experts: Experts,
    routing: Routing,
    replay: Replay | None,
    placement: Placement | None,
    y_TH: Tensor,
    config: KernelConfig,
) -> None:
    """Launch directly, or through the custom op while torch.compile traces."""
    route = "given" if router_EH is None else "live" if replay is None else "replay"
    slots, split = NO_SLOTS, "one"
    if placement is not None and replay is None:
        slots = placement.slots
        split = "even" if placement.slot_of_TK is None else "slot"
        routing = routing._replace(slot_of_TK=placement.slot_int32_TK)
    layer = Layer(
        x_TH, router_EH, experts.gate_up_E2IH, experts.down_EHI, routing, slots,
        replay.rows if replay else None, y_TH,
        Biases(router.bias_E, router.correction_bias_E, *experts.biases), experts.rule,
        *shared_arguments(experts.shared, x_TH),
        router.capacity or 0, router.random_second_seed or 0,
    )  # fmt: skip
    num_slots = placement.num_slots if placement else experts.num_experts
    check_size(len(x_TH), routing.expert_of_TK.shape[1], num_slots, experts, config)
    num_tiles = replay.num_tiles if replay else 0
    run = launch_op if torch.compiler.is_compiling() else launch
    run(layer, route, split, router.rule, num_tiles, config)


def shared_arguments(shared: SharedExpert | None, x_TH: Tensor) -> tuple[SharedWeights, TokenGate]:
    """Return the shared expert as the launch takes it."""
    if shared is None:
        return NO_SHARED, NO_TOKEN_GATE
    weights = SharedWeights(shared.gate_JH, shared.up_JH, shared.down_HJ)
    if shared.token_gate_1H is None:
        return weights, NO_TOKEN_GATE
    sigmoid_T = x_TH.new_empty(len(x_TH), dtype=torch.float32)
    return weights, TokenGate(shared.token_gate_1H, sigmoid_T)


def choose_config(
    config: KernelConfig | None,
    shape_TK: tuple[int, int],
    experts: Experts,
    x_TH: Tensor,
    replay: Replay | None,
) -> KernelConfig:
    """Return the given config, or the default, at the only height a fixed replay has."""
    if config is None:
        num_tokens, top_k = shape_TK
        config = default_config(experts.layer_shape(top_k), num_tokens, x_TH.dtype, x_TH.device)
        if isinstance(replay, Replay) and replay.is_fixed:
            config = at_height(config, replay.block_rows)
    return config
