"""Which experts serve a token, and with what weight."""

from typing import NamedTuple

import torch
from torch import Tensor

from reference.dropping import drop_over_capacity, drop_random_second


class Routing(NamedTuple):
    """The gate's answer for every token."""

    expert_of_TK: Tensor  # int64, best first, in [0, E); -1 where a choice is empty or dropped
    gate_TK: Tensor  # weight of each choice, in the dtype of the logits; 0 where the id is -1
    logits_TE: Tensor  # x @ router_weight.T + bias
    load_E: Tensor  # int32, choices per expert before any is dropped over capacity


def score(logits_TE: Tensor, kind: str) -> Tensor:
    """Return softmax(logits) over all experts, or sigmoid(logits), as ``kind`` says."""
    if kind == "softmax":
        return logits_TE.softmax(dim=-1)
    if kind == "sigmoid":
        return 1 / (1 + torch.exp(-logits_TE))
    raise ValueError(f"kind must be 'softmax' or 'sigmoid', got {kind!r}")


def select(score_TE: Tensor, top_k: int, kept_TE: Tensor | None = None) -> Tensor:
    """Return the ids of the ``top_k`` largest scores, best first; ties go to the lower expert id.

    NaN counts as the largest value, so a row of NaN selects experts 0 to top_k - 1.

    Args:
        score_TE: floating point, any range.
        top_k: number of experts per token, 1 <= top_k <= E.
        kept_TE: bool, the experts that may be chosen, at least top_k per token; None for all.

    Returns:
        expert_of_TK: int64 in [0, E), distinct within a row.
    """
    order_TE = torch.sort(score_TE, dim=-1, descending=True, stable=True).indices
    if kept_TE is not None:
        kept_first = kept_TE.gather(1, order_TE).sort(dim=-1, descending=True, stable=True).indices
        order_TE = order_TE.gather(1, kept_first)
    return order_TE[:, :top_k]


