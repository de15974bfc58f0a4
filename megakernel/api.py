"""The public face: check the arguments, choose how to run, launch once."""

import torch
from torch import Tensor

from megakernel.autograd import run_for_gradients, wants_gradients
from megakernel.checks.calls import (
    check_call,
    check_placement,
    check_replay,
    check_router,
    check_routing_tensors,
    check_size,
)
from megakernel.config import KernelConfig, usual_rows
from megakernel.experts import Experts
from megakernel.launch.collect import MoEOutput, given_call, routed_call, slots_of
from megakernel.launch.op import launcher
from megakernel.launch.tuned import at_height, default_config
from megakernel.placement import Placement, as_kept
from megakernel.replay import Replay, check_routing, sort_into_rows
from megakernel.router import Router


def moe(
    x_TH: Tensor,
    router_weight_EH: Tensor,
    experts: Experts,
    router: Router,
    *,
    replay: Replay | None = None,
    placement: Placement | None = None,
    config: KernelConfig | None = None,
    save: str = "preactivations",
) -> MoEOutput:
    """Run router, dispatch, expert FFN and combine as one launch.

    y[t] = sum over k of gate[t, k] · expert(x[t], e), with e = expert_of_TK[t, k], plus the shared
    expert if there is one. By default expert(x, e) = down[e] · (silu(gate_rows[e] · x) *
    (up_rows[e] · x)). Accumulates in float32, sums over k in k order, rounds once. The
    bits do not depend on the number of workers, the placement, the split over replicas, replay or
    live, or on the other tokens of the call, given one config. (A capacity makes the choices of a
    token depend on the tokens before it.) y_TH, gate_TK and logits_TE are differentiable, by one
    launch, in tokens, router and experts; the bits of gradients depend on no plan either.

    Args:
        x_TH: [T, H] float32, float16 or bfloat16, contiguous; T may be 0.
        router_weight_EH: [E, H], dtype of x_TH or float32, contiguous.
        experts: weights, dtype of x_TH, and what they compute.
        router: how experts are chosen and weighted.
        replay: recorded routing from prepare_replay; the router then only weighs the given ids.
            Choices that are -1 there, as those dropped over capacity, leave a renormalised sum.
        placement: experts in slots; identity when None. With a replay, the one it was made for.
        config: how to cut the work; None for the shipped default.
        save: for a backward, "preactivations" ([T·K, 2I]) or "nothing": FFN1 is then run again.

    Returns:
        MoEOutput: y_TH in the dtype of x_TH.

    Raises:
        ValueError: on a bad argument, before any launch; on a GPU also when an earlier launch met
            a bad slot (which it skipped).
        MegakernelStall: when a wait inside a launch ran past its bound.
        NotImplementedError: from a backward whose own derivative is asked for.
    """
    check_call(x_TH, experts)
    check_router(router_weight_EH, router, experts, x_TH, placement if replay is None else None)
    shape_TK = (x_TH.shape[0], router.top_k)
    config = choose_config(config, shape_TK, experts, x_TH, replay)
    if replay is None:
        check_placement(placement, experts, shape_TK, x_TH)
    else:
        check_replay(replay, placement, experts, shape_TK, x_TH)
        replay, placement = replay.of_height(config.block_rows), None
    out = make_output(x_TH, shape_TK, experts.num_experts, replay)
    check_size(shape_TK, placement, experts, config)
    rows = None if replay is None else (replay.rows, replay.num_tiles)
    layer = x_TH, router_weight_EH, router, experts
    call = routed_call(*layer, out, slots_of(placement), rows, config)
    if wants_gradients(call, save):
        return out._replace(**run_for_gradients(call, save, replay, experts.main_grad))
    if shape_TK[0]:
        launcher()(call)
    return out


