"""Which experts serve a token, and with what weight."""

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """The gate's answer for every token."""

    expert_of_TK: Tensor  # int64, best first, in [0, E); -1 where a replayed choice is empty
    gate_TK: Tensor  # weight of each choice, in the dtype of the logits; 0 where the id is -1
    logits_TE: Tensor  # x @ router_weight.T


def select(logits_TE: Tensor, top_k: int) -> Tensor:
    """Return the ids of the ``top_k`` largest logits, best first; ties go to the lower expert id.

    NaN counts as the largest value, so a row of NaN selects experts 0 to top_k - 1.

    Args:
        logits_TE: floating point, any range.
        top_k: number of experts per token, 1 <= top_k <= E.

    Returns:
        expert_of_TK: int64 in [0, E), distinct within a row.
    """
    order_TE = torch.sort(logits_TE, dim=-1, descending=True, stable=True).indices
    return order_TE[:, :top_k]


def weigh(logits_TE: Tensor, expert_of_TK: Tensor, renormalize: bool) -> Tensor:
    """Return the softmax weight of each chosen expert.

    gate[t, k] = exp(logit[t, e_k]) / sum over S of exp(logit[t, e]), where S is the chosen experts
    when ``renormalize`` and all experts otherwise.

    Args:
        logits_TE: floating point.
        expert_of_TK: integer ids; -1 means no expert and gets weight 0.
        renormalize: whether the weights of a token's chosen experts sum to one.

    Returns:
        gate_TK: dtype of the logits. A token without any expert has weight 0 throughout.
    """
    chosen_TK = expert_of_TK >= 0
    logit_TK = logits_TE.gather(1, expert_of_TK.clamp(min=0).long())
    logit_TK = logit_TK.masked_fill(~chosen_TK, float("-inf"))
    pool = logit_TK if renormalize else logits_TE
    gate_TK = torch.exp(logit_TK - torch.logsumexp(pool, dim=-1, keepdim=True))
    return gate_TK.masked_fill(~chosen_TK, 0.0)


def route(
    x_TH: Tensor,
    router_weight_EH: Tensor,
    top_k: int,
    *,
    renormalize: bool = True,
    expert_of_TK: Tensor | None = None,
) -> Routing:
    """Compute logits, choose experts (or take the given ones), and weigh them.

    Args:
        x_TH: tokens; computed in its own dtype.
        router_weight_EH: same dtype as x_TH.
        top_k: experts per token.
        renormalize: see :func:`weigh`.
        expert_of_TK: replayed ids. Selection is then skipped and the weights stay live, which is
            the gradient semantics of Rollout Routing Replay (arXiv 2510.11370).
    """
    logits_TE = x_TH @ router_weight_EH.T
    if expert_of_TK is None:
        expert_of_TK = select(logits_TE, top_k)
    gate_TK = weigh(logits_TE, expert_of_TK, renormalize)
    return Routing(expert_of_TK.long(), gate_TK, logits_TE)
