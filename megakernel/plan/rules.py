"""What a router and an expert compute, as the compiler must know it."""

from dataclasses import astuple, dataclass

SCORES = ("softmax", "sigmoid")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu")


@dataclass(frozen=True)
class GateRule:
    """How logits become choices and weights; the fields are those of :class:`layer.Router`.

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

    def encode(self) -> list[float]:
        """Return the fields as numbers (a custom op takes no dataclass)."""
        return [float(SCORES.index(self.score)), *map(float, astuple(self)[1:])]

    @classmethod
    def decode(cls, values: list[float]) -> "GateRule":
        """Invert :meth:`encode`."""
        score, renormalize, scale, num_groups, top_groups, capped, random_second = values
        return cls(
            SCORES[int(score)], bool(renormalize), scale, int(num_groups), int(top_groups),
            bool(capped), bool(random_second),
        )  # fmt: skip


@dataclass(frozen=True)
class ExpertRule:
    """What an expert computes and how its weights lie; see :class:`layer.Experts`."""

    activation: str = "silu"
    limit: float = 7.0
    has_gate: bool = True
    interleaved: bool = False
    gate_up_transposed: bool = False
    down_transposed: bool = False

    @property
    def stacked(self) -> int:
        """Matrices of I rows that lie one after the other: gate and up, or one."""
        return 2 if self.has_gate and not self.interleaved else 1

    @property
    def rows_per_column(self) -> int:
        """Rows of such a matrix that make one column of h."""
        return 2 if self.interleaved else 1

    def encode(self) -> list[float]:
        """Return the fields as numbers (a custom op takes no dataclass)."""
        return [float(ACTIVATIONS.index(self.activation)), *map(float, astuple(self)[1:])]

    @classmethod
    def decode(cls, values: list[float]) -> "ExpertRule":
        """Invert :meth:`encode`."""
        activation, limit, *flags = values
        return cls(ACTIVATIONS[int(activation)], limit, *map(bool, flags))
