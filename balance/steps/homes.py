"""Which rank owns each expert, once per batch and layer.

Homes are chosen from per-micro-batch loads, which replay knows, and not from batch sums: experts
that are hot in the same micro-batches must not share a node, whatever their sums. A home that
moves takes its optimizer state along, so moves against the previous homes can be limited.
"""

import numpy as np

from balance.steps.nearness import Nearness
from balance.steps.present import Present
from balance.steps.swaps import Limits, improve_by_swaps
from balance.topology import Topology


def reorder_homes(
    load_BLE: np.ndarray,
    previous_LE: np.ndarray,
    topology: Topology,
    move_budget: int | None = None,
    nearness: Nearness | None = None,
) -> np.ndarray:
    """Choose the home rank of every expert of every layer.

    Without a budget: swaps between nodes, from the previous homes and from longest load first,
    whichever ends better; then longest load first onto the ranks of each node. With a budget:
    only swaps, best first, from the previous homes.

    Args:
        load_BLE: assignments per micro-batch, layer and expert.
        previous_LE: home ranks so far, all present.
        topology: nodes, ranks, speeds.
        move_budget: most experts of a layer whose home rank may change; None for any number.
        nearness: what saves travel, ``near_LED`` over all ranks; None ignores travel.

    Returns:
        home_rank_LE int64.
    """
    load_LBE = np.ascontiguousarray(load_BLE.transpose(1, 0, 2), dtype=np.float32)
    present = Present.of(topology, load_BLE.shape[2])
    if nearness is not None:
        nearness = nearness.of_ranks(present.ranks)
    rank_LE = np.searchsorted(present.ranks, previous_LE)
    limits = Limits(rank_LE, move_budget, None)
    # The previous homes first: of equal ends, the one with fewer moves.
    starts = [rank_LE] if move_budget is not None or nearness is None else []
    if move_budget is None:
        starts.append(_spread_over_nodes(load_LBE, present))
    ends = [
        _swap(load_LBE, start_LE, present, present.node_of_D, limits, nearness)
        for start_LE in starts
    ]
    node_times = [_slowest_node_L(load_LBE, end_LE, present) for end_LE in ends]
    rank_LE = np.stack(ends)[np.argmin(node_times, axis=0), np.arange(len(rank_LE))]
    if move_budget is None:
        rank_LE = spread_inside_nodes(load_LBE.sum(1), rank_LE, present)
    # Spare slots level the ranks of a node better than swaps, which matter where there are none,
    # where few homes may move, or where travel counts.
    if topology.spare_slots_per_rank == 0 or move_budget is not None or nearness is not None:
        limits = Limits(limits.before_LE, move_budget, present.node_of_D)
        every_rank = np.arange(len(present.ranks))
        rank_LE = _swap(load_LBE, rank_LE, present, every_rank, limits, nearness)
    return present.ranks[rank_LE]


def _slowest_node_L(load_LBE: np.ndarray, rank_LE: np.ndarray, present: Present) -> np.ndarray:
    """Time of the slowest node, summed over micro-batches."""
    load_BLD = present.rank_load(load_LBE.transpose(1, 0, 2), rank_LE)
    at_node_DN = present.node_of_D[:, None] == np.arange(present.num_nodes)
    speed_N = present.speed_D @ at_node_DN
    return (load_BLD @ at_node_DN / speed_N).max(2).sum(0)


def _swap(
    load_LBE: np.ndarray,
    rank_LE: np.ndarray,
    present: Present,
    place_of_D: np.ndarray,
    limits: Limits,
    nearness: Nearness | None,
) -> np.ndarray:
    """``improve_by_swaps`` on present ranks."""
    return improve_by_swaps(
        load_LBE, rank_LE, present.seats_D, present.speed_D, place_of_D, limits, nearness
    )


def _spread_over_nodes(load_LBE: np.ndarray, present: Present) -> np.ndarray:
    """Longest first onto nodes by batch sums; any free seat of the node."""
    seats_N = np.bincount(present.node_of_D, present.seats_D).astype(np.int64)
    node_LE = longest_first(load_LBE.sum(1), seats_N, present.speed_N)
    rank_LE = np.empty_like(node_LE)
    for rank_E, node_E in zip(rank_LE, node_LE, strict=True):
        for node in range(len(seats_N)):
            ranks = present.ranks_of_node(node)
            experts = np.flatnonzero(node_E == node)
            rank_E[experts] = np.repeat(ranks, present.seats_D[ranks])[: len(experts)]
    return rank_LE


