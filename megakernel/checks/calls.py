"""What a call is refused for, before any launch: argument, rule, value."""

import torch
from torch import Tensor
from triton._utils import TRITON_MAX_TENSOR_NUMEL

from megakernel.checks.tensors import (
    check_contiguous,
    check_device,
    check_like,
    check_no_grad,
    check_shape,
    check_tensor,
)
from megakernel.checks.values import check_all_experts, check_known_experts, check_slot_shape
from megakernel.config import KernelConfig
from megakernel.experts import Experts
from megakernel.placement import Placement
from megakernel.plan.order import INTERPRETED
from megakernel.plan.schedule import bound_tiles
from megakernel.replay import Replay
from megakernel.router import Router

MAX_SLOTS = 2048
MAX_ROWS = 2**31 - 1


def check_call(x_TH: Tensor, experts: Experts) -> None:
    """Check what both entry points share."""
    check_tensor("x_TH", x_TH, 2)
    check_runnable("x_TH", x_TH)
    if x_TH.shape[1] != experts.down_EHI.shape[1]:
        raise ValueError(
            f"x_TH must have the experts' width H={experts.down_EHI.shape[1]}, got {x_TH.shape[1]}"
        )
    check_like("x_TH", x_TH, "down_EHI", experts.down_EHI)


def check_runnable(name: str, tensor: Tensor) -> None:
    """Raise unless kernels run where the tensor is."""
    if tensor.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            f"{name} must be on a GPU, got cpu: set TRITON_INTERPRET=1 before importing "
            "megakernel to run the kernel in Triton's interpreter, or use reference.moe, the slow "
            "plain-PyTorch alternative"
        )


def check_placement(
    placement: Placement | None, experts: Experts, shape_TK: tuple[int, int], x_TH: Tensor
) -> None:
    """Check that a placement fits the layer and the call; its values were checked before."""
    if placement is None:
        return
    check_known_experts(placement.num_experts, experts.num_experts)
    check_all_experts(placement.missing_of(experts.num_experts), experts.num_experts)
    check_device("expert_of_P", placement.expert_of_P, x_TH)
    if placement.num_slots > MAX_SLOTS:
        raise ValueError(
            f"expert_of_P must have at most {MAX_SLOTS} slots, got {placement.num_slots}"
        )
    if placement.slot_of_TK is not None:
        check_slot_shape(placement.slot_of_TK, shape_TK)


def check_replay(
    replay: Replay,
    placement: Placement | None,
    experts: Experts,
    shape_TK: tuple[int, int],
    x_TH: Tensor,
) -> None:
    """Check that a replay was prepared for this call, but for its tile height."""
    if not isinstance(replay, Replay):
        raise TypeError(f"replay must come from prepare_replay, got {type(replay).__name__}")
    if tuple(replay.expert_of_TK.shape) != shape_TK:
        raise ValueError(
            f"replay must be prepared for [T, K] = {shape_TK}, "
            f"got {tuple(replay.expert_of_TK.shape)}"
        )
    if replay.num_experts != experts.num_experts:
        raise ValueError(
            f"replay must be prepared for E={experts.num_experts}, got {replay.num_experts}"
        )
    check_device("replay", replay.expert_of_TK, x_TH)
    own = replay.placement
    if placement is not None and placement is not own and placement != own:
        raise ValueError(
            "placement must be None or the one the replay was prepared with, got another"
        )


