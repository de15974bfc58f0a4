"""Calls of the layer through Triton's real launch path, on a driver that only writes down.

For a process of its own: ``python -m tests.helpers.driver.calls FILE`` with the library of
``recording_driver.c`` where Triton looks for libcuda, and RECORD_TO naming FILE too. Tensors lie
in host memory, which nothing touches.
"""

import json
import os
import re
import sys
from dataclasses import replace

import torch
import triton
from torch import Tensor
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.tools.tensor_descriptor import TensorDescriptor

from megakernel import Experts, Placement, Router, api, moe, moe_routed, prepare_replay
from megakernel.config import ROWS16
from megakernel.device.kernel import moe_kernel
from megakernel.launch import run as launch
from megakernel.launch.call import Call
from megakernel.launch.workspace import Workspace
from megakernel.plan.spec import KernelSpec
from megakernel.tools.compile_check import Sm90

CONFIG = replace(ROWS16, num_workers=132, max_polls=9)
T, K, E, H, I = 40, 2, 8, 256, 128
SCRATCH_POINTERS = 2  # Triton's own, behind ours


class RecordingDriver(Sm90):
    """As much of a Triton driver as launching asks for, with its real CUDA launcher."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher


def draw(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def live() -> None:
    experts = Experts(draw(E, 2 * I, H), draw(E, H, I))
    moe(draw(T, H), draw(E, H), experts, Router(K), config=CONFIG)


def replayed_and_timed() -> None:
    experts, config = Experts(draw(E, 2 * I, H), draw(E, H, I)), replace(CONFIG, record_times=True)
    replay = prepare_replay(torch.arange(T * K).view(T, K) % E, E, config=config)
    moe(draw(T, H), draw(E, H), experts, Router(K), replay=replay, config=config)


def routed_like_gpt_oss_with_replicas() -> None:
    experts = Experts(
        draw(E, H, 2 * I).mT, draw(E, I, H).mT, draw(E, 2 * I), draw(E, H), "clamped_swiglu",
        interleaved=True, transposed=True,
    )  # fmt: skip
    ids_TK = torch.arange(T * K, dtype=torch.int32).view(T, K) % E
    placement = Placement(torch.tensor([*range(E), 3, -1]))
    moe_routed(draw(T, H), ids_TK, torch.rand(T, K), experts, placement=placement, config=CONFIG)


CALLS = (live, replayed_and_timed, routed_like_gpt_oss_with_replicas)


def flatten(argument: object) -> list[dict[str, object]]:
    """Return what the launcher must pass for an argument of the kernel."""
    if argument is None:
        return []
    if isinstance(argument, Tensor):
        return [{"kind": "pointer", "value": argument.data_ptr()}]
    if isinstance(argument, TensorDescriptor):
        base = argument.base
        return [{"kind": "map", "value": base.data_ptr(), "shape": argument.shape,
                 "strides": argument.strides}]  # fmt: skip
    if isinstance(argument, tuple):
        return [part for field in argument for part in flatten(field)]
    return [{"kind": "integer", "value": argument}]


def types_of_parameters(ptx: str) -> list[str]:
    """Return the type of each parameter of the kernel's entry, Triton's own left out."""
    entry = ptx[ptx.index(".entry") :]
    found = re.findall(r"\.param (?:\.align \d+ )?\.(\w+)", entry[: entry.index(")")])
    return found[:-SCRATCH_POINTERS]


def main(path: str) -> None:
    """Run the calls; before each launch write what it must pass, and how the kernel takes it."""
    triton.runtime.driver.set_active(RecordingDriver())
    api.check_call = lambda x_TH, experts: None  # it would refuse tensors of the host
    make_arguments = launch.kernel_arguments

    def write_down(call: Call, spec: KernelSpec, workspace: Workspace) -> tuple:
        arguments = make_arguments(call, spec, workspace)
        every = (*arguments, CONFIG.num_workers, CONFIG.max_polls)
        warm = moe_kernel.warmup(*every, C=spec, num_warps=CONFIG.num_warps, grid=(1,))
        types = types_of_parameters(warm.asm["ptx"])
        os.environ["RECORD_PARAMETERS"] = str(len(types))
        with open(path, "a") as file:
            file.write(json.dumps({"call": "expect", "types": types, "arguments": flatten(every)}))
            file.write("\n")
        return arguments

    launch.kernel_arguments = write_down
    for call in CALLS:
        call()


if __name__ == "__main__":
    main(sys.argv[1])
