"""Device functions of the router: logits, the choice of experts, and their weights."""

import triton
import triton.language as tl

from megakernel.device.arithmetic import dot, sigmoid
from megakernel.device.dispatch import bin_of, check_ids, load_ids, rank_in_bins
from megakernel.device.shared import store_token_gate

_LEAST = tl.constexpr(-(1 << 31))
_GREATEST = tl.constexpr((1 << 31) - 1)


@triton.jit
def store_logits(tile, b, size, C: tl.constexpr):
    """Write x · routerᵀ + bias for one token tile, ``block_experts`` columns at a time."""
    token = tile * C.block_tokens + tl.arange(0, C.block_tokens)
    exists = token < size.num_tokens
    for first_expert in range(0, C.num_experts, C.block_experts):
        expert = first_expert + tl.arange(0, C.block_experts)
        served = expert < C.num_experts
        acc = router_product(token, exists, expert, served, b, C)
        if b.router.bias_E is not None:
            acc += tl.load(b.router.bias_E + expert, mask=served, other=0.0).to(tl.float32)[
                None, :
            ]
        tl.store(
            b.routing.logits_TE + token.to(tl.int64)[:, None] * C.num_experts + expert[None, :],
            acc,
            mask=exists[:, None] & served[None, :],
        )


@triton.jit
def router_product(token, exists, expert, served, b, C: tl.constexpr):
    """Return x · routerᵀ for some tokens and experts, [block_tokens, block_experts] float32."""
    x_row = b.x_TH + token.to(tl.int64)[:, None] * C.hidden
    acc = tl.full(C.logits_tile, 0.0, tl.float32)
    for first_column in tl.range(0, C.hidden, C.step, num_stages=C.num_stages):
        column = first_column + tl.arange(0, C.step)
        inside = (column < C.hidden)[None, :]
        x = tl.load(x_row + column[None, :], mask=exists[:, None] & inside, other=0.0)
        router = tl.load(
            b.router.weight_EH + expert[:, None] * C.hidden + column[None, :],
            mask=served[:, None] & inside,
            other=0.0,
        )
        acc = dot(x.to(router.dtype), router.T, acc, C)
    return acc


@triton.jit
def load_logits(logits_TE, token, num_tokens, C: tl.constexpr):
    """Load all logits of some tokens, -inf in the padding."""
    expert = tl.arange(0, C.experts_pad)
    return tl.load(
        logits_TE + token.to(tl.int64)[:, None] * C.num_experts + expert[None, :],
        mask=(token < num_tokens)[:, None] & (expert < C.num_experts)[None, :],
        other=float("-inf"),
    )  # [select_tokens, experts_pad]


@triton.jit
def score_of(logits, correction_bias_E, C: tl.constexpr):
    """Return what experts are chosen by: sigmoid or softmax plus correction, or plain logits.

    Softmax keeps the order of logits, so alone it would only merge close ones.
    """
    score = logits
    if C.router.score == "sigmoid":
        score = sigmoid(logits)
    elif correction_bias_E is not None or C.router.num_groups > 1:
        exponential = tl.exp(logits - tl.max(logits, 1)[:, None])
        score = exponential / tl.sum(exponential, 1)[:, None]
    if correction_bias_E is not None:
        expert = tl.arange(0, C.experts_pad)
        correction = tl.load(correction_bias_E + expert, mask=expert < C.num_experts, other=0.0)
        score += correction.to(tl.float32)[None, :]
    return score


@triton.jit
def order_of(score):
    """Return integers that order as the scores do, NaN above everything and both zeros equal."""
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ _GREATEST, bits)
    key = tl.where(score == 0.0, 0, key)
    return tl.where(score != score, _GREATEST, key)


@triton.jit
def best_of(key, index):
    """Return each row's index of the greatest key, the lowest if there are several."""
    best = tl.max(key, 1)[:, None]
    return tl.min(tl.where(key == best, index, _GREATEST), 1)[:, None]


