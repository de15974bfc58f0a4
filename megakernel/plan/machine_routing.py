"""What tasks of the stages route and dispatch mean, in plain PyTorch; see machine_ffn.py."""

from collections import Counter

import torch
from torch import Tensor
from torch.nn.functional import pad

from megakernel.plan.machine_memory import Memory, columns_of, span, tokens_of
from megakernel.plan.rules import RouterRule
from megakernel.plan.spec import KernelSpec

# Route.


def route(m: Memory, tile: int, block: int) -> None:
    """Write logits, ids, weights, ranks and counts of a token tile, as the route leaves open."""
    tokens = tokens_of(m, tile, m.spec.block_tokens)
    at = span(tokens)
    if "shared.token_gate_1H" in m and not m.spec.is_backward:
        sum_T1 = m.read("x_TH", at) @ m.read("shared.token_gate_1H").T
        m.write("scratch.sigmoid_T", at, torch.sigmoid(sum_T1[:, 0]))
    if m.spec.route == "given":
        ids_TK = m.read("routing.expert_of_TK", at)
        check_ids(ids_TK, m.spec.num_experts)
    else:
        logits_TE = m.read("x_TH", at) @ m.read("router.weight_EH").T
        if "router.bias_E" in m:
            logits_TE = logits_TE + m.read("router.bias_E")
        m.write("routing.logits_TE", at, logits_TE)
        ids_TK = choose_and_weigh(m, tokens)
    if m.spec.makes_rows:
        rank(m, tile, tokens, ids_TK)


def check_ids(ids_TK: Tensor, num_experts: int) -> None:
    """Refuse ids that a launch would have to skip; see checks/values.py."""
    for ids in ids_TK.tolist():
        held = [expert for expert in ids if expert != -1]
        if not all(0 <= expert < num_experts for expert in held) or len({*held}) < len(held):
            raise ValueError(f"expert_of_TK must be -1 or distinct ids below {num_experts}: {ids}")


def choose_and_weigh(m: Memory, tokens: range) -> Tensor:
    """Write the weights of a token tile's ids, and where they are chosen the ids; return them."""
    router, at = m.spec.router, span(tokens)
    logits_TE = m.read("routing.logits_TE", at)
    if m.spec.route == "replay":
        ids_TK = m.read("routing.expert_of_TK", at)
        m.write("routing.gate_TK", at, weigh(logits_TE, ids_TK, router))
        return ids_TK
    correction_E = m.read("router.correction_bias_E") if "router.correction_bias_E" in m else None
    score_TE = scores_of(logits_TE, correction_E, router)
    ids_TK = torch.tensor([choose(scores, m.spec) for scores in score_TE.tolist()])
    gate_TK = weigh(logits_TE, ids_TK, router)
    if "saved.chosen_TK" in m:
        m.write("saved.chosen_TK", at, ids_TK)
    if router.random_second:
        draw_T = torch.tensor([draw(m.size.seed, token) for token in tokens])
        ids_TK[:, 1].masked_fill_(2 * gate_TK[:, 1] <= draw_T, -1)
        gate_TK.masked_fill_(ids_TK < 0, 0.0)
    m.write("routing.expert_of_TK", at, ids_TK)
    m.write("routing.gate_TK", at, gate_TK)
    return ids_TK


def scores_of(logits_TE: Tensor, correction_E: Tensor | None, router: RouterRule) -> Tensor:
    """Return what experts are chosen by; softmax alone keeps the order of the logits."""
    if router.score == "sigmoid":
        score_TE = torch.sigmoid(logits_TE)
    elif correction_E is not None or router.num_groups > 1:
        score_TE = logits_TE.softmax(-1)
    else:
        score_TE = logits_TE
    return score_TE if correction_E is None else score_TE + correction_E


def choose(scores: list[float], spec: KernelSpec) -> list[int]:
    """Return a token's K best experts among its best groups; ties go to the lower id."""
    size, router = spec.experts_per_group, spec.router
    members = [range(g * size, (g + 1) * size) for g in range(router.num_groups)]

    def two_best(group: int) -> float:
        return sum(sorted(scores[expert] for expert in members[group])[-2:])

    groups = sorted(range(router.num_groups), key=lambda g: (-two_best(g), g))
    kept = [expert for group in groups[: router.top_groups] for expert in members[group]]
    return sorted(kept, key=lambda expert: (-scores[expert], expert))[: spec.top_k]


def weigh(logits_TE: Tensor, ids_TK: Tensor, router: RouterRule) -> Tensor:
    """Return gate_TK: softmax or sigmoid, over the chosen or over all; 0 where the id is -1."""
    absent_TK = ids_TK < 0
    logit_TK = logits_TE.gather(1, ids_TK.clamp(min=0)).masked_fill(absent_TK, -torch.inf)
    if router.score == "sigmoid":
        gate_TK = torch.sigmoid(logit_TK)
        if router.renormalize:
            gate_TK = gate_TK / (gate_TK.sum(1, keepdim=True) + 1e-20)
    else:
        pool = logit_TK if router.renormalize else logits_TE
        gate_TK = (logit_TK - pool.logsumexp(1, keepdim=True)).exp()
    return gate_TK.masked_fill(absent_TK, 0.0) * router.scale


def draw(seed: int, token: int) -> float:
    """Return tl.rand(seed, token): the first word of Philox 4x32-10, folded into [0, 1)."""
    mask = (1 << 32) - 1
    words, keys = (token, 0, 0, 0), (seed, 0)
    for _ in range(10):
        left, right = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = (
            right >> 32 ^ words[1] ^ keys[0], right & mask,
            left >> 32 ^ words[3] ^ keys[1], left & mask,
        )  # fmt: skip
        keys = (keys[0] + 0x9E3779B9 & mask, keys[1] + 0xBB67AE85 & mask)
    return min(words[0], mask - words[0]) * 4.6566127342e-10