def spread_inside_nodes(load_LE: np.ndarray, rank_LE: np.ndarray, present: Present) -> np.ndarray:
    """Longest first onto the ranks of the node that each expert is on.

    Args:
        load_LE: assignments of the batch.
        rank_LE: present rank of each expert; only its node matters.
        present: the ranks.

    Returns:
        rank_LE int64.
    """
    node_LE = present.node_of_D[rank_LE]
    spread_LE = np.empty_like(rank_LE)
    for node in range(present.num_nodes):
        seats_D = np.where(present.node_of_D == node, present.seats_D, 0)
        here_LE = node_LE == node
        seated_LE = longest_first(load_LE, seats_D, present.speed_D, here_LE)
        spread_LE = np.where(here_LE, seated_LE, spread_LE)
    return spread_LE


def longest_first(
    load_LE: np.ndarray,
    seats_G: np.ndarray,
    speed_G: np.ndarray,
    chosen_LE: np.ndarray | None = None,
) -> np.ndarray:
    """Each expert, heaviest first, to the place that is least loaded for its speed and has a seat.

    The longest-processing-time rule (Graham, 1969) with limited seats.

    Args:
        load_LE: loads.
        seats_G: experts that each place can hold.
        speed_G: > 0.
        chosen_LE: bool, experts to place; None means all. There must be seats for all of them.

    Returns:
        place_LE int64; -1 for experts not chosen.
    """
    chosen_LE = np.ones(load_LE.shape, bool) if chosen_LE is None else chosen_LE
    order_LE = np.argsort(np.where(chosen_LE, -load_LE.astype(np.float64), np.inf), 1, "stable")
    place_LE = np.full(load_LE.shape, -1)
    load_LG = np.zeros((len(load_LE), len(seats_G)))
    left_LG = np.tile(seats_G, (len(load_LE), 1))
    for expert_L in order_LE.T:
        layer_L = np.flatnonzero(chosen_LE[np.arange(len(load_LE)), expert_L])
        expert_L = expert_L[layer_L]
        after_LG = (load_LG[layer_L] + load_LE[layer_L, expert_L][:, None]) / speed_G
        place_L = np.where(left_LG[layer_L] > 0, after_LG, np.inf).argmin(1)
        place_LE[layer_L, expert_L] = place_L
        load_LG[layer_L, place_L] += load_LE[layer_L, expert_L]
        left_LG[layer_L, place_L] -= 1
    return place_LE


def rehome(home_rank_LE: np.ndarray, load_LE: np.ndarray, topology: Topology) -> np.ndarray:
    """Give the experts of missing ranks new homes; no other expert moves.

    Heaviest first, to the rank with a free home slot on the node, then the rank, that is least
    loaded for its speed.

    Args:
        home_rank_LE: home ranks, some of them missing now.
        load_LE: assignments of the batch.
        topology: says who is missing; its home slots must have room.

    Returns:
        home_rank_LE int64 on present ranks.

    Raises:
        ValueError: a present rank already holds more experts than it has home slots.
    """
    home_rank_LE = home_rank_LE.copy()
    for home_rank_E, load_E in zip(home_rank_LE, load_LE, strict=True):
        _rehome_layer(home_rank_E, load_E, topology)
    return home_rank_LE


def _rehome_layer(home_rank_E: np.ndarray, load_E: np.ndarray, topology: Topology) -> None:
    """``rehome`` of one layer, in place."""
    present_R, seats = topology.present_R, topology.home_slots(len(home_rank_E))
    stranded = np.flatnonzero(~present_R[home_rank_E])
    count_R = np.bincount(home_rank_E, minlength=topology.num_ranks) * present_R
    if count_R.max() > seats:
        raise ValueError(
            f"previous must fit {seats} home slots per rank, got {count_R.max()} experts on "
            f"rank {count_R.argmax()}"
        )
    load_R = np.bincount(home_rank_E, load_E, topology.num_ranks) * present_R
    for expert in stranded[np.argsort(-load_E[stranded], kind="stable")]:
        rank = _least_loaded(load_R, present_R & (count_R < seats), topology)
        home_rank_E[expert] = rank
        load_R[rank] += load_E[expert]
        count_R[rank] += 1


def _least_loaded(load_R: np.ndarray, open_R: np.ndarray, topology: Topology) -> int:
    """The open rank whose node, and then which itself, is least loaded for its speed."""
    speed_R, node_of_R = topology.speed_R, topology.node_of_R
    speed_N = np.bincount(node_of_R, speed_R)
    time_N = np.bincount(node_of_R, load_R) / np.where(speed_N, speed_N, 1)
    time_R = load_R / np.where(speed_R > 0, speed_R, 1)
    ranks = np.flatnonzero(open_R)
    return int(ranks[np.lexsort((time_R[ranks], time_N[node_of_R[ranks]]))[0]])
