"""Device functions of derivatives: of activations and of the router's rule."""

import triton
import triton.language as tl

from megakernel.device.arithmetic import quick_sigmoid, sigmoid
from megakernel.device.route import load_logits, weigh


@triton.jit
def activate_with_slope(values, C: tl.constexpr):
    """Return an activation and its derivative, in float32; NaN stays NaN."""
    ACTIVATION: tl.constexpr = C.expert.activation
    if ACTIVATION == "silu":
        share = quick_sigmoid(values, C)
        result = values * share
        slope = share * (1.0 + values * (1.0 - share))
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.math.erf(values * 0.7071067811865476))
        result = values * share
        slope = share + values * 0.3989422804014327 * tl.exp(-0.5 * values * values)
    elif ACTIVATION == "gelu_tanh":  # values · sigmoid(2 u), see activate
        square = values * values
        share = quick_sigmoid(1.5957691216057308 * values * (1.0 + 0.044715 * square), C)
        result = values * share
        inner_slope = 1.5957691216057308 * (1.0 + 0.134145 * square)
        slope = share + values * share * (1.0 - share) * inner_slope
    else:
        tl.static_assert((ACTIVATION == "relu") | (ACTIVATION == "relu2"))
        result = tl.where(values < 0.0, 0.0, values)
        slope = tl.where(values <= 0.0, 0.0, 1.0)
        if ACTIVATION == "relu2":
            slope = 2.0 * result
            result = result * result
    return result, slope


@triton.jit
def gated_with_slopes(gate, up, C: tl.constexpr):
    """Return h and its derivatives by gate and by up; without a gate the first means nothing."""
    if C.expert.activation == "clamped_swiglu":
        limit = C.expert.limit
        over = gate > limit
        outside = (up > limit) | (up < -limit)
        gate = tl.where(over, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        share = quick_sigmoid(1.702 * gate, C)
        h = (up + 1.0) * (gate * share)
        by_gate = (up + 1.0) * share * (1.0 + 1.702 * gate * (1.0 - share))
        by_gate = tl.where(over, 0.0, by_gate)
        by_up = tl.where(outside, 0.0, gate * share)
    elif C.expert.has_gate:
        by_up, slope = activate_with_slope(gate, C)
        h = by_up * up
        by_gate = slope * up
    else:
        h, by_up = activate_with_slope(up, C)
        by_gate = by_up
    return h, by_gate, by_up


@triton.jit
def logit_of(logits_TE, token, chosen, C: tl.constexpr):
    """Load the logits of chosen ids, [select_tokens, top_k_pad]; 0 where there is none."""
    place = logits_TE + token.to(tl.int64)[:, None] * C.num_experts + chosen
    return tl.load(place, mask=chosen >= 0, other=0.0)


@triton.jit
def dlogit_of_chosen(logits_TE, token, num_tokens, chosen, dgate, C: tl.constexpr):
    """Return (gradient of chosen ids' logits, sum over k of dgate · gate), [.., top_k_pad], [..].

    With p = gate / scale and G = scale · dgate. Softmax: p (G - sum of G p). Sigmoid s:
    G s (1 - s), and (G - sum of G p) / sum of s for G where weights are renormalised. Softmax over
    all experts lacks what the sum does to those not chosen: see dlogits_tile.
    """
    valid = chosen >= 0
    gate = weigh(logits_TE, token, num_tokens, chosen, C)
    dgate = tl.where(valid, dgate, 0.0)
    total = tl.sum(dgate * gate, 1)[:, None]
    if C.router.score == "sigmoid":
        score = tl.where(valid, sigmoid(logit_of(logits_TE, token, chosen, C)), 0.0)
        through = C.router.scale * dgate
        if C.router.renormalize:
            through = (through - total) / (tl.sum(score, 1)[:, None] + 1e-20)
        dlogit = through * score * (1.0 - score)
    elif C.router.renormalize:
        dlogit = gate * (dgate - total / C.router.scale)
    else:
        dlogit = gate * dgate
    return tl.where(valid, dlogit, 0.0), total


@triton.jit
def dlogits_tile(logits_TE, token, num_tokens, chosen, dgate, C: tl.constexpr):
    """Return the gradient of all logits of some tokens, [select_tokens, experts_pad] float32.

    Args:
        logits_TE: of the router.
        token: [select_tokens].
        num_tokens: T.
        chosen: [select_tokens, top_k_pad] ids that weights were made for, -1 for none.
        dgate: the gradient of those weights.
    """
    dlogit, total = dlogit_of_chosen(logits_TE, token, num_tokens, chosen, dgate, C)
    expert = tl.arange(0, C.experts_pad)[None, :]
    choice = tl.arange(0, C.top_k_pad)[None, :]
    dlogits = tl.full(C.scores_tile, 0.0, tl.float32)
    if C.router.score == "softmax" and not C.router.renormalize:
        logits = load_logits(logits_TE, token, num_tokens, C)
        # Nothing reaches the logits of a token without an expert, whatever they are.
        served = tl.max((chosen >= 0).to(tl.int32), 1)[:, None] > 0
        share = tl.exp(logits - tl.max(logits, 1)[:, None])
        dlogits = tl.where(served, -total * (share / tl.sum(share, 1)[:, None]), 0.0)
    for k in range(C.top_k):
        id_k = tl.sum(tl.where(choice == k, chosen, 0), 1)[:, None]
        dlogit_k = tl.sum(tl.where(choice == k, dlogit, 0.0), 1)[:, None]
        dlogits += tl.where(expert == id_k, dlogit_k, 0.0)
    return dlogits