# Dispatch.


def rank(m: Memory, tile: int, tokens: range, ids_TK: Tensor) -> None:
    """Write each choice's rank in its bin within the tile, and the tile's counts."""
    bins_TK = ids_TK
    if m.spec.split == "slot":
        bins_TK = m.read("routing.slot_of_TK", span(tokens)).masked_fill(ids_TK < 0, -1)
    seen: Counter[int] = Counter()
    rank_TK = torch.full_like(ids_TK, -1)
    for place, bin_index in enumerate(bins_TK.flatten().tolist()):
        if bin_index >= 0:
            rank_TK.view(-1)[place] = seen[bin_index]
            seen[bin_index] += 1
    m.write("scratch.rank_TK", span(tokens), rank_TK)
    m.write("scratch.base_GB", tile, torch.tensor([seen[b] for b in range(m.spec.num_bins)]))


def prefix(m: Memory, block: int, _: int) -> None:
    """Turn the tiles' counts of a block of bins into first ordinals, and write the totals."""
    bins = columns_of(block, block + 1, m.spec.PREFIX_BINS, m.spec.num_bins)
    count_GB = m.read("scratch.base_GB", (slice(None), bins))
    m.write("scratch.base_GB", (slice(None), bins), count_GB.cumsum(0) - count_GB, again=True)
    m.write("scratch.total_B", bins, count_GB.sum(0))


def rows_per_slot(m: Memory) -> Tensor:
    """Return how many rows each slot gets, [P]: copies take turns, the first copy first."""
    total_B = m.read("scratch.total_B")
    if m.spec.router.capped:
        total_B = total_B.clamp(max=m.size.capacity)
    if m.spec.split != "even":
        return total_B
    rows_P = []
    copies_of_E, copy_of_P = m.read("slots.copies_of_E"), m.read("slots.copy_of_P")
    for expert, copy in zip(m.read("slots.expert_of_P").tolist(), copy_of_P, strict=True):
        ordinals = range(int(total_B[expert])) if expert >= 0 else range(0)
        rows_P.append(len(ordinals[int(copy) :: int(copies_of_E[expert])]))
    return torch.tensor(rows_P)


def scatter(m: Memory, tile: int, _: int) -> None:
    """Place a token tile's assignments in rows, and write a share of the row tile table."""
    spec = m.spec
    rows_P = rows_per_slot(m)
    tiles_P = -(-rows_P // spec.block_rows)
    start_P = tiles_P.cumsum(0) - tiles_P
    num_tiles = int(tiles_P.sum())
    padded_P = pad(start_P, (0, spec.slots_pad - spec.num_slots), value=num_tiles)
    m.write("scratch.tile_start_GP", tile, padded_P)
    if tile == 0:
        m.write("scratch.num_tiles_1", (), m.size.shared_tiles + num_tiles)
        if "routing.load_E" in m:
            m.write("routing.load_E", (), load_of(m))
        if "rows.rows_of_E" in m:
            m.write("rows.first_row_of_E", (), start_P * spec.block_rows)
            m.write("rows.rows_of_E", (), rows_P)
    slot_of_tile = torch.repeat_interleave(tiles_P)
    share = -(-num_tiles // m.size.token_tiles)
    for row_tile in range(tile * share, min((tile + 1) * share, num_tiles)):
        slot = int(slot_of_tile[row_tile])
        left = int(rows_P[slot]) - (row_tile - int(start_P[slot])) * spec.block_rows
        expert = slot if spec.split == "one" else m.read("slots.expert_of_P", slot)
        m.write("rows.expert_of_tile", row_tile, expert)
        m.write("rows.rows_of_tile", row_tile, min(left, spec.block_rows))
    for token in tokens_of(m, tile, spec.block_tokens):
        for choice in range(spec.top_k):
            place(m, tile, (token, choice), start_P)


def load_of(m: Memory) -> Tensor:
    """Return the choices of each expert, also those over capacity, [E]."""
    total_B = m.read("scratch.total_B")
    if m.spec.split != "slot":
        return total_B
    expert_of_P = m.read("slots.expert_of_P")
    return torch.stack([total_B[expert_of_P == e].sum() for e in range(m.spec.num_experts)])


def place(m: Memory, tile: int, at: tuple[int, int], start_P: Tensor) -> None:
    """Give one assignment its row, or drop it over capacity."""
    spec, row = m.spec, -1
    rank_in_tile = int(m.read("scratch.rank_TK", at))
    if rank_in_tile >= 0:
        named = "slot" if spec.split == "slot" else "expert"
        slot = bin_index = int(m.read(f"routing.{named}_of_TK", at))
        ordinal = rank_in_tile + int(m.read("scratch.base_GB", (tile, bin_index)))
        if spec.router.capped and ordinal >= m.size.capacity:
            m.write("routing.expert_of_TK", at, -1, again=True)
            m.write("routing.gate_TK", at, 0.0, again=True)
        else:
            if spec.split == "even":
                copies = int(m.read("slots.copies_of_E", bin_index))
                slot = int(m.read("slots.slots_of_EV", (bin_index, ordinal % copies)))
                ordinal //= copies
            row = int(start_P[slot]) * spec.block_rows + ordinal
            m.write("rows.assignment_of_C", row, at[0] * spec.top_k + at[1])
    m.write("rows.row_of_TK", at, row)
