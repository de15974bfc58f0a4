"""Whole experts on the move: per micro-batch (FEPLB-like) or per batch (ReLibra-like)."""

import numpy as np

from balance.compare.baselines.common import Served, at_home, num_arrivals
from balance.compare.baselines.greedy import copy_greedily
from balance.topology import Topology

# FEPLB recommends four movable experts on each device.
_MOVABLE_PER_RANK = 4
_ANNEAL_STEPS = 4000
# Start and end temperature, relative to the cost of a perfectly balanced batch.
_ANNEAL_HEAT = (3e-3, 1e-6)
# The p-norm that stands for the maximum while annealing.
_SMOOTHNESS = 8.0


def migrate(load_BE: np.ndarray, topology: Topology) -> Served:
    """FEPLB-like: per micro-batch, the hottest experts of each rank move whole inside the node.

    Source: FEPLB (arXiv 2604.19654), from its published description. Up to four experts a rank
    are movable; hottest first, each goes to the least loaded rank of its node that has a place
    left for one. Experts are never split. A micro-batch that this would make worse stays as it is.
    """
    home_rank_E = topology.contiguous_home_rank_E(load_BE.shape[1])
    load_BER = np.stack([_migrate_one(load_E, home_rank_E, topology) for load_E in load_BE])
    away_BE = (load_BER.argmax(2) != home_rank_E) & (load_BE > 0)
    return Served(load_BER, np.zeros(len(load_BE), np.int64), away_BE.sum(1))


def anneal_and_copy(load_BE: np.ndarray, topology: Topology) -> Served:
    """ReLibra-like: annealed expert order for the batch, greedy copies per micro-batch.

    Source: ReLibra (arXiv 2605.08639), from its abstract and excerpts: swaps of experts between
    nodes (between ranks when there is one node) under simulated annealing of a smoothed maximum
    load, summed over micro-batches; then copies inside each node. Its communication term and its
    copy heuristic are not published in full; the copies here are the greedy threshold's.
    """
    num_experts = load_BE.shape[1]
    home_rank_E = topology.contiguous_home_rank_E(num_experts)
    place_of_R = topology.node_of_R if topology.num_nodes > 1 else np.arange(topology.num_ranks)
    place_E = anneal(load_BE, place_of_R[home_rank_E], np.bincount(place_of_R, topology.speed_R))
    if topology.num_nodes > 1:
        home_rank_E = _ranks_in_nodes(load_BE.sum(0), place_E, home_rank_E, topology)
    else:
        home_rank_E = place_E
    served = copy_greedily(load_BE, home_rank_E, topology)
    start_E = topology.contiguous_home_rank_E(num_experts)
    ones = np.ones((1, num_experts))
    moved = num_arrivals(
        at_home(ones, home_rank_E, topology.num_ranks)[0],
        at_home(ones, start_E, topology.num_ranks)[0],
    )
    arrivals_B = served.arrivals_B.copy()
    arrivals_B[:1] += moved
    return Served(served.load_BER, served.copies_B, arrivals_B)


