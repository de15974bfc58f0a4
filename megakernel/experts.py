"""What experts compute, and their weights."""

from dataclasses import dataclass, field

from torch import Tensor

from megakernel.checks.tensors import (
    check_bias,
    check_like,
    check_main_grad,
    check_shape,
    check_tensor,
)
from megakernel.config import LayerShape
from megakernel.formats import Dense
from megakernel.plan.rules import ACTIVATIONS, ExpertRule

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


@dataclass(eq=False)
class MainGrad:
    """Float32 buffers that the gradients of expert weights go into, instead of ``.grad``.

    The backward writes each element once, with no buffer in between: over what was there while
    ``grad_added_to_main_grad`` is False, which it then sets, and added to it afterwards. Set it
    back to False for each step of the optimizer.

    Attributes:
        gate_up_E2IH, down_EHI: float32, with shape and strides of the weights.
        grad_added_to_main_grad: whether a backward has written to the buffers.
    """

    gate_up_E2IH: Tensor
    down_EHI: Tensor
    grad_added_to_main_grad: bool = False


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
        main_grad: where the gradients of both weights go; None for ``.grad``, in their own dtype.

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
    main_grad: MainGrad | None = None
    rule: ExpertRule = field(init=False, repr=False)  # what the compiler must know

    def __post_init__(self) -> None:
        """Check that the tensors belong together."""
        self.gate_up.check("gate_up_E2IH")
        self.down.check("down_EHI")
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
        if self.main_grad is not None:
            self._check_main_grad(self.main_grad)
        rule = ExpertRule(
            self.activation, float(self.limit), bool(self.has_gate), bool(self.interleaved)
        )
        object.__setattr__(self, "rule", rule)

    def _check_shared(self, shared: SharedExpert) -> None:
        if (shared.gate_JH is not None) != self.has_gate:
            raise ValueError(
                f"gate_JH must be given exactly if has_gate, which is {self.has_gate}, "
                f"got {shared.gate_JH if shared.gate_JH is None else tuple(shared.gate_JH.shape)}"
            )
        check_shape("up_JH", shared.up_JH, (len(shared.up_JH), self.down_EHI.shape[1]))
        check_like("up_JH", shared.up_JH, "down_EHI", self.down_EHI)

    def _check_main_grad(self, main_grad: MainGrad) -> None:
        for name in ("gate_up_E2IH", "down_EHI"):
            buffer, weight = getattr(main_grad, name), getattr(self, name)
            check_main_grad(f"main_grad.{name}", buffer, weight)

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
    def gate_up(self) -> Dense:
        """The first weight in its format."""
        return Dense(self.gate_up_E2IH, self.transposed)

    @property
    def down(self) -> Dense:
        """The second weight in its format."""
        return Dense(self.down_EHI, self.transposed)
