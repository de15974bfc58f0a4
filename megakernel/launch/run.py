"""From checked arguments to the one launch, directly or as a custom op under torch.compile."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from megakernel.config import KernelConfig, resolve_polls, resolve_workers
from megakernel.device.kernel import Biases, Routing, Rows, Slots, TokenGate, moe_kernel
from megakernel.launch.workspace import Workspace, is_capturing, workspace_for
from megakernel.plan.rules import ExpertRule, GateRule
from megakernel.plan.schedule import bound_tiles
from megakernel.plan.spec import KernelSpec
from megakernel.replay import check_distinct_ids, check_slots

INTERPRETED = isinstance(moe_kernel, InterpretedFunction)
NO_SLOTS = Slots(None, None, None, None)
NO_BIASES = Biases()
SWIGLU = ExpertRule()


class SharedWeights(NamedTuple):
    """The shared expert; None where there is none, or no gate."""

    gate_JH: Tensor | None = None
    up_JH: Tensor | None = None
    down_HJ: Tensor | None = None


NO_SHARED = SharedWeights()
NO_TOKEN_GATE = TokenGate()


@dataclass(frozen=True, eq=False)
class Layer:
    """One call's arguments, checked. Fields a route does not use are None or 0."""

    x_TH: Tensor
    router_EH: Tensor | None
    gate_up_E2IH: Tensor
    down_EHI: Tensor
    routing: Routing
    slots: Slots
    replay_rows: Rows | None
    y_TH: Tensor
    biases: Biases = NO_BIASES
    expert_rule: ExpertRule = SWIGLU
    shared: SharedWeights = NO_SHARED
    token_gate: TokenGate = NO_TOKEN_GATE
    capacity: int = 0
    seed: int = 0


def make_spec(
    layer: Layer, route: str, split: str, gate: GateRule, config: KernelConfig
) -> KernelSpec:
    """Collect what the compiler must know."""
    num_experts, hidden, intermediate = layer.down_EHI.shape
    slots, rule = layer.slots, layer.expert_rule
    return KernelSpec(
        route=route,
        split=split,
        gate=gate,
        expert=rule,
        top_k=layer.routing.expert_of_TK.shape[1],
        num_experts=num_experts,
        num_slots=num_experts if slots.expert_of_P is None else len(slots.expert_of_P),
        max_copies=1 if slots.slots_of_EV is None else slots.slots_of_EV.shape[1],
        hidden=hidden,
        intermediate=intermediate,
        shared_width=0 if layer.shared.up_JH is None else len(layer.shared.up_JH),
        block_rows=config.block_rows,
        block_i=config.block_i,
        block_h=config.block_h,
        step=config.step,
        block_tokens=config.block_tokens,
        block_experts=config.block_experts,
        select_tokens=config.select_tokens,
        combine_tokens=config.combine_tokens,
        column_groups=config.column_groups,
        tile_group=config.tile_group,
        num_stages=config.num_stages,
        weight_tma=fits_tma(layer.gate_up_E2IH, rule.stacked, rule.gate_up_transposed)
        and fits_tma(layer.down_EHI, 1, rule.down_transposed),
        timed=config.record_times,
        interpreted=INTERPRETED,
    )


def fits_tma(weight_EXY: Tensor, stacked: int, transposed: bool) -> bool:
    """Whether the copy engine can read the weight: base and rows aligned to 16 bytes."""
    row = weight_EXY.shape[1] // stacked if transposed else weight_EXY.shape[2]
    return row * weight_EXY.element_size() % 16 == 0 and weight_EXY.data_ptr() % 16 == 0


