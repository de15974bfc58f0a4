"""The public face: check the arguments, choose how to run, launch once."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megakernel.config import KernelConfig, default_config
from megakernel.kernel import Routing
from megakernel.launch import INTERPRETED, NO_SLOTS, Layer, launch
from megakernel.op import launch_op
from megakernel.placement import Placement
from megakernel.replay import Replay, check_experts, check_slot_shape

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_EXPERTS = 1024
MAX_SLOTS = 2048
MAX_ASSIGNMENTS = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Experts:
    """Weights of all experts, in the layout of Hugging Face transformers.

    Attributes:
        gate_up_E2IH: [E, 2I, H], gate rows first, then up rows; contiguous.
        down_EHI: [E, H, I], same dtype and device; contiguous.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """

    gate_up_E2IH: Tensor
    down_EHI: Tensor

    def __post_init__(self) -> None:
        """Check that the two tensors belong together."""
        check_tensor("gate_up_E2IH", self.gate_up_E2IH, 3)
        check_tensor("down_EHI", self.down_EHI, 3)
        num_experts, hidden, intermediate = self.down_EHI.shape
        if min(self.down_EHI.shape) < 1:
            raise ValueError(f"down_EHI must not be empty, got {tuple(self.down_EHI.shape)}")
        if num_experts > MAX_EXPERTS:
            raise ValueError(
                f"down_EHI must hold at most {MAX_EXPERTS} experts, got {num_experts}"
            )
        check_shape("gate_up_E2IH", self.gate_up_E2IH, (num_experts, 2 * intermediate, hidden))
        check_like("gate_up_E2IH", self.gate_up_E2IH, "down_EHI", self.down_EHI)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.down_EHI.shape[0]


@dataclass(frozen=True)
class Router:
    """How logits become choices.

    Attributes:
        top_k: experts per token, at least 1.
        score: "softmax", over all experts in float32.
        renormalize: whether a token's weights sum to one.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """

    top_k: int
    score: str = "softmax"
    renormalize: bool = True

    def __post_init__(self) -> None:
        """Check the fields."""
        if not isinstance(self.top_k, int) or self.top_k < 1:
            raise ValueError(f"top_k must be a positive integer, got {self.top_k!r}")
        if self.score != "softmax":
            raise ValueError(f"score must be 'softmax', got {self.score!r}")


class MoEOutput(NamedTuple):
    """What the layer returns.

    ``expert_of_TK`` holds logical ids, best first, or the forced ids under replay. ``gate_TK`` is
    fp32, 0 where the id is -1. ``logits_TE`` is fp32.
    """

    y_TH: Tensor
    expert_of_TK: Tensor
    gate_TK: Tensor
    logits_TE: Tensor


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

    y[t] = sum over k of gate[t, k] · down[e] · (silu(gate_rows[e] · x[t]) * (up_rows[e] · x[t])),
    with e = expert_of_TK[t, k]. Accumulates in float32, sums over k in k order, rounds once. The
    bits do not depend on the number of workers, the placement, the split over replicas, replay or
    live, or on the other tokens of the call, given one config.

    Args:
        x_TH: [T, H] float32, float16 or bfloat16, contiguous; T may be 0.
        router_weight_EH: [E, H], dtype of x_TH, contiguous.
        experts: weights, dtype of x_TH.
        router: how many experts a token gets and how they are weighted.
        replay: recorded routing from prepare_replay; the gate then only weighs the given ids.
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
    check_tensor("router_weight_EH", router_weight_EH, 2)
    check_shape("router_weight_EH", router_weight_EH, (experts.num_experts, x_TH.shape[1]))
    check_like("router_weight_EH", router_weight_EH, "x_TH", x_TH)
    check_no_grad("router_weight_EH", router_weight_EH)
    if router.top_k > experts.num_experts:
        raise ValueError(f"top_k must be at most E={experts.num_experts}, got {router.top_k}")
    shape_TK = (len(x_TH), router.top_k)
    config = choose_config(config, shape_TK, experts, x_TH, replay)
    if replay is None:
        check_placement(placement, experts, shape_TK, x_TH)
        expert_of_TK = x_TH.new_empty(shape_TK, dtype=torch.int32)
    else:
        check_replay(replay, placement, experts, shape_TK, x_TH, config)
        expert_of_TK = replay.expert_of_TK
    gate_TK = x_TH.new_empty(shape_TK, dtype=torch.float32)
    logits_TE = x_TH.new_empty((len(x_TH), experts.num_experts), dtype=torch.float32)
    y_TH = torch.empty_like(x_TH)
    routing = Routing(expert_of_TK, gate_TK, logits_TE, None)
    if len(x_TH):
        start(x_TH, router_weight_EH, experts, routing, router.renormalize, replay, placement,
              y_TH, config)  # fmt: skip
    return MoEOutput(y_TH, expert_of_TK, gate_TK, logits_TE)


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
    if expert_of_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expert_of_TK must be int32 or int64, got {expert_of_TK.dtype}")
    if expert_of_TK.ndim != 2 or not 1 <= expert_of_TK.shape[1] <= experts.num_experts:
        raise ValueError(
            f"expert_of_TK must have shape [T, K] with 1 <= K <= E={experts.num_experts}, "
            f"got {tuple(expert_of_TK.shape)}"
        )
    shape_TK = (len(x_TH), expert_of_TK.shape[1])
    check_shape("expert_of_TK", expert_of_TK, shape_TK)
    check_shape("gate_TK", gate_TK, shape_TK)
    for name, tensor in (("expert_of_TK", expert_of_TK), ("gate_TK", gate_TK)):
        check_contiguous(name, tensor)
        check_device(name, tensor, x_TH)
    check_tensor("gate_TK", gate_TK, 2)
    check_no_grad("gate_TK", gate_TK)
    check_placement(placement, experts, shape_TK, x_TH)
    config = choose_config(config, shape_TK, experts, x_TH, None)
    y_TH = torch.empty_like(x_TH)
    routing = Routing(expert_of_TK, gate_TK, None, None)
    if len(x_TH):
        start(x_TH, None, experts, routing, False, None, placement, y_TH, config)
    return y_TH


