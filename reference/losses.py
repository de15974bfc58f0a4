"""Balance losses and the bias update, one expert at a time: slow, and true by reading."""

import torch
from torch import Tensor


def switch_loss(logits_TE: Tensor, load_E: Tensor, weight: float) -> float:
    """weight · E · sum over e of (share of choices) · (mean probability)."""
    num_experts = len(load_E)
    probability_TE = logits_TE.double().softmax(-1)
    total = 0.0
    for expert in range(num_experts):
        share = int(load_E[expert]) / int(load_E.sum())
        total += share * float(probability_TE[:, expert].mean())
    return weight * num_experts * total


def gshard_loss(logits_TE: Tensor, expert_of_TK: Tensor, weight: float) -> float:
    """weight · mean over e of (share of first choices) · (mean probability)."""
    num_tokens, num_experts = logits_TE.shape
    probability_TE = logits_TE.double().softmax(-1)
    total = 0.0
    for expert in range(num_experts):
        first = int((expert_of_TK[:, 0] == expert).sum())
        total += first / num_tokens * float(probability_TE[:, expert].mean())
    return weight * total / num_experts


def balanced_correction_bias(correction_bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """Move each bias by ``rate``: up if the expert has less than the mean load, down if more."""
    mean = sum(load_E.tolist()) / len(load_E)
    moved = [
        bias + rate * ((load < mean) - (load > mean))
        for bias, load in zip(correction_bias_E.tolist(), load_E.tolist(), strict=True)
    ]
    return torch.tensor(moved, dtype=correction_bias_E.dtype)
