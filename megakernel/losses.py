"""What training does with the load that a launch reports: losses, and biases without a loss.

Plain PyTorch on a handful of numbers per expert. Losses are differentiable in the logits.
"""

import math

import torch
from torch import Tensor


def switch_loss(logits_TE: Tensor, load_E: Tensor, weight: float = 0.01) -> Tensor:
    """Return Switch's auxiliary loss, weight · E · sum over e of f[e] · P[e].

    f[e] is expert e's share of all choices and P[e] its mean softmax probability, so the loss is
    ``weight`` at perfect balance (arXiv 2101.03961, equations 4 to 6; for top-k routing the share
    is of T·K choices).

    Args:
        logits_TE: of the router.
        load_E: choices per expert, before any is dropped.
        weight: alpha.

    Returns:
        A scalar, float32.
    """
    probability_E = logits_TE.float().softmax(dim=-1).mean(dim=0)
    share_E = load_E / load_E.sum()
    return weight * len(load_E) * (share_E * probability_E).sum()


def gshard_loss(logits_TE: Tensor, expert_of_TK: Tensor, weight: float = 0.01) -> Tensor:
    """Return GShard's auxiliary loss, weight · mean over e of c[e] / T · m[e].

    c[e] counts the tokens whose first choice is e, and m[e] is the mean softmax probability of e,
    so the loss is ``weight`` / E² at perfect balance (arXiv 2006.16668, algorithm 1).

    Args:
        logits_TE: of the router.
        expert_of_TK: ids, best first, before any is dropped; only the first choice counts.
        weight: k in the paper's total loss.

    Returns:
        A scalar, float32.
    """
    num_tokens, num_experts = logits_TE.shape
    probability_E = logits_TE.float().softmax(dim=-1).mean(dim=0)
    first_T = expert_of_TK[:, 0].long()
    share_E = torch.bincount(first_T, minlength=num_experts) / num_tokens
    return weight * (share_E * probability_E).mean()


def balanced_correction_bias(
    correction_bias_E: Tensor, load_E: Tensor, rate: float = 0.001
) -> Tensor:
    """Return the correction bias for the next step: up where load is below the mean, else down.

    b[e] + rate · sign(mean load - load[e]): Loss-Free Balancing (arXiv 2408.15664, algorithm 1).
    Write it back with ``router.correction_bias_E.copy_(...)``.

    Args:
        correction_bias_E: of this step.
        load_E: choices per expert in this step, over all ranks and micro-batches.
        rate: u in the paper.
    """
    load_E = load_E.to(correction_bias_E.dtype)
    return correction_bias_E + rate * torch.sign(load_E.mean() - load_E)


def max_violation(load_E: Tensor) -> float:
    """Return max load / mean load - 1, zero at perfect balance (arXiv 2408.15664)."""
    return float(load_E.max() / load_E.double().mean()) - 1.0


def expert_capacity(num_tokens: int, num_experts: int, top_k: int = 1, factor: float = 1.0) -> int:
    """Return the tokens an expert takes: factor · T · K / E, rounded up, at least 1.

    Switch has top_k = 1 and factors of 1 to 1.25, GShard top_k = 2.
    """
    return max(1, math.ceil(factor * num_tokens * top_k / num_experts))
