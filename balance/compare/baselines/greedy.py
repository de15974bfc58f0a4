"""Copies for one micro-batch, chosen greedily, homes staying where they are.

Both methods keep copies inside the node of the home, as the planner does for a micro-batch.
"""

import numpy as np

from balance.compare.baselines.common import Served, at_home
from balance.topology import Topology

# Width, relative to the ideal, at which the bisection of the threshold stops.
_THRESHOLD_WIDTH = 1e-3
# LLEP's published default: a rank takes this much more than the mean.
_SPILL_FACTOR = 1.1


def threshold(load_BE: np.ndarray, topology: Topology) -> Served:
    """UltraEP-like: the least threshold at which a greedy export of surplus load succeeds.

    Source: UltraEP (arXiv 2606.04101), from its published description. Overloaded ranks, worst
    first, export their hottest experts to the rank of the node with the most room that has a free
    spare slot and no copy yet. No minimum of tokens per copy, and a finer bisection (0.1 %) than
    the published default.
    """
    home_rank_E = topology.contiguous_home_rank_E(load_BE.shape[1])
    return copy_greedily(load_BE, home_rank_E, topology)


def copy_greedily(load_BE: np.ndarray, home_rank_E: np.ndarray, topology: Topology) -> Served:
    """The threshold method from any homes; all copies arrive anew for each micro-batch."""
    home_BER = at_home(load_BE, home_rank_E, topology.num_ranks)
    load_BER = np.stack([_bisect(home_ER, topology) for home_ER in home_BER])
    copies_B = _extra_copies(load_BER, home_rank_E)
    return Served(load_BER, copies_B, copies_B)


def spill(load_BE: np.ndarray, topology: Topology) -> Served:
    """LLEP-like: the home rank keeps what fits under 1.1 × the mean of its node, the rest spills.

    Source: Least-Loaded Expert Parallelism (arXiv 2601.17111), from its published description.
    Experts, hottest first, spill to the rank of the node with the least load, counting what is
    still to be placed there. Slots are NOT limited: a rank may have to hold many foreign experts.
    """
    home_rank_E = topology.contiguous_home_rank_E(load_BE.shape[1])
    load_BER = np.stack([_spill_one(load_E, home_rank_E, topology) for load_E in load_BE])
    copies_B = _extra_copies(load_BER, home_rank_E)
    return Served(load_BER, copies_B, copies_B)


def _extra_copies(load_BER: np.ndarray, home_rank_E: np.ndarray) -> np.ndarray:
    """copies_B: ranks other than the home that serve some of an expert."""
    used_BER = load_BER > 0
    used_BER[:, np.arange(len(home_rank_E)), home_rank_E] = False
    return used_BER.sum((1, 2))


def _bisect(home_ER: np.ndarray, topology: Topology) -> np.ndarray:
    """load_ER under the least threshold for which ``_export`` succeeds."""
    best_ER = home_ER
    ideal = home_ER.sum() / topology.speed_R.sum()
    present_R = topology.present_R
    low = ideal
    high = float((home_ER.sum(0)[present_R] / topology.speed_R[present_R]).max())
    while high - low > _THRESHOLD_WIDTH * ideal:
        middle = (low + high) / 2
        load_ER = _export(home_ER, middle * topology.speed_R, topology)
        if load_ER is None:
            low = middle
        else:
            best_ER, high = load_ER, middle
    return best_ER


def _export(home_ER: np.ndarray, limit_R: np.ndarray, topology: Topology) -> np.ndarray | None:
    """load_ER with every rank at or below its limit, or None when the greedy gets stuck."""
    load_ER = home_ER.copy()
    room_R = limit_R - home_ER.sum(0)
    spare_R = np.where(topology.present_R, topology.spare_slots_per_rank, 0)
    for rank in np.argsort(room_R, kind="stable"):
        if room_R[rank] >= 0:
            break
        same_node_R = topology.node_of_R == topology.node_of_R[rank]
        for expert in np.argsort(-home_ER[:, rank], kind="stable"):
            if room_R[rank] >= 0 or home_ER[expert, rank] == 0:
                break
            _export_expert(load_ER, room_R, spare_R, same_node_R, expert, rank)
        # A rounding error is not a surplus.
        if room_R[rank] < -1e-9 * limit_R[rank]:
            return None
    return load_ER


def _export_expert(
    load_ER: np.ndarray,
    room_R: np.ndarray,
    spare_R: np.ndarray,
    same_node_R: np.ndarray,
    expert: int,
    rank: int,
) -> None:
    """Copy one expert of an overloaded rank to ranks with room, until it fits or none is left."""
    while room_R[rank] < 0 and load_ER[expert, rank] > 0:
        open_R = same_node_R & (room_R > 0) & (spare_R > 0) & (load_ER[expert] == 0)
        if not open_R.any():
            return
        target = int(np.where(open_R, room_R, -np.inf).argmax())
        amount = min(-room_R[rank], load_ER[expert, rank], room_R[target])
        load_ER[expert, rank] -= amount
        load_ER[expert, target] += amount
        room_R[rank] += amount
        room_R[target] -= amount
        spare_R[target] -= 1


def _spill_one(load_E: np.ndarray, home_rank_E: np.ndarray, topology: Topology) -> np.ndarray:
    """load_ER of one micro-batch."""
    speed_R = topology.speed_R
    load_ER = np.zeros((len(load_E), len(speed_R)))
    placed_R = np.bincount(home_rank_E, weights=load_E, minlength=len(speed_R))
    load_N = np.bincount(topology.node_of_R, weights=placed_R)
    speed_N = np.bincount(topology.node_of_R, weights=speed_R).clip(min=1e-30)
    limit_R = _SPILL_FACTOR * speed_R * (load_N / speed_N)[topology.node_of_R]
    for expert in np.argsort(-load_E, kind="stable"):
        home = home_rank_E[expert]
        placed_R[home] -= load_E[expert]
        left = load_E[expert]
        same_node_R = topology.node_of_R == topology.node_of_R[home]
        open_R = same_node_R & topology.present_R
        rank = home
        while left > 0:
            fits = limit_R[rank] - placed_R[rank]
            open_R[rank] = False
            # Together the limits hold 1.1 × the load; only a rounding error gets to the last rank.
            amount = left if not open_R.any() else min(left, max(fits, 0.0))
            load_ER[expert, rank] += amount
            placed_R[rank] += amount
            left -= amount
            time_R = np.divide(placed_R, speed_R, out=np.full_like(placed_R, np.inf), where=open_R)
            rank = int(time_R.argmin())
    return load_ER
