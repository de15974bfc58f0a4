"""What every baseline is given and what it answers, layer by layer."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from balance.topology import Topology


@dataclass(frozen=True)
class Served:
    """How one layer's load is served, micro-batch by micro-batch.

    Attributes:
        load_BER: assignments of each expert that each rank serves, float64; fractional where the
            method divides evenly.
        copies_B: copies in use beyond one per expert.
        arrivals_B: expert weights that must reach a rank that did not hold them before.
    """

    load_BER: np.ndarray
    copies_B: np.ndarray
    arrivals_B: np.ndarray


# From the loads [B, E] of one layer, float64.
Baseline = Callable[[np.ndarray, Topology], Served]


def at_home(load_BE: np.ndarray, home_rank_E: np.ndarray, num_ranks: int) -> np.ndarray:
    """load_BER when every expert has one copy, on its home rank."""
    load_BER = np.zeros((*load_BE.shape, num_ranks))
    load_BER[:, np.arange(load_BE.shape[1]), home_rank_E] = load_BE
    return load_BER


def divide_evenly(load_BE: np.ndarray, copies_ER: np.ndarray) -> np.ndarray:
    """load_BER when the copies of an expert (how many each rank holds) get equal shares."""
    return load_BE[..., None] * (copies_ER / copies_ER.sum(1, keepdims=True))


def count_copies(expert_of_P: np.ndarray, num_experts: int, num_ranks: int) -> np.ndarray:
    """copies_ER int64: how many copies of each expert each rank holds; -1 is an empty slot."""
    copies_ER = np.zeros((num_experts, num_ranks), np.int64)
    rank_of_P = np.arange(len(expert_of_P)) // (len(expert_of_P) // num_ranks)
    filled_P = expert_of_P >= 0
    np.add.at(copies_ER, (expert_of_P[filled_P], rank_of_P[filled_P]), 1)
    return copies_ER


def contiguous_ER(topology: Topology, num_experts: int) -> np.ndarray:
    """copies_ER int64 of contiguous homes: where training starts from."""
    copies_ER = np.zeros((num_experts, topology.num_ranks), np.int64)
    copies_ER[np.arange(num_experts), topology.contiguous_home_rank_E(num_experts)] = 1
    return copies_ER


def num_arrivals(copies_ER: np.ndarray, before_ER: np.ndarray) -> int:
    """(expert, rank) pairs that are held now and were not before."""
    return int(np.count_nonzero((copies_ER > 0) & (before_ER == 0)))


def pack_evenly(weight_X: np.ndarray, num_packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Longest processing time first, with the same number of items in every pack.

    Args:
        weight_X: item weights; num_packs divides their number.

    Returns:
        pack_of_X and place_of_X, int64: the heaviest item first to the lightest pack with room,
        ties to the lower index, places counted in that order.
    """
    size, remainder = divmod(len(weight_X), num_packs)
    if remainder:
        raise ValueError(f"num_packs must divide the {len(weight_X)} items, got {num_packs}")
    pack_of_X = np.zeros(len(weight_X), np.int64)
    place_of_X = np.zeros(len(weight_X), np.int64)
    total = np.zeros(num_packs)
    filled = np.zeros(num_packs, np.int64)
    for x in np.argsort(-weight_X, kind="stable"):
        pack = int(np.where(filled < size, total, np.inf).argmin())
        pack_of_X[x], place_of_X[x] = pack, filled[pack]
        total[pack] += weight_X[x]
        filled[pack] += 1
    return pack_of_X, place_of_X
