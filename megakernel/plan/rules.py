"""What a router and an expert compute, and how a weight lies, as the compiler must know it."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

SCORES = ("softmax", "sigmoid")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu")


@dataclass(frozen=True)
class RouterRule:
    """How logits become choices and weights; the fields are those of ``router.Router``.

    ``capped`` and ``random_second`` say that a capacity or a seed is given; their values are
    arguments of the launch, so that they can change without compiling again.
    """

    score: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    capped: bool = False
    random_second: bool = False


@dataclass(frozen=True)
class ExpertRule:
    """What an expert computes; see ``experts.Experts``."""

    activation: str = "silu"
    limit: float = 7.0
    has_gate: bool = True
    interleaved: bool = False

    @property
    def stacked(self) -> int:
        """Matrices of I rows that lie one after the other: gate and up, or one."""
        return 2 if self.has_gate and not self.interleaved else 1

    @property
    def rows_per_column(self) -> int:
        """Rows of such a matrix that make one column of h."""
        return 2 if self.interleaved else 1


@dataclass(frozen=True)
class GradientRule:
    """Which gradients a backward launch is asked for, and what it has to work from.

    Attributes:
        x, router, router_bias, gate_up, down, gate_up_bias, down_bias, gates, shared_gate,
            shared_up, shared_down, token_gate: whether the gradient of each is asked for;
            ``gates`` of given weights alone.
        weighs: whether the router makes the weights, so that they lead on to its logits.
        token_gated: whether the shared expert has a token gate, which leads on to the tokens.
        recomputes: whether FFN1 is run again, since its sums were not kept.
    """

    x: bool = False
    router: bool = False
    router_bias: bool = False
    gate_up: bool = False
    down: bool = False
    gate_up_bias: bool = False
    down_bias: bool = False
    gates: bool = False
    shared_gate: bool = False
    shared_up: bool = False
    shared_down: bool = False
    token_gate: bool = False
    weighs: bool = False
    token_gated: bool = False
    recomputes: bool = False


@dataclass(frozen=True)
class WeightRule:
    """How the right side of a product lies in memory, and which part of it a task takes.

    An expert's weight is ``stacked`` matrices [height, width], the depth of the product along
    ``width``. Row r and column d of matrix s of expert e lie at::

        e · expert_stride + s · stack_stride + r · row_stride + d · column_stride

    Attributes:
        stacked: matrices of an expert: 2 for gate and up, else 1.
        height, width: of one matrix.
        block: rows of each matrix that one task takes.
        tile_rows: rows of the left side.
        expert_stride, stack_stride, row_stride, column_stride: elements.
        apart: whether the stacked matrices are tensors of their own, and ``stack_stride`` unused.
        most_rows, most_columns: of all experts together, where they are cut out of one matrix and
            the last may be short; 0 where none is.
        tma: whether the copy engine reads it.
    """

    stacked: int
    height: int
    width: int
    block: int
    tile_rows: int
    expert_stride: int
    stack_stride: int
    row_stride: int
    column_stride: int
    apart: bool = False
    most_rows: int = 0
    most_columns: int = 0
    tma: bool = False

    @classmethod
    @lru_cache(maxsize=256)  # asked for at every call
    def of_experts(
        cls,
        shape_SXY: tuple[int, int, int],
        block: int,
        tile_rows: int,
        transposed: bool,
        tma: bool,
    ) -> Self:
        """Return the rule of weights [E, stacked · height, width], or of ``mT`` of such in memory.

        Args:
            shape_SXY: (stacked, height, width).
            block: rows of each matrix that a task takes.
            tile_rows: rows of the left side.
            transposed: whether rows run fastest in memory.
            tma: whether the copy engine reads them.
        """
        stacked, height, width = shape_SXY
        strides = (height, 1, stacked * height) if transposed else (height * width, width, 1)
        return cls(stacked, height, width, block, tile_rows, stacked * height * width, *strides,
                   tma=tma)  # fmt: skip

    @property
    def transposed(self) -> bool:
        """Whether rows run fastest in memory."""
        return self.row_stride == 1 and self.column_stride != 1

    @property
    def columns(self) -> int:
        """Columns of the product that a task makes."""
        return self.stacked * self.block

    def of_tail(self, tile_rows: int) -> Self:
        """Return the rule of a lower tile, which reads through pointers.

        With a third and fourth loop that uses TMA, Triton 3.6 lays the loops' shared memory side
        by side instead of over one another, and the kernel would not fit.
        """
        return replace(self, tile_rows=tile_rows, tma=False)

    @property
    def acc_tile(self) -> tuple[int, int]:
        """[tile_rows, columns]"""
        return self.tile_rows, self.columns

    @property
    def stacked_halves(self) -> tuple[int, int, int]:
        """[tile_rows, gate or up, block]"""
        return self.tile_rows, 2, self.block

    @property
    def interleaved_halves(self) -> tuple[int, int, int]:
        """[tile_rows, half of block, gate or up]"""
        return self.tile_rows, self.block // 2, 2
