"""One expert: the kinds of feed-forward network that real models use."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu


@dataclass(frozen=True)
class ExpertKind:
    """What an expert computes between its two products.

    Attributes:
        activation: a key of ACTIVATIONS, or "clamped_swiglu".
        has_gate: whether FFN1 has gate rows beside its up rows.
        interleaved: whether gate and up rows alternate, gate row first, or gate rows come first.
        limit: of "clamped_swiglu".
    """

    activation: str = "silu"
    has_gate: bool = True
    interleaved: bool = False
    limit: float = 7.0


SWIGLU = ExpertKind()
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
}


def expert_ffn(
    x_TH: Tensor,
    gate_up_2IH: Tensor,
    down_HI: Tensor,
    gate_up_bias_2I: Tensor | None = None,
    down_bias_H: Tensor | None = None,
    kind: ExpertKind = SWIGLU,
) -> Tensor:
    """Apply one expert: down · (activation(gate · x) * (up · x)), each product plus its bias.

    Without a gate: down · activation(up · x). gpt-oss ("clamped_swiglu"): down · ((up + 1) * gate
    * sigmoid(1.702 gate)), gate clamped above at the limit and up to ±limit.
    """
    sums_T2I = x_TH @ gate_up_2IH.T
    if gate_up_bias_2I is not None:
        sums_T2I = sums_T2I + gate_up_bias_2I.to(x_TH.dtype)
    y_TH = between_products(sums_T2I, kind) @ down_HI.T
    return y_TH if down_bias_H is None else y_TH + down_bias_H.to(x_TH.dtype)


def between_products(sums_T2I: Tensor, kind: ExpertKind) -> Tensor:
    """Return h of shape [T, I] from the sums of FFN1, [T, I] without a gate."""
    if not kind.has_gate:
        return ACTIVATIONS[kind.activation](sums_T2I)
    if kind.interleaved:
        gate_TI, up_TI = sums_T2I[:, ::2], sums_T2I[:, 1::2]
    else:
        gate_TI, up_TI = sums_T2I.chunk(2, dim=-1)
    if kind.activation != "clamped_swiglu":
        return ACTIVATIONS[kind.activation](gate_TI) * up_TI
    gate_TI = gate_TI.clamp(max=kind.limit)
    up_TI = up_TI.clamp(-kind.limit, kind.limit)
    return (up_TI + 1) * (gate_TI * torch.sigmoid(1.702 * gate_TI))


def shared_ffn(
    x_TH: Tensor,
    gate_JH: Tensor | None,
    up_JH: Tensor,
    down_HJ: Tensor,
    token_gate_1H: Tensor | None = None,
    kind: ExpertKind = SWIGLU,
) -> Tensor:
    """Apply the expert that serves every token, of width J.

    Args:
        x_TH: tokens.
        gate_JH: None if ``kind`` has no gate.
        up_JH: up projection.
        down_HJ: down projection.
        token_gate_1H: weighs the expert with sigmoid(token_gate · x) (Qwen2-MoE); None for 1.
        kind: the rows are never interleaved here.
    """
    rows = up_JH if gate_JH is None else torch.cat([gate_JH, up_JH])
    plain = ExpertKind(kind.activation, kind.has_gate, False, kind.limit)
    y_TH = expert_ffn(x_TH, rows, down_HJ, kind=plain)
    return y_TH if token_gate_1H is None else torch.sigmoid(x_TH @ token_gate_1H.T) * y_TH
