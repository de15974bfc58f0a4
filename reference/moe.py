"""What the layer computes: y[t] = sum over k of gate[t, k] · expert(x[t], id[t, k])."""

import torch
from torch import Tensor

from reference.experts import SWIGLU, ExpertKind, expert_ffn
from reference.router import route


def moe_by_token(
    x_TH: Tensor,
    expert_of_TK: Tensor,
    gate_TK: Tensor,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    *,
    gate_up_bias_E2I: Tensor | None = None,
    down_bias_EH: Tensor | None = None,
    kind: ExpertKind = SWIGLU,
) -> Tensor:
    """Compute the layer one assignment at a time in float64: slow, and true by reading.

    Args:
        x_TH: tokens, any floating dtype.
        expert_of_TK: integer ids in [0, E); -1 is skipped.
        gate_TK: weight of each choice.
        gate_up_E2IH: gate and up rows as ``kind`` says.
        down_EHI: down projection.
        gate_up_bias_E2I: added to the first product.
        down_bias_EH: added to the second product, so it is weighted with its expert.
        kind: what lies between the products.

    Returns:
        y_TH: float64.
    """
    x_TH, gate_up_E2IH, down_EHI = x_TH.double(), gate_up_E2IH.double(), down_EHI.double()
    y_TH = torch.zeros_like(x_TH)
    for token, (experts, gates) in enumerate(
        zip(expert_of_TK.tolist(), gate_TK.double().tolist(), strict=True)
    ):
        for expert, gate in zip(experts, gates, strict=True):
            if expert >= 0:
                weights = gate_up_E2IH[expert], down_EHI[expert]
                biases = at(gate_up_bias_E2I, expert), at(down_bias_EH, expert)
                y_1H = expert_ffn(x_TH[token : token + 1], *weights, *biases, kind)
                y_TH[token] += gate * y_1H[0]
    return y_TH


def at(bias_EX: Tensor | None, expert: int) -> Tensor | None:
    """Return an expert's row of a bias that may be absent."""
    return None if bias_EX is None else bias_EX[expert]


def moe_by_expert(
    x_TH: Tensor,
    expert_of_TK: Tensor,
    gate_TK: Tensor,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    *,
    gate_up_bias_E2I: Tensor | None = None,
    down_bias_EH: Tensor | None = None,
    kind: ExpertKind = SWIGLU,
) -> Tensor:
    """Compute the layer expert by expert in the dtype of ``x_TH``; arguments as in moe_by_token.

    This is how eager PyTorch would do it, so its error against float64 is the yardstick for the
    kernel's. Differentiable.

    Returns:
        y_TH: dtype of ``x_TH``; the sum over choices runs in that dtype too.
    """
    y_TH = torch.zeros_like(x_TH)
    for expert in expert_of_TK.unique().tolist():
        if expert < 0:
            continue
        token_A, choice_A = (expert_of_TK == expert).nonzero(as_tuple=True)
        weights = gate_up_E2IH[expert], down_EHI[expert]
        biases = at(gate_up_bias_E2I, expert), at(down_bias_EH, expert)
        y_AH = expert_ffn(x_TH[token_A], *weights, *biases, kind)
        gate_A1 = gate_TK[token_A, choice_A, None].to(x_TH.dtype)
        y_TH = y_TH.index_add(0, token_A, gate_A1 * y_AH)
    return y_TH


def moe(
    x_TH: Tensor,
    router_weight_EH: Tensor,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    top_k: int,
    *,
    renormalize: bool = True,
    expert_of_TK: Tensor | None = None,
) -> Tensor:
    """Compute the whole layer, gate included, in the dtype of ``x_TH``.

    Args:
        x_TH: tokens.
        router_weight_EH: router, dtype of x_TH.
        gate_up_E2IH: gate rows first, then up rows.
        down_EHI: down projection.
        top_k: experts per token.
        renormalize: whether a token's weights sum to one.
        expert_of_TK: replayed ids, or None to let the gate choose.

    Returns:
        y_TH: dtype of ``x_TH``.
    """
    routing = route(
        x_TH, router_weight_EH, top_k, renormalize=renormalize, expert_of_TK=expert_of_TK
    )
    return moe_by_expert(x_TH, routing.expert_of_TK, routing.gate_TK, gate_up_E2IH, down_EHI)
