"""The records a caller hands in and gets back."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from megakernel.checks.tensors import (
    check_bias,
    check_like,
    check_positive,
    check_seed,
    check_shape,
    check_tensor,
    check_weight,
)
from megakernel.config import LayerShape
from megakernel.plan.rules import ACTIVATIONS, SCORES, ExpertRule, GateRule

MAX_EXPERTS = 1024


@dataclass(frozen=True, eq=False)
class SharedExpert:
    """The expert that serves every token beside the routed ones, of its own width J.

    It has the activation of the routed experts. Inside the launch it is cut into slices as wide as
    they are.

    Attributes:
        gate_JH: [J, H], contiguous; None if the routed experts have no gate.
        up_JH: [J, H], contiguous.
        down_HJ: [H, J], contiguous.
        token_gate_1H: [1, H]; weighs the expert with sigmoid(token_gate · x), as Qwen2-MoE does.
            None for weight 1.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """

    gate_JH: Tensor | None
    up_JH: Tensor
    down_HJ: Tensor
    token_gate_1H: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that the tensors belong together."""
        check_tensor("up_JH", self.up_JH, 2)
        width, hidden = self.up_JH.shape
        if width < 1:
            raise ValueError(f"up_JH must not be empty, got {tuple(self.up_JH.shape)}")
        shapes = {
            "gate_JH": (width, hidden),
            "down_HJ": (hidden, width),
            "token_gate_1H": (1, hidden),
        }
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None:
                check_tensor(name, tensor, 2)
                check_shape(name, tensor, shape)
                check_like(name, tensor, "up_JH", self.up_JH)


