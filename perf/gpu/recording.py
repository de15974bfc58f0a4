"""Calls of the layer written down instead of launched: their kernels can be compiled ahead.

The code that a GPU will run is called with tensors of the host in its real shapes, which nobody
reads. It takes the configs of a GPU, and each call that it would launch is kept without storage.
"""

import mmap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import prod
from unittest.mock import patch

import torch
from torch import Tensor

from megakernel import MainGrad
from megakernel.config import usual_rows
from megakernel.launch import tuned
from megakernel.launch.call import Call, make_spec
from megakernel.launch.run import kernel_arguments
from megakernel.launch.workspace import workspace_for
from megakernel.plan.buffers import flatten, unflatten
from perf.problems.cases import Case, make_ids
from perf.problems.tensors import Problem

GPU = torch.device("cuda", 0)
USUAL_GPU = "NVIDIA H100 80GB HBM3"  # whose tuned configs are taken where there is none
MAP_NORESERVE = 0x4000  # of Linux; Python has no name for it


@contextmanager
def recording() -> Iterator[list[Call]]:
    """Yield a list that holds every call of the block, and launch none of them."""
    calls: list[Call] = []

    def keep(call: Call) -> None:
        calls.append(without_storage(call))
        leave_traces(call)

    default_config = tuned.default_config
    replaced = {
        "megakernel.launch.op.launch": keep,
        "megakernel.checks.calls.check_runnable": lambda name, tensor: None,
        "megakernel.checks.calls.INTERPRETED": False,  # whose limits are not the GPU's
        "megakernel.api.default_config": lambda layer, num_tokens, dtype, device: default_config(
            layer, num_tokens, dtype, GPU
        ),
        "megakernel.api.usual_rows": lambda assignments, experts, device: usual_rows(
            assignments, experts, GPU
        ),
        "megakernel.launch.tuned.gpu_name": lambda index: gpu_here(),
        "perf.problems.training.make_main_grad": untouched_main_grad,
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch(name, value))
        yield calls


def gpu_here() -> str:
    """Return the name of the GPU whose tuned configs count."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else USUAL_GPU


def without_storage(call: Call) -> Call:
    """Return a call with its tensors' shapes, strides and dtypes alone.

    How many workers run and how long they poll is no concern of the compiler.
    """
    bare = {
        name: torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta")
        for name, one in flatten(call.buffers).items()
    }
    config = replace(call.rule.config, num_workers=1, max_polls=1)
    return replace(call, buffers=unflatten(bare), rule=replace(call.rule, config=config))


def leave_traces(call: Call) -> None:
    """Leave what the code behind a launch looks at: legal ids, and memory of no tiles."""
    device, spec = call.tokens.device, make_spec(call)
    workspace = workspace_for(device)
    kernel_arguments(call, spec, workspace)
    memory, routing = workspace.latest, call.buffers.routing
    assert memory is not None
    for words in (memory.scratch.num_tiles_1, memory.times):
        if words is not None:
            words.zero_()
    if call.rule.route == "live" and routing.expert_of_TK is not None:
        num_tokens, top_k = routing.expert_of_TK.shape
        first_T1 = torch.arange(num_tokens, device=device)[:, None]
        routing.expert_of_TK.copy_((first_T1 + torch.arange(top_k)) % spec.num_experts)


def key_of(call: Call) -> tuple:
    """Return what two calls share if one kernel serves both."""
    types = tuple((name, one.dtype) for name, one in flatten(call.buffers).items())
    return make_spec(call), call.rule.config.num_warps, types


def distinct(calls: list[Call]) -> list[Call]:
    """Return one call per kernel, in the order in which they are first needed."""
    first: dict[tuple, Call] = {}
    for call in calls:
        first.setdefault(key_of(call), call)
    return list(first.values())


def untouched(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return zeros that take no memory until somebody writes: weights may have 20 GB."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, max(prod(shape), 1) * dtype.itemsize, flags)
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape)).view(shape)


def untouched_main_grad(problem: Problem) -> MainGrad:
    """Return float32 buffers for a problem's weights that take no memory either."""
    gate_up, down = (
        untouched(*weight.shape, dtype=torch.float32)
        for weight in (problem.gate_up_E2IH, problem.down_EHI)
    )
    return MainGrad(gate_up, down)


def stand_in_problem(case: Case) -> Problem:
    """Return a case's tensors with nothing in them but the ids."""
    model = case.model
    E, H, I = model.num_experts, model.hidden, model.intermediate
    ids_TK = torch.from_numpy(make_ids(case)).int().contiguous()
    gate_TK = torch.full(ids_TK.shape, 1 / model.top_k)
    layer = untouched(case.num_tokens, H), untouched(E, H), untouched(E, 2 * I, H)
    return Problem(case, *layer, untouched(E, H, I), ids_TK, gate_TK)