def moe_routed(
    x_TH: Tensor,
    expert_of_TK: Tensor,
    gate_TK: Tensor,
    experts: Experts,
    *,
    placement: Placement | None = None,
    config: KernelConfig | None = None,
    save: str = "preactivations",
) -> Tensor:
    """Run dispatch, expert FFN and combine as one launch; the routing is given.

    Args:
        x_TH: [T, H] float32, float16 or bfloat16, contiguous; T may be 0.
        expert_of_TK: [T, K] int32 or int64 ids in [0, E), distinct within a token; -1 is skipped.
        gate_TK: [T, K] float weights, applied in float32.
        experts: weights, dtype of x_TH.
        placement: experts in slots; identity when None.
        config: how to cut the work; None for the shipped default.
        save: see :func:`moe`.

    Returns:
        y_TH: [T, H], dtype of x_TH. Differentiable with respect to x_TH, gate_TK and all tensors
        of the experts; see :func:`moe`.

    Raises:
        ValueError: on a bad argument, before any launch. On a GPU ids are not looked at, since
            that would synchronise: a bad id is skipped in the launch and raised by the next call
            or by megakernel.check().
        MegakernelStall: when a wait inside a launch ran past its bound.
    """
    check_call(x_TH, experts)
    check_routing_tensors(expert_of_TK, gate_TK, experts, x_TH)
    shape_TK = (x_TH.shape[0], expert_of_TK.shape[1])
    check_placement(placement, experts, shape_TK, x_TH)
    config = choose_config(config, shape_TK, experts, x_TH, None)
    check_size(shape_TK, placement, experts, config)
    y_TH, places = torch.empty_like(x_TH), slots_of(placement)
    call = given_call(x_TH, expert_of_TK, gate_TK, experts, places, y_TH, config)
    if wants_gradients(call, save):
        return run_for_gradients(call, save, None, experts.main_grad)["y_TH"]
    if shape_TK[0]:
        launcher()(call)
    return y_TH


def prepare_replay(
    expert_of_TK: Tensor,
    num_experts: int,
    placement: Placement | None = None,
    config: KernelConfig | None = None,
    experts: Experts | None = None,
) -> Replay:
    """Build the row tables of a recorded routing, off the critical path (synchronises).

    A launch with the result has no histogram, prefix or scatter, and starts its expert FFN at
    once. Weights stay live: the router computes them for the given ids, which is the gradient
    semantics of Rollout Routing Replay (arXiv 2510.11370).

    Args:
        expert_of_TK: [T, K] integer ids in [0, E), distinct within a token; -1 is no expert.
        num_experts: E.
        placement: experts in slots; identity when None.
        config: the config of the launches to come; None for the default, or for any: see Replay.
        experts: of the layer to come, of which the default config depends; without them a first
            call with float32 weights or a tuned config may have to build its tables itself.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    check_routing(expert_of_TK, num_experts, placement)
    ids_TK = as_kept(expert_of_TK)
    if config is not None:
        return sort_into_rows(ids_TK, num_experts, placement, config.block_rows, is_fixed=True)
    if experts is None:
        block_rows = usual_rows(ids_TK.numel(), num_experts, ids_TK.device)
    else:
        num_tokens, top_k = ids_TK.shape
        dtype, shape = experts.down_EHI.dtype, experts.layer_shape(top_k)
        block_rows = default_config(shape, num_tokens, dtype, ids_TK.device).block_rows
    return sort_into_rows(ids_TK, num_experts, placement, block_rows, is_fixed=False)


def make_output(
    x_TH: Tensor, shape_TK: tuple[int, int], num_experts: int, replay: Replay | None
) -> MoEOutput:
    """Allocate what a call of :func:`moe` returns; a replay brings its own ids and loads."""
    if replay is None:
        expert_of_TK = x_TH.new_empty(shape_TK, dtype=torch.int32)
        make_load = x_TH.new_empty if shape_TK[0] else x_TH.new_zeros
        load_E = make_load(num_experts, dtype=torch.int32)
    else:
        expert_of_TK, load_E = replay.expert_of_TK, replay.load_E
    gate_TK = x_TH.new_empty(shape_TK, dtype=torch.float32)
    logits_TE = x_TH.new_empty((shape_TK[0], num_experts), dtype=torch.float32)
    return MoEOutput(torch.empty_like(x_TH), expert_of_TK, gate_TK, logits_TE, load_E)


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