@dataclass(frozen=True, eq=False)
class Experts:
    """Weights of all experts, read in place, in the layout of Hugging Face transformers.

    expert(x) = down · (activation(gate · x) * (up · x)), or down · activation(up · x) without a
    gate; products have their bias added.

    Weights may also lie with their last two axes swapped in memory, as gpt-oss has them: say
    ``transposed`` and pass the views ``weight_EH2I.mT``, which costs nothing.

    ===================== =======================================================================
    model                 experts
    ===================== =======================================================================
    Mixtral, Qwen, GLM4   ``Experts(gate_up_E2IH, down_EHI)``
    gpt-oss               ``Experts(gate_up_EH2I.mT, down_EIH.mT, gate_up_bias_E2I, down_bias_EH,
                          "clamped_swiglu", interleaved=True, transposed=True)``
    Nemotron-H            ``Experts(up_EIH, down_EHI, activation="relu2", has_gate=False)``
    ===================== =======================================================================

    Attributes:
        gate_up_E2IH: [E, 2I, H], gate rows first, then up rows; contiguous unless ``transposed``.
            [E, I, H] up rows alone without a gate.
        down_EHI: [E, H, I], same dtype and device; contiguous unless ``transposed``.
        gate_up_bias_E2I: [E, 2I] float, in the order of the rows; [E, I] without a gate.
        down_bias_EH: [E, H] float; it is weighted with its expert.
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2" (relu squared) or
            "clamped_swiglu", gpt-oss's (up + 1) * gate * sigmoid(1.702 * gate) with gate at most
            ``limit`` and up within ±``limit``.
        limit: used by "clamped_swiglu".
        has_gate: whether there are gate rows.
        interleaved: whether gate and up rows alternate, gate row first.
        shared: the expert that serves every token, if there is one.
        transposed: whether both weights are ``mT`` of contiguous tensors.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """

    gate_up_E2IH: Tensor
    down_EHI: Tensor
    gate_up_bias_E2I: Tensor | None = None
    down_bias_EH: Tensor | None = None
    activation: str = "silu"
    limit: float = 7.0
    has_gate: bool = True
    interleaved: bool = False
    shared: SharedExpert | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        """Check that the tensors belong together."""
        check_weight("gate_up_E2IH", self.gate_up_E2IH, self.transposed)
        check_weight("down_EHI", self.down_EHI, self.transposed)
        num_experts, hidden, intermediate = self.down_EHI.shape
        if min(self.down_EHI.shape) < 1:
            raise ValueError(f"down_EHI must not be empty, got {tuple(self.down_EHI.shape)}")
        if num_experts > MAX_EXPERTS:
            raise ValueError(
                f"down_EHI must hold at most {MAX_EXPERTS} experts, got {num_experts}"
            )
        self._check_kind()
        rows = intermediate * (2 if self.has_gate else 1)
        check_shape("gate_up_E2IH", self.gate_up_E2IH, (num_experts, rows, hidden))
        check_like("gate_up_E2IH", self.gate_up_E2IH, "down_EHI", self.down_EHI)
        check_bias("gate_up_bias_E2I", self.gate_up_bias_E2I, (num_experts, rows), self.down_EHI)
        check_bias("down_bias_EH", self.down_bias_EH, (num_experts, hidden), self.down_EHI)

        if self.shared is not None:
            self._check_shared(self.shared)

    def _check_shared(self, shared: SharedExpert) -> None:
        if (shared.gate_JH is not None) != self.has_gate:
            raise ValueError(
                f"gate_JH must be given exactly if has_gate, which is {self.has_gate}, "
                f"got {shared.gate_JH if shared.gate_JH is None else tuple(shared.gate_JH.shape)}"
            )
        check_shape("up_JH", shared.up_JH, (len(shared.up_JH), self.down_EHI.shape[1]))
        check_like("up_JH", shared.up_JH, "down_EHI", self.down_EHI)

    def _check_kind(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, got {self.activation!r}")
        if not self.limit > 0:
            raise ValueError(f"limit must be positive, got {self.limit!r}")
        if not self.has_gate and (self.interleaved or self.activation == "clamped_swiglu"):
            raise ValueError(
                "has_gate must be True for interleaved rows and for 'clamped_swiglu', got False"
            )

    @property
    def num_experts(self) -> int:
        """E."""
        return self.down_EHI.shape[0]

    def layer_shape(self, top_k: int) -> LayerShape:
        """Return the sizes a config is chosen for."""
        num_experts, hidden, intermediate = self.down_EHI.shape
        return LayerShape(num_experts, top_k, hidden, intermediate)

    @property
    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        """Those of FFN1 and of FFN2."""
        return self.gate_up_bias_E2I, self.down_bias_EH

    @property
    def rule(self) -> ExpertRule:
        """What the compiler must know."""
        return ExpertRule(
            self.activation, float(self.limit), bool(self.has_gate), bool(self.interleaved),
            not self.gate_up_E2IH.is_contiguous(), not self.down_EHI.is_contiguous(),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Router:
    """How logits become choices and weights.

    ============================ ===============================================================
    model                        router
    ============================ ===============================================================
    Mixtral                      ``Router(2)``
    Qwen2/3-MoE, OLMoE           ``Router(8, renormalize=norm_topk_prob)``
    gpt-oss                      ``Router(4, bias_E=bias)``
    DeepSeek-V3, GLM4-MoE, JoyAI ``Router(8, "sigmoid", norm_topk_prob, scale=2.5,
                                 correction_bias_E=bias, num_groups=8, top_groups=4)``
    Switch                       ``Router(1, renormalize=False, capacity=c)``
    GShard                       ``Router(2, capacity=c, random_second_seed=step)``
    ============================ ===============================================================

    Attributes:
        top_k: experts per token, at least 1.
        score: "softmax" over all experts, or "sigmoid", in float32.
        renormalize: whether a token's weights are divided by their sum.
        scale: factor on every weight, after that.
        bias_E: [E] float, added to the logits.
        correction_bias_E: [E] float, added to the scores for choosing only (arXiv 2408.15664).
        num_groups: groups of consecutive experts; divides E.
        top_groups: groups a token chooses from: those whose two best scores have the largest sum
            (arXiv 2412.19437).
        capacity: most tokens an expert takes; later tokens lose that choice, which then has id -1
            and weight 0 (arXiv 2101.03961). None for no limit.
        random_second_seed: in [0, 2^31); with top_k = 2, the second expert serves with probability
            min(1, 2 · its weight) (arXiv 2006.16668). The draw of token t depends on the seed
            and t alone. None to serve it always.

    Correction, groups, capacity and draws are for choosing: under replay they do nothing.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """

    top_k: int
    score: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    bias_E: Tensor | None = None
    correction_bias_E: Tensor | None = None
    num_groups: int = 1
    top_groups: int = 1
    capacity: int | None = None
    random_second_seed: int | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        check_positive("top_k", self.top_k)
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {SCORES}, got {self.score!r}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {self.scale!r}")
        check_positive("num_groups", self.num_groups)
        check_positive("top_groups", self.top_groups)
        if self.top_groups > self.num_groups:
            raise ValueError(
                f"top_groups must be at most num_groups={self.num_groups}, got {self.top_groups}"
            )
        for name in ("bias_E", "correction_bias_E"):
            if getattr(self, name) is not None:
                check_tensor(name, getattr(self, name), 1)
        if self.capacity is not None:
            check_positive("capacity", self.capacity)
        if self.random_second_seed is not None:
            check_seed("random_second_seed", self.random_second_seed)
            if self.top_k != 2:
                raise ValueError(f"top_k must be 2 with random_second_seed, got {self.top_k}")

    @property
    def rule(self) -> GateRule:
        """What the compiler must know."""
        return GateRule(
            self.score, bool(self.renormalize), float(self.scale), self.num_groups,
            self.top_groups, self.capacity is not None, self.random_second_seed is not None,
        )  # fmt: skip


class MoEOutput(NamedTuple):
    """What the layer returns.

    ``expert_of_TK`` holds logical ids, best first, or the forced ids under replay; -1 is a choice
    without an expert. ``gate_TK`` is fp32, 0 where the id is -1. ``logits_TE`` is fp32, with the
    router's bias. ``load_E`` is int32, choices per expert before any is dropped over capacity.
    """

    y_TH: Tensor
    expert_of_TK: Tensor
    gate_TK: Tensor
    logits_TE: Tensor
    load_E: Tensor
