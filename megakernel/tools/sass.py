"""What a compiled kernel costs, read from its cubin: registers, shared memory, and its GEMM loops.

Needs no GPU: the two tools it runs, cuobjdump and nvdisasm, come inside the Triton wheel.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

SM90_REGISTERS = 65_536
SM90_SHARED_BYTES = 233_472
SM90_RESERVED_BYTES = 1_024  # the driver's part of every block; cuobjdump counts it as static
SM90_BLOCK_SHARED_BYTES = SM90_SHARED_BYTES - SM90_RESERVED_BYTES
SM90_WARPS = 64
SM90_BLOCKS = 32
SM90_QUARTERS = 4  # each owns a fourth of the registers and cannot lend them

TENSOR_OPCODES = {"HGMMA", "HMMA"}
# Opcodes that end a straight run of code, without their modifiers.
BRANCHES = {"BRA", "JMP"}
ENDS = {"EXIT", "RET"}
INDIRECT_BRANCHES = {"BRX", "BRXU", "JMX", "JMXU"}

INSTRUCTION_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
LABEL_LINE = re.compile(r"([.$\w]+):\s*$")
SOURCE_LINE = re.compile(r'\s*//## File "(.+?)", line (\d+)')
TARGET = re.compile(r"(?:0x([0-9a-f]+)|`\((\S+)\))$")
RESOURCES = re.compile(r"Function \S+:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One line of SASS.

    Attributes:
        address: byte offset in the kernel.
        text: as disassembled, guard first: ``@P0 BRA `(.L_x_1)``.
        source: ``file.py:line`` of the Triton code it serves; None without line information.
    """

    address: int
    text: str
    source: str | None = None

    @property
    def is_guarded(self) -> bool:
        return self.text.startswith("@")

    @property
    def mnemonic(self) -> list[str]:
        """The opcode and its modifiers: ``["LDGSTS", "E", "BYPASS", "128"]``."""
        return self.text.split()[int(self.is_guarded)].split(".")

    @property
    def opcode(self) -> str:
        return self.mnemonic[0]

    def __str__(self) -> str:
        return f"{self.address:#06x}: {self.text}" + (f"  [{self.source}]" if self.source else "")


@dataclass(frozen=True)
class Code:
    """A piece of a kernel: all of it, or one loop. Other code may lie between its instructions."""

    instructions: tuple[Instruction, ...]

    @property
    def wgmma(self) -> int:
        """Warp-group tensor core instructions (HGMMA)."""
        return self._count({"HGMMA"})

    @property
    def mma(self) -> int:
        """Warp tensor core instructions (HMMA): what tiles of fewer than 64 rows get."""
        return self._count({"HMMA"})

    @property
    def async_16_byte_loads(self) -> int:
        """Global-to-shared copies of 16 bytes a thread (LDGSTS)."""
        return sum(one.opcode == "LDGSTS" and "128" in one.mnemonic for one in self.instructions)

    @property
    def tma_loads(self) -> int:
        return self._count({"UBLKCP", "UTMALDG"})

    @property
    def local_ops(self) -> tuple[Instruction, ...]:
        """Loads and stores of local memory, which is where spilled registers live."""
        return tuple(one for one in self.instructions if one.opcode in ("LDL", "STL"))

    def _count(self, opcodes: set[str]) -> int:
        return sum(one.opcode in opcodes for one in self.instructions)


