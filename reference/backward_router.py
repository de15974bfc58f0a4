"""What the router's derivative is, token by token and by hand."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class RouterKind:
    """How logits become weights, as the arguments of :func:`reference.router.weigh` say."""

    score: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0


SOFTMAX = RouterKind()


class RouterGradients(NamedTuple):
    """What the weights of the choices, and the logits, ask of the router."""

    x_TH: Tensor
    weight_EH: Tensor
    bias_E: Tensor
    logits_TE: Tensor  # with what came from above


def route_backward(
    x_TH: Tensor,
    router_weight_EH: Tensor,
    bias_E: Tensor | None,
    expert_of_TK: Tensor,
    dgate_TK: Tensor,
    *,
    served_TK: Tensor,
    dlogits_TE: Tensor | None = None,
    kind: RouterKind = SOFTMAX,
) -> RouterGradients:
    """Return dx = dlogits · weight, dweight = sum over t of dlogits ⊗ x, dbias = that of dlogits.

    A token without a choice, and a logit that asks for nothing, add nothing, whatever the token
    holds: a padded row may be NaN.

    Args:
        x_TH: float64, as are all floats here.
        router_weight_EH: router.
        bias_E: of the logits, or None.
        expert_of_TK: ids that the weights were computed over, before any was dropped; -1: absent.
        dgate_TK: gradient of the weights.
        served_TK: the same with -1 where a choice was dropped. Its weight is the constant zero,
            but its logit stays in the sum that the others are divided by.
        dlogits_TE: gradient of the logits from above, any floating dtype; None for zero.
        kind: how logits become weights.
    """
    logits_TE = logits_of(x_TH, router_weight_EH, bias_E)
    total_TE = torch.zeros_like(logits_TE)
    if dlogits_TE is not None:
        total_TE += dlogits_TE
    dgate_TK = dgate_TK.masked_fill(served_TK < 0, 0.0)
    there_TK = expert_of_TK >= 0
    for token in there_TK.any(1).nonzero().flatten().tolist():
        there_K = there_TK[token]
        chosen = expert_of_TK[token, there_K].long(), dgate_TK[token, there_K]
        total_TE[token] += weigh_backward(logits_TE[token], *chosen, kind)
    dx_TH, dweight_EH = torch.zeros_like(x_TH), torch.zeros_like(router_weight_EH)
    dbias_E = torch.zeros_like(router_weight_EH[:, 0])
    for token, expert in total_TE.nonzero().tolist():
        dlogit = total_TE[token, expert]
        dx_TH[token] += dlogit * router_weight_EH[expert]
        dweight_EH[expert] += dlogit * x_TH[token]
        dbias_E[expert] += dlogit
    return RouterGradients(dx_TH, dweight_EH, dbias_E, total_TE)


def logits_of(x_TH: Tensor, router_weight_EH: Tensor, bias_E: Tensor | None) -> Tensor:
    """Return x · weight + bias."""
    logits_TE = x_TH @ router_weight_EH.T
    return logits_TE if bias_E is None else logits_TE + bias_E


def weigh_backward(
    logit_E: Tensor, expert_of_C: Tensor, dgate_C: Tensor, kind: RouterKind
) -> Tensor:
    """Return one token's dlogit from the gradients of the weights of its C choices."""
    backward = {"softmax": softmax_backward, "sigmoid": sigmoid_backward}[kind.score]
    return backward(logit_E, expert_of_C, kind.scale * dgate_C, kind.renormalize)


def softmax_backward(
    logit_E: Tensor, expert_of_C: Tensor, dgate_C: Tensor, renormalize: bool
) -> Tensor:
    """Return dlogit of gate_c = p of e_c, where p is the softmax over a pool of experts.

    dlogit_e = (sum over c with e_c = e of dgate_c · gate_c) - p_e · (sum over c of dgate_c ·
    gate_c), the second part for every e of the pool: the chosen if ``renormalize``, or all.
    """
    pool_S = expert_of_C if renormalize else torch.arange(len(logit_E), device=logit_E.device)
    p_S = logit_E[pool_S].softmax(0)
    gate_C = p_S if renormalize else p_S[expert_of_C]
    dlogit_E = torch.zeros_like(logit_E)
    dlogit_E.index_add_(0, expert_of_C, dgate_C * gate_C)
    dlogit_E.index_add_(0, pool_S, -p_S * (dgate_C @ gate_C))
    return dlogit_E


def sigmoid_backward(
    logit_E: Tensor, expert_of_C: Tensor, dgate_C: Tensor, renormalize: bool
) -> Tensor:
    """Return dlogit of gate_c = s_c, or s_c / n with n = 1e-20 + the sum of s, s = sigmoid(logit).

    ds_c = dgate_c, or (dgate_c - sum over j of dgate_j · s_j / n) / n when ``renormalize``; and
    dlogit = ds · s · (1 - s).
    """
    s_C = torch.sigmoid(logit_E[expert_of_C])
    ds_C = dgate_C
    if renormalize:
        n = s_C.sum() + 1e-20
        ds_C = (dgate_C - dgate_C @ s_C / n) / n
    return torch.zeros_like(logit_E).index_add_(0, expert_of_C, ds_C * s_C * (1 - s_C))