def tiled(
    weight_EXY: Tensor, stacked: int, block_rows: int, transposed: bool, spec: KernelSpec
) -> Tensor | TensorDescriptor:
    """Return the weight as the kernel takes it: the tensor, or a descriptor of single matrices.

    Args:
        weight_EXY: weight of all experts, contiguous, or ``mT`` of such when transposed.
        stacked: how many matrices an expert's rows are stacked of, and a tile covers.
        block_rows: rows of a tile in each matrix.
        transposed: whether X runs fastest in memory.
        spec: says whether the copy engine reads it, and the depth of a step.
    """
    if not spec.weight_tma:
        return weight_EXY
    num_experts, rows, width = weight_EXY.shape
    height = rows // stacked
    if transposed:
        return TensorDescriptor(
            weight_EXY.mT,
            [num_experts, width, stacked, height],
            [width * rows, rows, height, 1],
            [1, spec.step, stacked, block_rows],
        )
    return TensorDescriptor(
        weight_EXY,
        [num_experts * stacked, height, width],
        [height * width, width, 1],
        [stacked, block_rows, spec.step],
    )


def launch(
    layer: Layer, route: str, split: str, gate: GateRule, num_tiles: int, config: KernelConfig
) -> None:
    """Run the layer: one Triton launch, nothing else, once the workspace is warm.

    Args:
        layer: checked tensors; outputs are written in place.
        route: see KernelSpec.
        split: see KernelSpec.
        gate: how logits become choices and weights.
        num_tiles: row tiles of a replay, without those of the shared expert; ignored otherwise.
        config: how to cut the work.

    Raises:
        MegakernelStall, ValueError: what this call reported (CPU), or an earlier one (GPU).
    """
    device = layer.x_TH.device
    spec = make_spec(layer, route, split, gate, config)
    num_tokens = len(layer.x_TH)
    if route != "replay":
        num_tiles = bound_tiles(num_tokens * spec.top_k, spec.num_slots, spec.block_rows)
    num_tiles += spec.num_slices * -(-num_tokens // spec.block_rows)
    if device.type == "cpu" and route == "given":
        check_values(layer)
    workspace = workspace_for(device)
    if not is_capturing(device):
        workspace.raise_errors()
    num_workers = resolve_workers(config, device)
    arguments = kernel_arguments(layer, spec, num_tiles, workspace)
    polls = resolve_polls(config, device)
    # Triton launches on the current device, which need not be the tensors'.
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    try:
        with current:
            moe_kernel[(num_workers,)](
                *arguments, num_workers, polls, C=spec, num_warps=config.num_warps
            )
    except Exception:
        # An interrupted launch leaves counters that would stall the next one, and half a timeline.
        workspace.reset()
        raise
    if device.type == "cpu":
        workspace.raise_errors()


def check_values(layer: Layer) -> None:
    """Raise on bad ids and slots ahead of the launch, where looking at them costs nothing."""
    check_distinct_ids(layer.routing.expert_of_TK, len(layer.down_EHI))
    if layer.routing.slot_of_TK is not None:
        assert layer.slots.expert_of_P is not None
        check_slots(layer.routing.expert_of_TK, layer.routing.slot_of_TK, layer.slots.expert_of_P)


def kernel_arguments(
    layer: Layer, spec: KernelSpec, num_tiles: int, workspace: Workspace
) -> tuple:
    """Return the kernel's positional arguments up to the schedule id."""
    num_tokens, rule = len(layer.x_TH), spec.expert
    scratch = workspace.scratch(spec, num_tokens, num_tiles, layer.x_TH.dtype)
    return (
        layer.x_TH,
        layer.router_EH,
        tiled(layer.gate_up_E2IH, rule.stacked, spec.gate_up_block, rule.gate_up_transposed, spec),
        tiled(layer.down_EHI, 1, spec.block_h, rule.down_transposed, spec),
        layer.biases,
        *layer.shared,
        layer.token_gate,
        layer.routing,
        layer.slots,
        layer.replay_rows if spec.replay else scratch.rows,
        scratch.h_CI,
        scratch.y_CH,
        layer.y_TH,
        workspace.control._replace(times=scratch.times) if spec.timed else workspace.control,
        num_tokens,
        num_tiles,
        layer.capacity,
        layer.seed,
        scratch.schedule_id,
    )
