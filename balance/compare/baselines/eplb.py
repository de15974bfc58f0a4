"""EPLB: replicate the hottest experts, pack the copies, and divide every expert evenly.

Written from the description in the README of deepseek-ai/EPLB, whose example it reproduces. It
knows one load per expert, no micro-batches, fills every slot, and may put two copies of an expert
on one rank.
"""

import numpy as np

from balance.compare.baselines.common import (
    Served,
    contiguous_ER,
    count_copies,
    divide_evenly,
    num_arrivals,
    pack_evenly,
)
from balance.topology import Topology

# Micro-batches between two plans of the variant that only knows the past.
_REPLAN_EVERY = 8


def eplb(
    load_E: np.ndarray, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
) -> np.ndarray:
    """expert_of_P of one layer, int64: which expert each slot holds.

    Groups of experts are packed into nodes, copies are made inside each node, and the copies are
    packed onto its ranks. When nodes do not divide groups, everything is one group on one node.

    Args:
        load_E: load of each expert, finite, not negative.
        num_slots: P, at least E, divided by num_ranks.
        num_groups: expert groups (of group-limited routing); divides E.
        num_nodes, num_ranks: nodes divide ranks.

    Raises:
        ValueError: on a count that does not divide, too few slots, or a bad load.
    """
    load_E = np.asarray(load_E, np.float64)
    _check_sizes(load_E, num_slots, num_groups, num_nodes, num_ranks)
    if num_groups % num_nodes:
        num_groups, num_nodes = 1, 1
    num_experts = len(load_E)
    experts_of_group = np.arange(num_experts).reshape(num_groups, -1)
    node_of_group, place_of_group = pack_evenly(load_E[experts_of_group].sum(1), num_nodes)
    order = np.lexsort((place_of_group, node_of_group))
    expert_of_NX = experts_of_group[order].reshape(num_nodes, -1)
    slots, ranks = num_slots // num_nodes, num_ranks // num_nodes
    return np.concatenate([_fill_node(load_E, own_X, slots, ranks) for own_X in expert_of_NX])


def replicate_hottest(load_X: np.ndarray, num_copies: int) -> np.ndarray:
    """Item of each copy, int64: every item once, then again and again the one with the most load
    per copy, ties to the lower index."""
    count_X = np.ones(len(load_X), np.int64)
    item_of_copy = list(range(len(load_X)))
    for _ in range(num_copies - len(load_X)):
        hottest = int((load_X / count_X).argmax())
        item_of_copy.append(hottest)
        count_X[hottest] += 1
    return np.array(item_of_copy, np.int64)


def eplb_per_batch(load_BE: np.ndarray, topology: Topology) -> Served:
    """One placement for the batch, from its true total load (an oracle a server does not have)."""
    copies_ER = place(load_BE.sum(0), topology)
    return _divide(load_BE, [copies_ER] * len(load_BE), topology)


def eplb_per_micro_batch(load_BE: np.ndarray, topology: Topology) -> Served:
    """A new placement for every micro-batch from its true load; every expert may move."""
    return _divide(load_BE, [place(load_E, topology) for load_E in load_BE], topology)


def eplb_from_past(load_BE: np.ndarray, topology: Topology) -> Served:
    """What a server does: every 8 micro-batches a placement from all loads seen so far."""
    copies = [contiguous_ER(topology, load_BE.shape[1])]
    for b in range(1, len(load_BE)):
        replan = b % _REPLAN_EVERY == 0
        copies.append(place(load_BE[:b].sum(0), topology) if replan else copies[-1])
    return _divide(load_BE, copies[: len(load_BE)], topology)


def place(load_E: np.ndarray, topology: Topology) -> np.ndarray:
    """copies_ER int64 of EPLB on the present ranks, experts ungrouped, all slots filled."""
    ranks = np.flatnonzero(topology.present_R)
    num_experts = len(load_E)
    num_slots = len(ranks) * topology.slots_per_rank(num_experts)
    expert_of_P = eplb(load_E, num_slots, 1, 1, len(ranks))
    copies_ER = np.zeros((num_experts, topology.num_ranks), np.int64)
    copies_ER[:, ranks] = count_copies(expert_of_P, num_experts, len(ranks))
    return copies_ER


def _divide(load_BE: np.ndarray, copies_of_B: list[np.ndarray], topology: Topology) -> Served:
    """Every micro-batch divided evenly over the copies_ER of its own placement."""
    before_ER = contiguous_ER(topology, load_BE.shape[1])
    num_copies, arrivals, loads = [], [], []
    for load_E, copies_ER in zip(load_BE, copies_of_B, strict=True):
        loads.append(divide_evenly(load_E, copies_ER))
        num_copies.append(copies_ER.sum() - len(load_E))
        arrivals.append(num_arrivals(copies_ER, before_ER))
        before_ER = copies_ER
    return Served(np.stack(loads), np.array(num_copies), np.array(arrivals))


def _fill_node(
    load_E: np.ndarray, expert_of_X: np.ndarray, num_slots: int, num_ranks: int
) -> np.ndarray:
    """Expert of each slot of a node that owns ``expert_of_X``."""
    load_X = load_E[expert_of_X]
    item_of_copy = replicate_hottest(load_X, num_slots)
    share = load_X[item_of_copy] / np.bincount(item_of_copy)[item_of_copy]
    rank_of_copy, place_of_copy = pack_evenly(share, num_ranks)
    expert_of_slot = np.empty(num_slots, np.int64)
    slot_of_copy = rank_of_copy * (num_slots // num_ranks) + place_of_copy
    expert_of_slot[slot_of_copy] = expert_of_X[item_of_copy]
    return expert_of_slot


def _check_sizes(
    load_E: np.ndarray, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
) -> None:
    """Refuse what ``eplb`` cannot place."""
    if not (np.isfinite(load_E).all() and (load_E >= 0).all()):
        raise ValueError(f"load_E must be finite and not negative, got {load_E.tolist()}")
    if num_slots < len(load_E) or num_slots % num_ranks:
        raise ValueError(
            f"num_slots must hold all {len(load_E)} experts and be a multiple of {num_ranks} "
            f"ranks, got {num_slots}"
        )
    if len(load_E) % num_groups:
        raise ValueError(f"num_groups must divide the {len(load_E)} experts, got {num_groups}")
    if num_ranks % num_nodes:
        raise ValueError(f"num_nodes must divide the {num_ranks} ranks, got {num_nodes}")
