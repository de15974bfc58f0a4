"""The records a caller hands in and gets back."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from megakernel.tensors import check_like, check_shape, check_tensor

MAX_EXPERTS = 1024


@dataclass(frozen=True, eq=False)
class Experts:
    """Weights of all experts, in the layout of Hugging Face transformers.

    Attributes:
        gate_up_E2IH: [E, 2I, H], gate rows first, then up rows; contiguous.
        down_EHI: [E, H, I], same dtype and device; contiguous.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """

    gate_up_E2IH: Tensor
    down_EHI: Tensor

    def __post_init__(self) -> None:
        """Check that the two tensors belong together."""
        check_tensor("gate_up_E2IH", self.gate_up_E2IH, 3)
        check_tensor("down_EHI", self.down_EHI, 3)
        num_experts, hidden, intermediate = self.down_EHI.shape
        if min(self.down_EHI.shape) < 1:
            raise ValueError(f"down_EHI must not be empty, got {tuple(self.down_EHI.shape)}")
        if num_experts > MAX_EXPERTS:
            raise ValueError(
                f"down_EHI must hold at most {MAX_EXPERTS} experts, got {num_experts}"
            )
        check_shape("gate_up_E2IH", self.gate_up_E2IH, (num_experts, 2 * intermediate, hidden))
        check_like("gate_up_E2IH", self.gate_up_E2IH, "down_EHI", self.down_EHI)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.down_EHI.shape[0]


@dataclass(frozen=True)
class Router:
    """How logits become choices.

    Attributes:
        top_k: experts per token, at least 1.
        score: "softmax", over all experts in float32.
        renormalize: whether a token's weights sum to one.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """

    top_k: int
    score: str = "softmax"
    renormalize: bool = True

    def __post_init__(self) -> None:
        """Check the fields."""
        if not isinstance(self.top_k, int) or self.top_k < 1:
            raise ValueError(f"top_k must be a positive integer, got {self.top_k!r}")
        if self.score != "softmax":
            raise ValueError(f"score must be 'softmax', got {self.score!r}")


class MoEOutput(NamedTuple):
    """What the layer returns.

    ``expert_of_TK`` holds logical ids, best first, or the forced ids under replay. ``gate_TK`` is
    fp32, 0 where the id is -1. ``logits_TE`` is fp32.
    """

    y_TH: Tensor
    expert_of_TK: Tensor
    gate_TK: Tensor
    logits_TE: Tensor
