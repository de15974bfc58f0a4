"""The instructions of a compiled kernel, as a disassembler prints them."""

import re
from collections.abc import Set
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

INSTRUCTION_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
LABEL_LINE = re.compile(r"([.$\w]+):\s*$")
SOURCE_LINE = re.compile(r'\s*//## File "(.+?)", line (\d+)')


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
        return self.count({"HGMMA"})

    @property
    def mma(self) -> int:
        """Warp tensor core instructions (HMMA): what tiles of fewer than 64 rows get."""
        return self.count({"HMMA"})

    @property
    def async_16_byte_loads(self) -> int:
        """Global-to-shared copies of 16 bytes a thread (LDGSTS)."""
        return sum(one.opcode == "LDGSTS" and "128" in one.mnemonic for one in self.instructions)

    @property
    def tma_loads(self) -> int:
        return self.count({"UBLKCP", "UTMALDG"})

    @property
    def local_ops(self) -> tuple[Instruction, ...]:
        """Loads and stores of local memory, which is where spilled registers live."""
        return tuple(one for one in self.instructions if one.opcode in ("LDL", "STL"))

    def count(self, opcodes: Set[str]) -> int:
        """Instructions with one of some opcodes."""
        return sum(one.opcode in opcodes for one in self.instructions)


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
