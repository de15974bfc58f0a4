"""Choices that are not served: over an expert's capacity, or left out by a draw."""

import torch
from torch import Tensor


def drop_over_capacity(expert_of_TK: Tensor, capacity: int) -> Tensor:
    """Keep the first ``capacity`` choices of each expert in token order; the others become -1.

    Switch Transformers (arXiv 2101.03961) and GShard (arXiv 2006.16668) skip such tokens. Here a
    token's choices count together; GShard lets all first choices go ahead of all second ones.

    Example: capacity 1 turns [[0, 1], [0, 2]] into [[0, 1], [-1, 2]].
    """
    kept_TK = expert_of_TK.clone()
    for expert in expert_of_TK.unique().tolist():
        place_A2 = (expert_of_TK == expert).nonzero()[capacity:]
        kept_TK[place_A2[:, 0], place_A2[:, 1]] = -1
    return kept_TK


def drop_random_second(expert_of_T2: Tensor, gate_T2: Tensor, seed: int) -> Tensor:
    """Keep a token's second expert if twice its weight exceeds the token's draw; else -1.

    GShard's random routing (arXiv 2006.16668, algorithm 1): an expert of little weight is rarely
    worth its place. The draw depends on the seed and the token's index in the call alone.

    Args:
        expert_of_T2: integer ids.
        gate_T2: weights of the two.
        seed: in [0, 2^31).
    """
    served_T2 = torch.ones_like(expert_of_T2, dtype=torch.bool)
    served_T2[:, 1] = 2 * gate_T2[:, 1] > uniform(seed, len(expert_of_T2))
    return expert_of_T2.masked_fill(~served_T2, -1)


def uniform(seed: int, count: int) -> Tensor:
    """Return ``count`` float32 draws from [0, 1): number i is a function of the seed and i alone.

    The first word of Philox 4x32 with 10 rounds (Salmon et al., SC 2011) under counter (i, 0, 0,
    0) and key (seed, 0), as a signed 32-bit number folded to its magnitude and
    divided by 2^31.
    """
    mask = 0xFFFFFFFF
    words = torch.zeros(4, count, dtype=torch.int64)
    words[0] = torch.arange(count)
    key = [seed, 0]
    for _ in range(10):
        high_0, low_0 = multiply(words[0], 0xD2511F53)
        high_2, low_2 = multiply(words[2], 0xCD9E8D57)
        words = torch.stack([high_2 ^ words[1] ^ key[0], low_2, high_0 ^ words[3] ^ key[1], low_0])
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    word = words[0]
    magnitude = torch.where(word < 1 << 31, word, mask - word)
    # The factor is the greatest float32 that keeps every result below one.
    return magnitude.float() * torch.tensor(4.6566127342e-10)


def multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of word · factor, both unsigned 32-bit numbers in int64."""
    low = (word & 0xFFFF) * factor
    middle = (word >> 16) * factor + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