def check_router(
    router_EH: Tensor,
    router: Router,
    experts: Experts,
    x_TH: Tensor,
    placement: Placement | None,
) -> None:
    """Check the router's weight and what it is asked for."""
    num_experts = experts.num_experts
    check_tensor("router_weight_EH", router_EH, 2)
    check_shape("router_weight_EH", router_EH, (num_experts, x_TH.shape[1]))
    if router_EH.dtype != torch.float32:
        check_like("router_weight_EH", router_EH, "x_TH", x_TH)
    check_device("router_weight_EH", router_EH, x_TH)
    for name in ("bias_E", "correction_bias_E"):
        bias_E = getattr(router, name)
        if bias_E is not None:
            check_shape(name, bias_E, (num_experts,))
            check_device(name, bias_E, x_TH)
    if router.correction_bias_E is not None:
        check_no_grad("correction_bias_E", router.correction_bias_E)
    if num_experts % router.num_groups:
        raise ValueError(f"num_groups must divide E={num_experts}, got {router.num_groups}")
    num_choosable = num_experts // router.num_groups * router.top_groups
    if router.top_k > num_choosable:
        most = f"E={num_experts}"
        if router.num_groups > 1:
            most = f"the {num_choosable} experts of {router.top_groups} groups"
        raise ValueError(f"top_k must be at most {most}, got {router.top_k}")
    if router.capacity is not None and placement is not None and placement.slot_of_TK is not None:
        raise ValueError(
            "slot_of_TK must be None with a capacity, which counts tokens per expert and not per "
            f"slot, got shape {tuple(placement.slot_of_TK.shape)}"
        )


def check_routing_tensors(
    expert_of_TK: Tensor, gate_TK: Tensor, experts: Experts, x_TH: Tensor
) -> None:
    """Check type, shape and place of a given routing, but not its values."""
    check_tensor("gate_TK", gate_TK, 2)
    if expert_of_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expert_of_TK must be int32 or int64, got {expert_of_TK.dtype}")
    if expert_of_TK.ndim != 2 or not 1 <= expert_of_TK.shape[1] <= experts.num_experts:
        raise ValueError(
            f"expert_of_TK must have shape [T, K] with 1 <= K <= E={experts.num_experts}, "
            f"got {tuple(expert_of_TK.shape)}"
        )
    check_contiguous("expert_of_TK", expert_of_TK)
    shape_TK = (x_TH.shape[0], expert_of_TK.shape[1])
    for name, tensor in (("expert_of_TK", expert_of_TK), ("gate_TK", gate_TK)):
        check_shape(name, tensor, shape_TK)
        check_device(name, tensor, x_TH)


def check_tile_product(elements: int) -> None:
    """Refuse tiles that the interpreter, which makes all products before it adds, cannot hold."""
    if INTERPRETED and elements > TRITON_MAX_TENSOR_NUMEL:
        raise ValueError(
            "config must keep rows · step · columns of a tile product within "
            f"{TRITON_MAX_TENSOR_NUMEL} in the interpreter, got {elements}: "
            "halve step, or use megakernel.config.INTERPRETER"
        )


def check_gradient_tiles(config: KernelConfig) -> None:
    """Refuse the same of the backward's products, whose depth is rows, tokens or experts."""
    depth = min(config.step, config.block_rows)
    columns = max(config.block_i, config.combine_tokens) * config.block_h
    check_tile_product(depth * max(columns, config.block_experts * config.step))


def check_size(
    shape_TK: tuple[int, int], placement: Placement | None, experts: Experts, config: KernelConfig
) -> None:
    """Refuse calls whose row ids would not fit 32 bits, or whose tiles no interpreter holds."""
    columns = max(2 * config.block_i, config.block_h)
    elements = max(config.block_rows * columns, config.block_tokens * config.block_experts)
    check_tile_product(elements * config.step)
    num_tokens, top_k = shape_TK
    num_slots = experts.num_experts if placement is None else placement.num_slots
    num_tiles = bound_tiles(num_tokens * top_k, num_slots, config.block_rows)
    if experts.shared is not None:
        num_slices = -(-len(experts.shared.up_JH) // experts.down_EHI.shape[2])
        num_tiles += num_slices * -(-num_tokens // config.block_rows)
    num_rows = num_tiles * config.block_rows
    if num_rows > MAX_ROWS:
        raise ValueError(
            f"x_TH must have so few tokens that T·K padded rows stay below 2^31, got {num_rows}"
        )