@triton.jit
def keep_best_groups(key, score, C: tl.constexpr):
    """Return ``key`` with the least key wherever an expert is outside its token's best groups.

    A group's score is the sum of its two largest; ties go to the lower group.
    """
    expert = tl.arange(0, C.experts_pad)[None, :]
    group = tl.arange(0, C.groups_tile[1])[None, :]
    group_score = tl.full(C.groups_tile, 0.0, tl.float32)
    for g in range(C.router.num_groups):
        own_key = tl.where(expert // C.experts_per_group == g, key, _LEAST)
        for _ in tl.static_range(min(2, C.experts_per_group)):
            best = best_of(own_key, expert)
            best_score = tl.sum(tl.where(expert == best, score, 0.0), 1)[:, None]
            group_score = tl.where(group == g, group_score + best_score, group_score)
            own_key = tl.where(expert == best, _LEAST, own_key)
    group_key = tl.where(group < C.router.num_groups, order_of(group_score), _LEAST)
    kept = key < _LEAST  # none
    for _ in range(C.router.top_groups):
        best = best_of(group_key, group)
        kept = kept | (expert // C.experts_per_group == best)
        group_key = tl.where(group == best, _LEAST, group_key)
    return tl.where(kept, key, _LEAST)


@triton.jit
def choose(score, C: tl.constexpr):
    """Return the ids of the top_k largest scores, best first; ties go to the lower id.

    Any input gives distinct ids in range.
    """
    expert = tl.arange(0, C.experts_pad)[None, :]
    key = tl.where(expert < C.num_experts, order_of(score), _LEAST)
    if C.router.num_groups > 1:
        key = keep_best_groups(key, score, C)
    choice = tl.arange(0, C.top_k_pad)[None, :]
    chosen = tl.full(C.choice_tile, -1, tl.int32)
    for k in range(C.top_k):
        winner = best_of(key, expert)
        chosen = tl.where(choice == k, winner, chosen)
        key = tl.where(expert == winner, _LEAST, key)
    return chosen  # [select_tokens, top_k_pad]


@triton.jit
def weigh(logits_TE, token, num_tokens, chosen, C: tl.constexpr):
    """Return the weight of each chosen id; softmax or sigmoid, over the chosen or over all."""
    valid = chosen >= 0
    logit = tl.load(
        logits_TE + token.to(tl.int64)[:, None] * C.num_experts + chosen,
        mask=valid,
        other=float("-inf"),
    )
    if C.router.score == "sigmoid":
        gate = tl.where(valid, sigmoid(logit), 0.0)
        if C.router.renormalize:
            gate = gate / (tl.sum(gate, 1)[:, None] + 1e-20)
    else:
        pool = logit if C.router.renormalize else load_logits(logits_TE, token, num_tokens, C)
        # A token without any expert has nothing to divide by.
        served = tl.max(valid.to(tl.int32), 1)[:, None] > 0
        top = tl.where(served, tl.max(pool, 1)[:, None], 0.0)
        total = tl.where(served, tl.sum(tl.exp(pool - top), 1)[:, None], 1.0)
        gate = tl.where(valid, tl.exp(logit - top) / total, 0.0)
    if C.router.scale != 1.0:
        gate *= C.router.scale
    return gate


@triton.jit
def drop_random_second(ids, gate, token, seed, C: tl.constexpr):
    """Turn a token's second id into -1 unless twice its weight exceeds the token's draw."""
    choice = tl.arange(0, C.top_k_pad)[None, :]
    served = 2.0 * gate > tl.rand(seed, token)[:, None]
    return tl.where((choice == 1) & ~served, -1, ids)


@triton.jit
def route_tokens(token, b, size, C: tl.constexpr):
    """Return the ids of some tokens, chosen or given, and write what the route leaves open."""
    choice = tl.arange(0, C.top_k_pad)[None, :]
    inside = (token < size.num_tokens)[:, None] & (choice < C.top_k)
    place = token.to(tl.int64)[:, None] * C.top_k + choice
    if C.route == "live":
        logits = load_logits(b.routing.logits_TE, token, size.num_tokens, C)
        ids = choose(score_of(logits, b.router.correction_bias_E, C), C)
        ids = tl.where(inside, ids, -1)
    else:
        ids = load_ids(b.routing.expert_of_TK, token, size.num_tokens, C)
    if C.route == "given":
        ids = check_ids(ids, token, b.control, C)
    else:
        gate = weigh(b.routing.logits_TE, token, size.num_tokens, ids, C)
        if C.route == "live":
            if b.saved.chosen_TK is not None:
                tl.store(b.saved.chosen_TK + place, ids, mask=inside)
            if C.router.random_second:
                ids = drop_random_second(ids, gate, token, size.seed, C)
                gate = tl.where(ids >= 0, gate, 0.0)
            tl.store(b.routing.expert_of_TK + place, ids, mask=inside)
        tl.store(b.routing.gate_TK + place, gate, mask=inside)
    return ids


@triton.jit
def route_tile(tile, b, size, C: tl.constexpr):
    """Route one token tile: logits, ids, weights, ranks within the tile, counts per bin.

    Reads: x_TH, the router, the token gate; ids where they are given. Writes: logits_TE,
    expert_of_TK, gate_TK, rank_TK and one row of base_GB, as far as the route leaves them open;
    the shared expert's weights.
    """
    if b.shared.token_gate_1H is not None and not C.is_backward:
        store_token_gate(tile, b, size, C)
    if C.route != "given":
        store_logits(tile, b, size, C)
        tl.debug_barrier()  # the selection reads what other threads stored
    counts = tl.full(C.bins_row, 0, tl.int32)
    for start in range(0, C.block_tokens, C.select_tokens):
        token = tile * C.block_tokens + start + tl.arange(0, C.select_tokens)
        ids = route_tokens(token, b, size, C)
        if C.makes_rows:
            bins = bin_of(ids, token, b, C)
            counts = rank_in_bins(bins, counts, token, size.num_tokens, b.scratch.rank_TK, C)
    if C.makes_rows:
        bin_index = tl.arange(0, C.bins_pad)
        base = b.scratch.base_GB + tile * C.num_bins + bin_index
        tl.store(base, counts, mask=bin_index < C.num_bins)
