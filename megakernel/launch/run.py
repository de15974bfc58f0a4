"""From a checked call to the one launch."""

from contextlib import nullcontext

import torch
import triton

from megakernel.checks.values import check_distinct_ids, check_slots
from megakernel.config import KernelConfig
from megakernel.device.backward_kernel import backward_kernel
from megakernel.device.kernel import moe_kernel
from megakernel.launch.call import Call, make_spec
from megakernel.launch.descriptors import as_operand
from megakernel.launch.fences import fence_compilations
from megakernel.launch.memory import Memory
from megakernel.launch.streams import TURN, is_capturing
from megakernel.launch.workspace import Workspace, workspace_for
from megakernel.plan.backward_spec import BackwardSpec
from megakernel.plan.buffers import Buffers
from megakernel.plan.schedule import count_row_tiles
from megakernel.plan.spec import KernelSpec

for _kernel in (moe_kernel, backward_kernel):
    fence_compilations(_kernel, triton.__version__)


def launch(call: Call) -> None:
    """Run the layer: one Triton launch, nothing else, once the workspace is warm.

    Threads launch one after another, whichever streams they use.

    Args:
        call: checked; outputs are written in place.

    Raises:
        MegakernelStall, ValueError: what this call reported (CPU), or an earlier one (GPU).
    """
    device, config = call.tokens.device, call.rule.config
    # Triton launches on the current device, which need not be the tensors'.
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with TURN, current:
        workspace = workspace_for(device)
        if device.type == "cpu" and call.rule.route == "given" and call.rule.stages != "backward":
            check_given(call)
        if not is_capturing(device):
            workspace.raise_errors()
        spec = make_spec(call)
        arguments = kernel_arguments(call, spec, workspace)
        workers, polls = resolve_workers(config, device), resolve_polls(config, device)
        kernel = backward_kernel if spec.is_backward else moe_kernel
        try:
            kernel[(workers,)](*arguments, workers, polls, C=spec, num_warps=config.num_warps)
        except BaseException:
            # An interrupted launch, by Ctrl-C too, leaves counters that would stall the next one,
            # and half a timeline.
            workspace.reset()
            raise
        if device.type == "cpu":
            workspace.raise_errors()


def check_given(call: Call) -> None:
    """Raise on bad ids and slots ahead of a launch on the CPU, where looking costs nothing."""
    routing, experts = call.buffers.routing, call.buffers.experts
    assert routing.expert_of_TK is not None and experts.down_EHI is not None
    check_distinct_ids(routing.expert_of_TK, experts.down_EHI.shape[0])
    if routing.slot_of_TK is not None:
        assert call.buffers.slots.expert_of_P is not None
        check_slots(routing.expert_of_TK, routing.slot_of_TK, call.buffers.slots.expert_of_P)


def kernel_arguments(call: Call, spec: KernelSpec, workspace: Workspace) -> tuple:
    """Return the kernel's positional arguments up to the schedule id."""
    num_tokens, dtype = call.tokens.shape[0], call.tokens.dtype
    num_tiles = count_row_tiles(spec, num_tokens, None if spec.makes_rows else call.num_tiles)
    memory = workspace.memory_for(spec, num_tokens, num_tiles, dtype)
    buffers = complete(call.buffers, spec, workspace, memory)
    own = (int(call.is_added),) if spec.is_backward else (call.capacity, call.seed)
    integers = (num_tokens, num_tiles, *own, memory.schedule_id)
    return (buffers, *weights_of(call.buffers, spec), *integers)


def weights_of(b: Buffers, spec: KernelSpec) -> tuple:
    """Return the experts' weights as the kernel takes them, None in a launch without experts."""
    gate_up_E2IH, down_EHI, *_ = b.experts
    if spec.gate_up is None or spec.down is None or gate_up_E2IH is None or down_EHI is None:
        return None, None
    if isinstance(spec, BackwardSpec):  # products go back through them
        return (
            as_operand(gate_up_E2IH.mT, spec.dx_rule, spec.step),
            as_operand(down_EHI.mT, spec.dh_rule, spec.step),
        )
    return (
        as_operand(gate_up_E2IH, spec.gate_up, spec.step),
        as_operand(down_EHI, spec.down, spec.step),
    )


def complete(b: Buffers, spec: KernelSpec, workspace: Workspace, memory: Memory) -> Buffers:
    """Add scratch and control to a call's tensors, and leave the weights to their descriptors."""
    scratch = memory.scratch
    if b.scratch.y_CH is not None:  # rows that are asked for, or given
        scratch = scratch._replace(y_CH=b.scratch.y_CH)
    experts, saved = b.experts, b.saved
    if saved.sigmoid_T is not None and not spec.is_backward:
        scratch = scratch._replace(sigmoid_T=saved.sigmoid_T)
    if isinstance(spec, BackwardSpec):
        experts = experts._replace(down_EHI=None)
        if spec.recomputes:
            saved = saved._replace(
                z_A2I=memory.saved.z_A2I, shared_z_S2I=memory.saved.shared_z_S2I
            )
        else:
            experts = experts._replace(gate_up_E2IH=None)
    elif not spec.tail_rows:  # then all tasks read the weights that go beside
        experts = experts._replace(gate_up_E2IH=None, down_EHI=None)
    control = workspace.control
    if spec.timed:
        control = control._replace(times=memory.times)
    rows = memory.rows if spec.makes_rows else b.rows
    return b._replace(experts=experts, rows=rows, scratch=scratch, saved=saved, control=control)


def resolve_workers(config: KernelConfig, device: torch.device) -> int:
    """Return how many programs to launch."""
    if config.num_workers is not None:
        return config.num_workers
    if device.type == "cpu":
        return 1
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count * config.workers_per_sm


def resolve_polls(config: KernelConfig, device: torch.device) -> int:
    """Return how often a wait polls before it gives up.

    On a GPU the default lasts seconds. Interpreted programs run one after another, so there a
    counter that is not yet satisfied never will be.
    """
    if config.max_polls is not None:
        return config.max_polls
    return 2 if device.type == "cpu" else 1 << 23