def keep_best_groups(score_TE: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """Return which experts lie in the token's best groups (DeepSeek-V3, arXiv 2412.19437).

    A group is E / num_groups consecutive experts, and its score the sum of its two largest scores.
    Ties go to the lower group.

    Returns:
        kept_TE: bool, top_groups · E / num_groups experts per token.
    """
    score_TGM = score_TE.unflatten(-1, (num_groups, -1))  # G groups of M members
    best_TG2 = score_TGM.sort(dim=-1, descending=True).values[..., :2]
    kept_TG = torch.zeros_like(best_TG2[..., 0], dtype=torch.bool)
    kept_TG.scatter_(1, select(best_TG2.sum(-1), top_groups), True)
    return kept_TG[..., None].expand_as(score_TGM).flatten(1)


def choose(
    logits_TE: Tensor,
    top_k: int,
    *,
    kind: str = "softmax",
    correction_bias_E: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
) -> Tensor:
    """Return the ids of the experts with the best scores, corrected and limited to groups.

    Args:
        logits_TE: floating point.
        top_k: experts per token.
        kind: see :func:`score`.
        correction_bias_E: added to the scores for choosing only (arXiv 2408.15664).
        num_groups: see :func:`keep_best_groups`.
        top_groups: groups a token may choose from; top_k of their experts must exist.
    """
    if kind == "softmax" and correction_bias_E is None and num_groups == 1:
        return select(logits_TE, top_k)  # softmax keeps the order, but rounding may merge scores
    score_TE = score(logits_TE, kind)
    if correction_bias_E is not None:
        score_TE = score_TE + correction_bias_E.to(score_TE.dtype)
    kept_TE = keep_best_groups(score_TE, num_groups, top_groups) if num_groups > 1 else None
    return select(score_TE, top_k, kept_TE)


def weigh(
    logits_TE: Tensor,
    expert_of_TK: Tensor,
    renormalize: bool,
    *,
    kind: str = "softmax",
    scale: float = 1.0,
) -> Tensor:
    """Return the weight of each chosen expert.

    Softmax: gate[t, k] = scale · exp(logit[t, e_k]) / sum over S of exp(logit[t, e]), where S is
    the chosen experts when ``renormalize`` and all experts otherwise. Sigmoid: gate[t, k] =
    scale · sigmoid(logit[t, e_k]), divided by 1e-20 + their sum when ``renormalize``.

    Args:
        logits_TE: floating point.
        expert_of_TK: integer ids; -1 means no expert and gets weight 0.
        renormalize: whether the weights of a token's chosen experts sum to ``scale``.
        kind: see :func:`score`.
        scale: factor on every weight.

    Returns:
        gate_TK: dtype of the logits. A token without any expert has weight 0 throughout.
    """
    chosen_TK = expert_of_TK >= 0
    logit_TK = logits_TE.gather(1, expert_of_TK.clamp(min=0).long())
    if kind == "sigmoid":
        gate_TK = score(logit_TK, kind).masked_fill(~chosen_TK, 0.0)
        gate_TK = gate_TK / (gate_TK.sum(-1, keepdim=True) + 1e-20) if renormalize else gate_TK
    else:
        logit_TK = logit_TK.masked_fill(~chosen_TK, float("-inf"))
        pool = logit_TK if renormalize else logits_TE
        gate_TK = torch.exp(logit_TK - torch.logsumexp(pool, dim=-1, keepdim=True))
    return gate_TK.masked_fill(~chosen_TK, 0.0) * scale


def count_load(expert_of_TK: Tensor, num_experts: int) -> Tensor:
    """Return how many choices each expert has; -1 is skipped. Int32."""
    return torch.bincount(expert_of_TK[expert_of_TK >= 0], minlength=num_experts).int()


def route(
    x_TH: Tensor,
    router_weight_EH: Tensor,
    top_k: int,
    *,
    renormalize: bool = True,
    expert_of_TK: Tensor | None = None,
    kind: str = "softmax",
    bias_E: Tensor | None = None,
    correction_bias_E: Tensor | None = None,
    groups: tuple[int, int] = (1, 1),
    scale: float = 1.0,
    capacity: int | None = None,
    random_second_seed: int | None = None,
) -> Routing:
    """Compute logits, choose experts (or take the given ones), weigh them, and drop what must be.

    Args:
        x_TH: tokens; computed in the wider dtype of x and the router.
        router_weight_EH: dtype of x_TH or float32.
        top_k: experts per token.
        renormalize: see :func:`weigh`.
        expert_of_TK: replayed ids. Selection and dropping are then skipped and the weights stay
            live, which is the gradient semantics of Rollout Routing Replay (arXiv 2510.11370).
        kind: see :func:`score`.
        bias_E: added to the logits (gpt-oss).
        correction_bias_E: see :func:`choose`.
        groups: (num_groups, top_groups) of :func:`choose`.
        scale: see :func:`weigh`.
        capacity: see :func:`reference.dropping.drop_over_capacity`; None drops nothing.
        random_second_seed: see :func:`reference.dropping.drop_random_second`; None drops nothing.
    """
    wide = torch.promote_types(x_TH.dtype, router_weight_EH.dtype)
    logits_TE = x_TH.to(wide) @ router_weight_EH.to(wide).T
    if bias_E is not None:
        logits_TE = logits_TE + bias_E.to(wide)
    num_experts = len(router_weight_EH)
    if expert_of_TK is not None:
        gate_TK = weigh(logits_TE, expert_of_TK, renormalize, kind=kind, scale=scale)
        load_E = count_load(expert_of_TK, num_experts)
        return Routing(expert_of_TK.long(), gate_TK, logits_TE, load_E)
    chosen_TK = choose(
        logits_TE, top_k, kind=kind, correction_bias_E=correction_bias_E,
        num_groups=groups[0], top_groups=groups[1],
    )  # fmt: skip
    gate_TK = weigh(logits_TE, chosen_TK, renormalize, kind=kind, scale=scale)
    if random_second_seed is not None:
        chosen_TK = drop_random_second(chosen_TK, gate_TK, random_second_seed)
    load_E = count_load(chosen_TK, num_experts)
    if capacity is not None:
        chosen_TK = drop_over_capacity(chosen_TK, capacity)
    return Routing(chosen_TK, gate_TK.masked_fill(chosen_TK < 0, 0.0), logits_TE, load_E)