@dataclass(frozen=True)
class CubinReport:
    """What one kernel asks of the device.

    Attributes:
        registers: per thread.
        spill_bytes: local memory per thread. Spilled registers are all of it unless the kernel
            prints or calls.
        shared_bytes: static and dynamic, per block, without the driver's reserve.
        code: the whole kernel.
        gemm_loops: the loops that do the matrix products, see :func:`find_gemm_loops`.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    code: Code
    gemm_loops: tuple[Code, ...]

    @property
    def gemm_loop_local_ops(self) -> tuple[Instruction, ...]:
        return tuple(op for loop in self.gemm_loops for op in loop.local_ops)


@dataclass(frozen=True)
class FlowGraph:
    """Straight runs of instructions and where each may go next; both keyed by first address."""

    blocks: dict[int, list[Instruction]]
    successors: dict[int, list[int]]

    @property
    def predecessors(self) -> dict[int, list[int]]:
        before: dict[int, list[int]] = {start: [] for start in self.blocks}
        for start, following in self.successors.items():
            for successor in following:
                before[successor].append(start)
        return before


def read_cubin(cubin: bytes, dynamic_shared_bytes: int = 0) -> CubinReport:
    """Report what the single kernel in an sm_90 cubin asks of the device.

    Args:
        cubin: the ELF image; ``CompiledKernel.asm["cubin"]`` in Triton.
        dynamic_shared_bytes: what the launch adds, which no cubin records;
            ``CompiledKernel.metadata.shared`` in Triton.

    Raises:
        ValueError: the image is not a cubin of one kernel, or it branches to a computed address.
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
    return CubinReport(
        registers=registers,
        spill_bytes=stack + local,
        shared_bytes=max(0, static_shared - SM90_RESERVED_BYTES) + dynamic_shared_bytes,
        code=Code(tuple(instructions)),
        gemm_loops=find_gemm_loops(build_flow_graph(instructions, labels)),
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


def parse_sass(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions of a disassembly and the address that each label stands for.

    Args:
        text: what ``nvdisasm -c`` (labels) or ``cuobjdump -sass`` (absolute targets) prints.

    Raises:
        ValueError: there is no instruction, or there are several functions.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    source = None
    for line in text.splitlines():
        if label := LABEL_LINE.match(line):
            pending.append(label[1])
        elif place := SOURCE_LINE.match(line):
            source = f"{Path(place[1]).name}:{place[2]}"
        elif code := INSTRUCTION_LINE.match(line):
            address = int(code[1], 16)
            labels.update(dict.fromkeys(pending, address))
            pending.clear()
            instructions.append(Instruction(address, code[2], source))
    if not instructions:
        raise ValueError("text must hold SASS instructions, got none")
    if any(later.address <= earlier.address for earlier, later in pairwise(instructions)):
        raise ValueError("text must hold one function, got several")
    return instructions, labels


def build_flow_graph(instructions: list[Instruction], labels: dict[str, int]) -> FlowGraph:
    """Cut a function into blocks and link them.

    A call returns to the next instruction, and BSYNC goes on to the next one (ptxas puts the
    meeting point of a BSSY right behind its BSYNC), so only branches and exits end a block.

    Raises:
        ValueError: a branch leads to a computed address or out of the function.
    """
    next_of = {one.address: later.address for one, later in pairwise(instructions)}
    known = {one.address for one in instructions}
    exits_of = {
        one.address: _exits(one, labels, next_of.get(one.address), known)
        for one in instructions
        if one.opcode in BRANCHES | ENDS | INDIRECT_BRANCHES
    }
    starts = {instructions[0].address}
    for address, exits in exits_of.items():
        starts.update(exits, [next_of[address]] if address in next_of else [])
    blocks: dict[int, list[Instruction]] = {}
    for one in instructions:
        if one.address in starts:
            block = blocks[one.address] = []
        block.append(one)
    successors = {}
    for start, block in blocks.items():
        last = block[-1].address
        fall_through = [next_of[last]] if last in next_of else []
        successors[start] = exits_of.get(last, fall_through)
    return FlowGraph(blocks, successors)


def find_gemm_loops(graph: FlowGraph) -> tuple[Code, ...]:
    """Return the innermost loops that hold tensor core instructions, by address.

    Such instructions outside those loops come from a loop that was unrolled: the straight stretch
    from the first to the last of them in a block counts as one.
    """
    predecessors = graph.predecessors
    everything = frozenset(graph.blocks)
    loop_of = {
        start: _innermost_loop(graph.successors, predecessors, start, everything)
        for start, block in graph.blocks.items()
        if any(one.opcode in TENSOR_OPCODES for one in block)
    }
    loops = set(loop_of.values()) - {frozenset()}
    innermost = {loop for loop in loops if not any(other < loop for other in loops)}
    found = [
        Code(tuple(one for start in sorted(loop) for one in graph.blocks[start]))
        for loop in innermost
    ]
    found += [
        _unrolled(graph.blocks[start]) for start, loop in loop_of.items() if loop not in innermost
    ]
    return tuple(sorted(found, key=lambda code: code.instructions[0].address))


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


def _innermost_loop(
    successors: dict[int, list[int]],
    predecessors: dict[int, list[int]],
    block: int,
    within: frozenset[int],
) -> frozenset[int]:
    """The smallest loop around a block, empty when it is in none.

    A loop is a strongly connected set of blocks; what is still connected once the block it is
    entered by is taken out is the next loop inside. Addresses play no part, so code that ptxas
    moved out of line stays in its loop.
    """
    loop = _reach(successors, block, within) & _reach(predecessors, block, within)
    if not loop:
        return loop
    entries = [b for b in loop if any(before not in loop for before in predecessors[b])]
    header = min(entries or loop)
    if header == block:
        return loop
    return _innermost_loop(successors, predecessors, block, loop - {header}) or loop


def _unrolled(block: list[Instruction]) -> Code:
    """From the first tensor core instruction of a block to the last."""
    places = [place for place, one in enumerate(block) if one.opcode in TENSOR_OPCODES]
    return Code(tuple(block[places[0] : places[-1] + 1]))


def _reach(edges: dict[int, list[int]], start: int, within: frozenset[int]) -> frozenset[int]:
    """Blocks that one step or more along the edges lead to without leaving a set."""
    reached: set[int] = set()
    ahead = [start]
    while ahead:
        new = [b for b in edges[ahead.pop()] if b in within and b not in reached]
        reached.update(new)
        ahead.extend(new)
    return frozenset(reached)


def _exits(
    one: Instruction, labels: dict[str, int], following: int | None, known: set[int]
) -> list[int]:
    """Where a branch or an exit may lead."""
    if one.opcode in INDIRECT_BRANCHES:
        raise ValueError(f"loops cannot be found: a branch to a computed address, {one}")
    is_conditional = one.is_guarded or (one.opcode in BRANCHES and "," in one.text)
    exits = [following] if is_conditional and following is not None else []
    if one.opcode in ENDS:
        return exits
    target = TARGET.search(one.text)
    address = target and (int(target[1], 16) if target[1] else labels.get(target[2]))
    if address not in known:
        raise ValueError(f"loops cannot be found: a branch out of the function, {one}")
    return [*exits, address]


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _run_tool(name: str, *arguments: str) -> str:
    done = subprocess.run([find_tool(name), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"cubin must be readable by {name}, which said: {done.stderr.strip()}")
    return done.stdout