def start(
    x_TH: Tensor,
    router_EH: Tensor | None,
    experts: Experts,
    routing: Routing,
    renormalize: bool,
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
    )  # fmt: skip
    num_tiles = replay.num_tiles if replay else 0
    run = launch_op if torch.compiler.is_compiling() else launch
    run(layer, route, split, renormalize, num_tiles, config)


def choose_config(
    config: KernelConfig | None,
    shape_TK: tuple[int, int],
    experts: Experts,
    x_TH: Tensor,
    replay: Replay | None,
) -> KernelConfig:
    """Return the given config, or the default with the tile height of the replay."""
    if config is None:
        num_assignments = shape_TK[0] * shape_TK[1]
        config = default_config(num_assignments, experts.num_experts, x_TH.dtype, x_TH.device)
        if replay is not None and isinstance(replay, Replay):
            config = replace(config, block_rows=replay.block_rows)
    return config


def check_call(x_TH: Tensor, experts: Experts) -> None:
    """Check what both entry points share."""
    check_tensor("x_TH", x_TH, 2)
    if x_TH.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "x_TH must be on a GPU, got cpu: set TRITON_INTERPRET=1 before importing megakernel "
            "to run the kernel in Triton's interpreter, or use reference.moe, the slow "
            "plain-PyTorch alternative"
        )
    if x_TH.shape[1] != experts.down_EHI.shape[1]:
        raise ValueError(
            f"x_TH must have the experts' width H={experts.down_EHI.shape[1]}, got {x_TH.shape[1]}"
        )
    check_like("x_TH", x_TH, "down_EHI", experts.down_EHI)
    tensors = {
        "x_TH": x_TH,
        "gate_up_E2IH": experts.gate_up_E2IH,
        "down_EHI": experts.down_EHI,
    }
    for name, tensor in tensors.items():
        check_no_grad(name, tensor)


def check_placement(
    placement: Placement | None, experts: Experts, shape_TK: tuple[int, int], x_TH: Tensor
) -> None:
    """Check that a placement fits the layer and the call; its values were checked before."""
    if placement is None:
        return
    check_experts(placement, experts.num_experts)
    check_device("expert_of_P", placement.expert_of_P, x_TH)
    if placement.num_slots > MAX_SLOTS:
        raise ValueError(
            f"expert_of_P must have at most {MAX_SLOTS} slots, got {placement.num_slots}"
        )
    if placement.slot_of_TK is not None:
        check_slot_shape(placement, shape_TK)


def check_replay(
    replay: Replay,
    placement: Placement | None,
    experts: Experts,
    shape_TK: tuple[int, int],
    x_TH: Tensor,
    config: KernelConfig,
) -> None:
    """Check that a replay was prepared for this call."""
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
    if replay.block_rows != config.block_rows:
        raise ValueError(
            f"replay must be prepared with block_rows={config.block_rows} as in config, "
            f"got {replay.block_rows}"
        )
    check_device("replay", replay.expert_of_TK, x_TH)
    if placement is not None and placement is not replay.placement:
        raise ValueError(
            "placement must be None or the one the replay was prepared with, got another"
        )


def check_tensor(name: str, tensor: Tensor, ndim: int) -> None:
    """Raise unless ``tensor`` is a contiguous floating tensor with ``ndim`` axes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes, got shape {tuple(tensor.shape)}")
    check_contiguous(name, tensor)


def check_no_grad(name: str, tensor: Tensor) -> None:
    """Raise on a tensor that autograd would have to follow."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require grad: there is no backward yet; call under torch.no_grad()"
        )


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Raise unless the tensor is contiguous; a silent copy would be a second launch."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless the tensor has the shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def check_device(name: str, tensor: Tensor, x_TH: Tensor) -> None:
    """Raise unless the tensor is where the tokens are."""
    if tensor.device != x_TH.device:
        raise ValueError(f"{name} must be on {x_TH.device} like x_TH, got {tensor.device}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors share dtype and device."""
    if tensor.dtype != other.dtype:
        raise ValueError(f"{name} must have the dtype of {other_name}, {other.dtype}, "
                         f"got {tensor.dtype}")  # fmt: skip
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, "
                         f"got {tensor.device}")  # fmt: skip
