"""How a weight of experts lies in memory: its check, its rule for the compiler, its plain values.

A format answers four questions, here and nowhere else on the host: is the weight fit to be read
(``check``), what does the compiler know of it (``rule``), what is it in plain numbers
(``dequantise``, the oracle), and how many bytes has an expert. On the device, all weights are read
by ``device/weights.py``.
"""

from dataclasses import dataclass

from torch import Tensor

from megakernel.checks.tensors import check_contiguous, check_float
from megakernel.plan.rules import WeightRule

TMA_BYTES = 16  # what the copy engine wants bases and rows aligned to


@dataclass(frozen=True, eq=False)
class Dense:
    """Weights [E, X, Y] as plain floating numbers.

    Attributes:
        weight_EXY: float32, float16 or bfloat16; contiguous, or ``mT`` of such if transposed.
        transposed: whether X runs fastest in memory.
    """

    weight_EXY: Tensor
    transposed: bool = False

    def check(self, name: str) -> None:
        """Raise ValueError unless the weight is floating, has 3 axes and lies as announced."""
        weight = self.weight_EXY
        check_float(name, weight, 3)
        if not self.transposed:
            check_contiguous(name, weight)
        elif not weight.mT.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous after .mT when transposed, "
                f"got strides {weight.stride()}"
            )

    def rule(self, stacked: int, block: int, tile_rows: int) -> WeightRule:
        """Return what the compiler must know; see WeightRule for the arguments."""
        _, rows, width = self.weight_EXY.shape
        shape = (stacked, rows // stacked, width)
        upright = self.lies_upright
        return WeightRule.of_experts(shape, block, tile_rows, upright, self._fits_tma(stacked))

    @property
    def lies_upright(self) -> bool:
        """Whether X runs fastest: not so where a width of 1 makes both layouts one."""
        return self.transposed and not self.weight_EXY.is_contiguous()

    def _fits_tma(self, stacked: int) -> bool:
        _, rows, width = self.weight_EXY.shape
        row = rows // stacked if self.lies_upright else width
        row_bytes = row * self.weight_EXY.element_size()
        return row_bytes % TMA_BYTES == 0 and self.weight_EXY.data_ptr() % TMA_BYTES == 0

    def dequantise(self) -> Tensor:
        """Return the weight as [E, X, Y] numbers."""
        return self.weight_EXY

    @property
    def bytes_per_expert(self) -> int:
        """Bytes that one expert's weight takes."""
        return self.weight_EXY[0].numel() * self.weight_EXY.element_size()
