"""Which tensor a byte belongs to, and whether somebody filled it before the launch."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

POISON = 0xFF  # NaN in every float type, -1 in every integer


@dataclass
class Region:
    """The bytes of one tensor argument; ``unfilled`` if the launch has to write them first."""

    name: str
    tensor: Tensor
    unfilled: bool = False

    @property
    def start(self) -> int:
        """Address of the first byte."""
        return self.tensor.data_ptr()

    @property
    def end(self) -> int:
        """Address behind the last byte that an element can have."""
        last = sum(
            (size - 1) * stride
            for size, stride in zip(self.tensor.shape, self.tensor.stride(), strict=True)
        )
        return self.start + (last + 1) * self.tensor.element_size()

    def describe(self, address: int) -> str:
        """Name an element, as ``y_TH[3, 5]``."""
        offset = (address - self.start) // self.tensor.element_size()
        if not self.tensor.is_contiguous():
            return f"{self.name}, element {offset} in memory"
        index = np.unravel_index(offset, tuple(self.tensor.shape) or (1,))
        return f"{self.name}[{', '.join(str(int(i)) for i in index)}]"


def regions_of(name: str, argument: Any) -> Iterator[Region]:
    """Yield every tensor in a kernel argument, named by the path that leads to it."""
    if isinstance(argument, TensorDescriptor):
        yield from regions_of(name, argument.base)
    elif isinstance(argument, Tensor):
        if argument.numel():
            yield Region(name, argument)
    elif isinstance(argument, tuple):
        fields = getattr(argument, "_fields", range(len(argument)))
        for field, part in zip(fields, argument, strict=True):
            yield from regions_of(f"{name}.{field}", part)


class Memory:
    """All bytes a launch may touch, numbered without gaps in units of ``unit_bytes``."""

    def __init__(self, regions: list[Region], unit_bytes: int) -> None:
        """Sort the regions; of several names for the same bytes the first stays."""
        self.unit_bytes = unit_bytes
        self.regions: list[Region] = []
        for region in sorted(regions, key=lambda region: (region.start, -region.end)):
            if not self.regions or region.start >= self.regions[-1].end:
                self.regions.append(region)
            else:
                last = self.regions[-1]
                assert region.end <= last.end, f"{region.name} and {last.name} overlap in part"
        self.starts = np.array([region.start for region in self.regions], np.int64)
        self.ends = np.array([region.end for region in self.regions], np.int64)
        units = -(-(self.ends - self.starts) // unit_bytes)
        self.firsts = np.concatenate([[0], np.cumsum(units)])

    @property
    def num_units(self) -> int:
        """How many units there are."""
        return int(self.firsts[-1])

    def outside(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Return the addresses of elements of ``size`` bytes that lie in no tensor."""
        region = np.searchsorted(self.starts, addresses, "right") - 1
        return addresses[(region < 0) | (addresses + size > self.ends[region])]

    def units(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Return the units that elements of ``size`` bytes cover."""
        region = np.searchsorted(self.starts, addresses, "right") - 1
        first = self.firsts[region] + (addresses - self.starts[region]) // self.unit_bytes
        return (first[:, None] + np.arange(size // self.unit_bytes)).ravel()

    def region_of(self, unit: int) -> Region:
        """Return the tensor a unit belongs to."""
        return self.regions[int(np.searchsorted(self.firsts, unit, "right")) - 1]

    def describe(self, unit: int) -> str:
        """Name the element a unit belongs to."""
        region = self.region_of(unit)
        first = int(self.firsts[self.regions.index(region)])
        return region.describe(region.start + (unit - first) * self.unit_bytes)

    def spans(self) -> Iterator[tuple[Region, int, int]]:
        """Yield each tensor with its first unit and the one behind its last."""
        firsts = self.firsts.tolist()
        yield from zip(self.regions, firsts[:-1], firsts[1:], strict=True)

    def unfilled(self) -> np.ndarray:
        """Return for each unit whether the launch has to write it before it may be read."""
        counts = np.diff(self.firsts)
        return np.repeat([region.unfilled for region in self.regions], counts)


@contextmanager
def poisoned_allocations() -> Iterator[list[Tensor]]:
    """Fill what is allocated without a value, and list it: only the launch can fill it."""
    made: list[Tensor] = []

    def poisoning(allocate: Any) -> Any:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            tensor.untyped_storage().fill_(POISON)
            made.append(tensor)
            return tensor

        return allocate_poisoned

    with ExitStack() as patches:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch = mock.patch.object(owner, name, poisoning(getattr(owner, name)))
            patches.enter_context(patch)
        yield made
