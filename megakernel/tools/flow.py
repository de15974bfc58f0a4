"""Where a kernel's instructions may go next, and the loops that do its matrix products."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise

from megakernel.tools.sass import Code, Instruction

TENSOR_OPCODES = frozenset({"HGMMA", "HMMA"})
# Products in float32 have no instruction of their own: a loop of so many FFMA does one, if it
# reads shared memory. The combine's sums do not.
FMA_OPCODES, LEAST_FMA, SHARED_LOAD = frozenset({"FFMA"}), 32, frozenset({"LDS"})
# Opcodes that end a straight run of code, without their modifiers.
BRANCHES = {"BRA", "JMP"}
ENDS = {"EXIT", "RET"}
INDIRECT_BRANCHES = {"BRX", "BRXU", "JMX", "JMXU"}
TARGET = re.compile(r"(?:0x([0-9a-f]+)|`\((\S+)\))$")


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


@dataclass(frozen=True)
class GemmLoop(Code):
    """A loop that does matrix products, and how far its first product is from the loop around it.

    All counts are of instructions on the shortest way.

    Attributes:
        before: from the head of the outermost loop, or of the kernel, to the first product.
        per_step: once round the loop; all of a stretch that was unrolled.
        after: from the last product back to that head; None if there is no loop around.
    """

    before: int
    per_step: int
    after: int | None

    @property
    def is_serial(self) -> bool:
        """Whether each product waits for the one before, as ptxas has it where registers lack."""
        waits = sum("WARPGROUP.DEPBAR" in one.text for one in self.instructions)
        return waits >= self.wgmma > 1


def build_flow_graph(
    instructions: list[Instruction],
    labels: Mapping[str, int],
    tables: Mapping[int, tuple[int, ...]] = {},
) -> FlowGraph:
    """Cut a function into blocks and link them.

    A call returns to the next instruction, and BSYNC goes on to the next one (ptxas puts the
    meeting point of a BSSY right behind its BSYNC), so only branches and exits end a block.

    Args:
        instructions, labels: of :func:`megakernel.tools.sass.parse_sass`.
        tables: of :func:`megakernel.tools.jumps.read_jump_tables`.

    Raises:
        ValueError: a branch leads out of the function, or to an address that no table names.
    """
    next_of = {one.address: later.address for one, later in pairwise(instructions)}
    known = {one.address for one in instructions}
    exits_of = {
        one.address: _exits(one, labels, tables, next_of.get(one.address), known)
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


def find_gemm_loops(graph: FlowGraph) -> tuple[GemmLoop, ...]:
    """Return the innermost loops that hold tensor core instructions, by address.

    Such instructions outside those loops come from a loop that was unrolled: the straight stretch
    from the first to the last of them in a block counts as one. A kernel without any multiplies
    in float32: then the loops of many FFMA that read shared memory are meant.
    """
    if any(one.opcode in TENSOR_OPCODES for block in graph.blocks.values() for one in block):
        return _loops_with(graph, TENSOR_OPCODES)
    loops = _loops_with(graph, FMA_OPCODES)
    return tuple(
        loop for loop in loops if loop.count(FMA_OPCODES) >= LEAST_FMA and loop.count(SHARED_LOAD)
    )


def _loops_with(graph: FlowGraph, opcodes: frozenset[str]) -> tuple[GemmLoop, ...]:
    predecessors = graph.predecessors
    everything = frozenset(graph.blocks)
    loop_of = {
        start: _innermost_loop(graph.successors, predecessors, start, everything)
        for start, block in graph.blocks.items()
        if any(one.opcode in opcodes for one in block)
    }
    loops = set(loop_of.values()) - {frozenset()}
    innermost = {loop for loop in loops if not any(other < loop for other in loops)}
    found = [_measure(graph, predecessors, loop, opcodes) for loop in innermost]
    found += [
        _measure(graph, predecessors, frozenset({start}), opcodes)
        for start, loop in loop_of.items()
        if loop not in innermost
    ]
    return tuple(sorted(found, key=lambda code: code.instructions[0].address))


def _measure(
    graph: FlowGraph,
    predecessors: dict[int, list[int]],
    loop: frozenset[int],
    opcodes: frozenset[str],
) -> GemmLoop:
    """Cut out a loop, or the products of one block that is in none, and measure the ways."""
    first = next(s for s in sorted(loop) if any(o.opcode in opcodes for o in graph.blocks[s]))
    places = [i for i, one in enumerate(graph.blocks[first]) if one.opcode in opcodes]
    everything = frozenset(graph.blocks)
    around = _reach(graph.successors, first, everything) & _reach(predecessors, first, everything)
    once_round = _distance(graph, graph.successors[first], first, loop)
    instructions = tuple(one for start in sorted(loop) for one in graph.blocks[start])
    per_step = len(graph.blocks[first]) + (once_round or 0)
    if once_round is None:  # in no loop: only what lies between the products
        instructions = instructions[places[0] : places[-1] + 1]
        per_step = len(instructions)
    head = _entry(around, predecessors) if around > loop else min(graph.blocks)
    to_first = _distance(graph, [head], first, everything)
    back = _distance(graph, graph.successors[first], head, around)
    assert to_first is not None, "the head leads to every product"
    rest = len(graph.blocks[first]) - places[-1] - 1
    return GemmLoop(
        instructions, to_first + places[0], per_step, None if back is None else rest + back
    )


def _entry(loop: frozenset[int], predecessors: dict[int, list[int]]) -> int:
    """The first block of a loop that is entered from outside."""
    entries = [b for b in loop if any(before not in loop for before in predecessors[b])]
    return min(entries or loop)


def _distance(
    graph: FlowGraph, starts: Iterable[int], goal: int, within: frozenset[int]
) -> int | None:
    """Instructions on the shortest way from one of some blocks to another; None without a way."""
    ahead = sorted((0, start) for start in starts if start in within)
    done: set[int] = set()
    while ahead:
        passed, block = heappop(ahead)
        if block == goal:
            return passed
        if block in done:
            continue
        done.add(block)
        for following in graph.successors[block]:
            if following in within:
                heappush(ahead, (passed + len(graph.blocks[block]), following))
    return None


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
    header = _entry(loop, predecessors)
    if header == block:
        return loop
    return _innermost_loop(successors, predecessors, block, loop - {header}) or loop


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
    one: Instruction,
    labels: Mapping[str, int],
    tables: Mapping[int, tuple[int, ...]],
    following: int | None,
    known: set[int],
) -> list[int]:
    """Where a branch or an exit may lead."""
    if one.opcode in INDIRECT_BRANCHES and one.address not in tables:
        raise ValueError(f"loops cannot be found: a branch to a computed address, {one}")
    is_conditional = one.is_guarded or (one.opcode in BRANCHES and "," in one.text)
    exits = [following] if is_conditional and following is not None else []
    if one.opcode in ENDS:
        return exits
    targets = tables.get(one.address) or (_target(one, labels),)
    if not known.issuperset(targets):
        raise ValueError(f"loops cannot be found: a branch out of the function, {one}")
    return [*exits, *targets]


def _target(one: Instruction, labels: Mapping[str, int]) -> int:
    """The address that a branch names, -1 if it is no instruction's."""
    target = TARGET.search(one.text)
    if target is None:
        return -1
    return int(target[1], 16) if target[1] else labels.get(target[2], -1)