def anneal(load_BE: np.ndarray, place_E: np.ndarray, speed_G: np.ndarray) -> np.ndarray:
    """place_E after swaps that lower the sum over micro-batches of the p-norm of place times.

    Args:
        load_BE: loads.
        place_E: place (a node, or a rank) of each expert at the start; how many experts a place
            has never changes.
        speed_G: capacity of each place; places of capacity 0 must be empty.
    """
    places = np.flatnonzero(np.bincount(place_E, minlength=len(speed_G)))
    if len(places) < 2 or not load_BE.sum():
        return place_E
    rng = np.random.default_rng(0)
    place_E = place_E.copy()
    scale_G = np.divide(1.0, speed_G, out=np.zeros_like(speed_G), where=speed_G > 0)
    scale_G *= speed_G.sum() * len(load_BE) / load_BE.sum()
    load_EB = np.ascontiguousarray(load_BE.T)
    time_GB = np.zeros((len(speed_G), len(load_BE)))
    np.add.at(time_GB, place_E, load_EB * scale_G[place_E][:, None])
    cost_B = _p_norm(time_GB)
    best, best_E, cost = cost_B.sum(), place_E.copy(), cost_B.sum()
    heat = np.geomspace(*_ANNEAL_HEAT, _ANNEAL_STEPS) * len(load_BE)
    draws = rng.integers(len(place_E), size=(_ANNEAL_STEPS, 2))
    accept = -np.log(rng.random(_ANNEAL_STEPS))
    for step, (one, other) in enumerate(draws):
        here, there = place_E[one], place_E[other]
        if here == there:
            continue
        delta_B = load_EB[other] - load_EB[one]
        trial_GB = time_GB.copy()
        trial_GB[here] += delta_B * scale_G[here]
        trial_GB[there] -= delta_B * scale_G[there]
        trial = _p_norm(trial_GB).sum()
        if trial - cost > heat[step] * accept[step]:
            continue
        time_GB, cost = trial_GB, trial
        place_E[one], place_E[other] = there, here
        if cost < best:
            best, best_E = cost, place_E.copy()
    return best_E


def _p_norm(time_GB: np.ndarray) -> np.ndarray:
    """Smooth stand-in for the slowest place's time, for each micro-batch."""
    # Rounding may leave -1e-17 where a place has no load.
    return (time_GB.clip(min=0) ** _SMOOTHNESS).sum(0) ** (1 / _SMOOTHNESS)


def _ranks_in_nodes(
    load_E: np.ndarray, node_E: np.ndarray, start_E: np.ndarray, topology: Topology
) -> np.ndarray:
    """home_rank_E: inside each node, hottest first to the fastest finishing rank with a place."""
    places_R = np.bincount(start_E, minlength=topology.num_ranks)
    return _longest_first(load_E, node_E, places_R, np.zeros(topology.num_ranks), topology)


def _longest_first(
    load_X: np.ndarray,
    node_X: np.ndarray,
    places_R: np.ndarray,
    load_R: np.ndarray,
    topology: Topology,
) -> np.ndarray:
    """rank_X: hottest first, to the rank of its node that would finish it first."""
    places_R, load_R = places_R.copy(), load_R.copy()
    rank_X = np.zeros(len(load_X), np.int64)
    for x in np.argsort(-load_X, kind="stable"):
        open_R = (places_R > 0) & (topology.node_of_R == node_X[x]) & topology.present_R
        time_R = np.divide(
            load_R + load_X[x], topology.speed_R, out=np.full_like(load_R, np.inf), where=open_R
        )
        rank_X[x] = time_R.argmin()
        places_R[rank_X[x]] -= 1
        load_R[rank_X[x]] += load_X[x]
    return rank_X


def _migrate_one(load_E: np.ndarray, home_rank_E: np.ndarray, topology: Topology) -> np.ndarray:
    """load_ER of one micro-batch."""
    num_ranks = topology.num_ranks
    order = np.lexsort((-load_E, home_rank_E))
    first_of_rank = np.searchsorted(home_rank_E[order], home_rank_E[order])
    movable = order[np.arange(len(order)) - first_of_rank < _MOVABLE_PER_RANK]
    fixed_E = load_E.copy()
    fixed_E[movable] = 0
    fixed_R = np.bincount(home_rank_E, weights=fixed_E, minlength=num_ranks)
    places_R = np.bincount(home_rank_E[movable], minlength=num_ranks)
    places_R += topology.spare_slots_per_rank
    rank_E = home_rank_E.copy()
    rank_E[movable] = _longest_first(
        load_E[movable], topology.node_of_R[home_rank_E[movable]], places_R, fixed_R, topology
    )
    moved, stayed = (at_home(load_E[None], rank, num_ranks)[0] for rank in (rank_E, home_rank_E))
    return moved if _slowest(moved, topology) < _slowest(stayed, topology) else stayed


def _slowest(load_ER: np.ndarray, topology: Topology) -> float:
    """Time of the slowest present rank."""
    present_R = topology.present_R
    return float((load_ER.sum(0)[present_R] / topology.speed_R[present_R]).max())
