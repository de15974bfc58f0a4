"""Where the branches to a computed address may go: the jump tables of a cubin."""

from collections.abc import Iterator
from struct import Struct, unpack_from
from typing import NamedTuple

# Of ELF: where the header says that section headers are, and one of those.
HEADER_OFFSET, NUM_HEADERS = Struct("<Q"), Struct("<HH")
SECTION = Struct("<IIQQQQIIQQ")
HEADER_OFFSET_AT, NUM_HEADERS_AT = 0x28, 0x3C
# Of a kernel's .nv.info: attributes, of which some have a size and as many bytes.
INFO = ".nv.info."
ATTRIBUTE = Struct("<BBH")
HAS_BYTES = 4
INDIRECT_BRANCH_TARGETS = 0x34  # ptxas's copy of each table that .nv.constant2 holds
TABLE = Struct("<III")  # the branch, nothing, how many targets


class Section(NamedTuple):
    """A named piece of an ELF image."""

    name: str
    content: bytes


def read_jump_tables(cubin: bytes) -> dict[int, tuple[int, ...]]:
    """Return the targets of each branch to a computed address, both as offsets in the kernel.

    Args:
        cubin: the ELF image of one kernel.
    """
    return {
        branch: targets
        for section in _sections(cubin)
        if section.name.startswith(INFO)
        for content in _attributes(section.content, INDIRECT_BRANCH_TARGETS)
        for branch, targets in _tables(content)
    }


def _sections(image: bytes) -> Iterator[Section]:
    (start,) = HEADER_OFFSET.unpack_from(image, HEADER_OFFSET_AT)
    count, of_names = NUM_HEADERS.unpack_from(image, NUM_HEADERS_AT)
    headers = [SECTION.unpack_from(image, start + SECTION.size * place) for place in range(count)]
    names_at = headers[of_names][4]
    for name_at, _, _, _, offset, size, *_ in headers:
        name = image[names_at + name_at :].split(b"\0", 1)[0].decode()
        yield Section(name, image[offset : offset + size])


def _attributes(info: bytes, wanted: int) -> Iterator[bytes]:
    place = 0
    while place < len(info):
        form, attribute, size = ATTRIBUTE.unpack_from(info, place)
        place += ATTRIBUTE.size
        if form != HAS_BYTES:  # the size is the value
            continue
        if attribute == wanted:
            yield info[place : place + size]
        place += size


def _tables(content: bytes) -> Iterator[tuple[int, tuple[int, ...]]]:
    place = 0
    while place < len(content):
        branch, _, count = TABLE.unpack_from(content, place)
        place += TABLE.size
        yield branch, unpack_from(f"<{count}I", content, place)
        place += 4 * count
