"""What a compiled kernel costs, read from its cubin: registers, shared memory, and its GEMM loops.

Needs no GPU: the two tools it runs, cuobjdump and nvdisasm, come inside the Triton wheel.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from megakernel.tools.flow import GemmLoop, build_flow_graph, find_gemm_loops
from megakernel.tools.jumps import read_jump_tables
from megakernel.tools.sass import Code, Instruction, parse_sass

SM90_REGISTERS = 65_536
SM90_SHARED_BYTES = 233_472
SM90_RESERVED_BYTES = 1_024  # the driver's part of every block; cuobjdump counts it as static
SM90_BLOCK_SHARED_BYTES = SM90_SHARED_BYTES - SM90_RESERVED_BYTES
SM90_WARPS = 64
SM90_BLOCKS = 32
SM90_QUARTERS = 4  # each owns a fourth of the registers and cannot lend them

RESOURCES = re.compile(r"Function \S+:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class CubinReport:
    """What one kernel asks of the device.

    Attributes:
        registers: per thread.
        spill_bytes: local memory per thread, the stack included. Spilled registers are all of it
            unless the kernel prints or calls.
        stack_bytes: the part of it that is the stack; ptxas keeps spilled registers there.
        shared_bytes: static and dynamic, per block, without the driver's reserve.
        code: the whole kernel.
        gemm_loops: the loops that do the matrix products, see
            :func:`megakernel.tools.flow.find_gemm_loops`.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    code: Code
    gemm_loops: tuple[GemmLoop, ...]

    @property
    def gemm_loop_local_ops(self) -> tuple[Instruction, ...]:
        return tuple(op for loop in self.gemm_loops for op in loop.local_ops)


def read_cubin(cubin: bytes, dynamic_shared_bytes: int = 0) -> CubinReport:
    """Report what the single kernel in an sm_90 cubin asks of the device.

    Args:
        cubin: the ELF image; ``CompiledKernel.asm["cubin"]`` in Triton.
        dynamic_shared_bytes: what the launch adds, which no cubin records;
            ``CompiledKernel.metadata.shared`` in Triton.

    Raises:
        ValueError: the image is not a cubin of one kernel, or it branches to an address that none
            of its jump tables holds.
        FileNotFoundError: Triton is not installed, or its build carries no disassembler.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run_tool("cuobjdump", "-res-usage", file.name)
        sass = _run_tool("nvdisasm", "-c", "-ndf", "-g", file.name)
    kernels = RESOURCES.findall(usage)
    if len(kernels) != 1:
        raise ValueError(f"cubin must hold one kernel, got {len(kernels)}")
    registers, stack, static_shared, local = map(int, kernels[0])
    instructions, labels = parse_sass(sass)
    graph = build_flow_graph(instructions, labels, read_jump_tables(cubin))
    return CubinReport(
        registers=registers,
        spill_bytes=stack + local,
        stack_bytes=stack,
        shared_bytes=max(0, static_shared - SM90_RESERVED_BYTES) + dynamic_shared_bytes,
        code=Code(tuple(instructions)),
        gemm_loops=find_gemm_loops(graph),
    )


def workers_per_sm(registers: int, shared_bytes: int, num_warps: int) -> int:
    """Return how many blocks one sm_90 multiprocessor holds at once; 0 when not even one fits.

    Registers go to warps in units of 256 from the warp's quarter of the file, shared memory to
    blocks in units of 128 bytes (the rules of NVIDIA's occupancy calculator).

    Args:
        registers: per thread, 1 to 255.
        shared_bytes: per block, without the driver's reserve.
        num_warps: per block, 1 to 32.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not 1 <= registers <= 255:
        raise ValueError(f"registers must be in 1..255, got {registers}")
    if shared_bytes < 0:
        raise ValueError(f"shared_bytes must not be negative, got {shared_bytes}")
    if not 1 <= num_warps <= 32:
        raise ValueError(f"num_warps must be in 1..32, got {num_warps}")
    if shared_bytes > SM90_BLOCK_SHARED_BYTES:
        return 0
    registers_per_warp = _round_up(32 * registers, 256)
    warps = SM90_QUARTERS * (SM90_REGISTERS // SM90_QUARTERS // registers_per_warp)
    return min(
        warps // num_warps,
        SM90_SHARED_BYTES // _round_up(shared_bytes + SM90_RESERVED_BYTES, 128),
        SM90_WARPS // num_warps,
        SM90_BLOCKS,
    )


def find_tool(name: str) -> Path:
    """Return the path of a CUDA binary tool in the Triton package.

    Raises:
        FileNotFoundError: Triton is not installed, or its build carries no such tool.
    """
    spec = find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{name} comes with Triton, which is not installed")
    path = Path(spec.submodule_search_locations[0], "backends", "nvidia", "bin", name)
    if not path.is_file():
        raise FileNotFoundError(f"this Triton build carries no {name}: there is no {path}")
    return path


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _run_tool(name: str, *arguments: str) -> str:
    done = subprocess.run([find_tool(name), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"cubin must be readable by {name}, which said: {done.stderr.strip()}")
    return done.stdout
