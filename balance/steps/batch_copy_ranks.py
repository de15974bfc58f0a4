"""Where in its node does a batch-static copy sit, and beside which homes?

A rank whose spare slots all hold batch-static copies can give load to its node but take none. In a
micro-batch where its homes and those copies ask for less than its part of the whole, every other
rank has to work for it. So a copy goes to the rank that lacks least, and where homes are free to
move inside the node, they trade ranks as long as that lowers

    sum over micro-batches and full ranks of max(0, part - homes - copies)^2.

What a copy finds to do is estimated as an equal part of its expert's load.
"""

from dataclasses import dataclass

import numpy as np

from balance.steps.present import Present
from balance.steps.swaps import seat_all


@dataclass(frozen=True)
class Seats:
    """Ranks of one layer's batch-static copies and homes.

    Attributes:
        rank_J: present rank of each copy, -1 for none.
        depth_J: which of the rank's spare slots it takes, -1 for none.
        rank_E: present rank of each home.
    """

    rank_J: np.ndarray
    depth_J: np.ndarray
    rank_E: np.ndarray


def choose_seats(
    rest_BE: np.ndarray,
    share_BJ: np.ndarray,
    rank_E: np.ndarray,
    copy_J: np.ndarray,
    node_of_J: np.ndarray,
    present: Present,
    spares_per_rank: int,
    homes_are_free: bool,
) -> Seats:
    """Seat the batch-static copies of one layer.

    Args:
        rest_BE: units per micro-batch and expert that its home node serves.
        share_BJ: units that each copy's node serves.
        rank_E: present rank of each home.
        copy_J: expert of each copy, -1 for none.
        node_of_J: node of each copy.
        present: ranks, nodes, speeds, home seats.
        spares_per_rank: spare slots of each rank.
        homes_are_free: may homes trade ranks inside their node?
    """
    load_BE = rest_BE.astype(np.float64)
    total_B = load_BE.sum(1) + share_BJ.sum(1)
    lack_BD = total_B[:, None] * (present.speed_D / present.speed_D.sum())
    lack_BD -= present.rank_load(load_BE[:, None], rank_E[None])[:, 0]
    rank_J, depth_J = np.full_like(copy_J, -1), np.full_like(copy_J, -1)
    count_D = np.zeros(len(present.ranks), dtype=np.int64)
    for entry in np.flatnonzero(copy_J >= 0):
        left_BD = lack_BD - share_BJ[:, entry, None]
        is_last_D = count_D + 1 == spares_per_rank
        cost_D = np.where(is_last_D, np.square(np.maximum(left_BD, 0)).sum(0), 0)
        ranks = present.ranks_of_node(node_of_J[entry])
        order = np.lexsort((lack_BD.sum(0)[ranks], cost_D[ranks], count_D[ranks]))
        rank = ranks[order[0]]
        rank_J[entry], depth_J[entry] = rank, count_D[rank]
        count_D[rank] += 1
        lack_BD[:, rank] = left_BD[:, rank]
    if homes_are_free:
        full_D = count_D == spares_per_rank
        for node in range(present.num_nodes):
            here_D = present.node_of_D == node
            rank_E = _trade_homes(load_BE, rank_E, lack_BD, full_D & here_D, here_D, present)
    return Seats(rank_J, depth_J, rank_E)


def _trade_homes(
    load_BE: np.ndarray,
    rank_E: np.ndarray,
    lack_BD: np.ndarray,
    full_D: np.ndarray,
    here_D: np.ndarray,
    present: Present,
) -> np.ndarray:
    """Best trade first, between full ranks and the others of one node; updates ``lack_BD``."""
    if not full_D.any():
        return rank_E
    rank_X = seat_all(rank_E, present.seats_D)
    load_BX = np.pad(load_BE, ((0, 0), (0, len(rank_X) - len(rank_E))))
    while True:
        mine, theirs = np.flatnonzero(full_D[rank_X]), np.flatnonzero((here_D & ~full_D)[rank_X])
        if not len(mine) or not len(theirs):
            break
        lack_Bx = lack_BD[:, rank_X[mine]]
        after_BxX = (lack_Bx + load_BX[:, mine])[:, :, None] - load_BX[:, None, theirs]
        gain_xX = np.square(np.maximum(lack_Bx, 0)).sum(0)[:, None]
        gain_xX = gain_xX - np.square(np.maximum(after_BxX, 0)).sum(0)
        m, x = np.unravel_index(gain_xX.argmax(), gain_xX.shape)
        if gain_xX[m, x] <= 1e-9 * np.square(load_BE).sum():
            break
        one, other = mine[m], theirs[x]
        shift_B = load_BX[:, other] - load_BX[:, one]
        lack_BD[:, rank_X[one]] -= shift_B
        lack_BD[:, rank_X[other]] += shift_B
        rank_X[one], rank_X[other] = rank_X[other], rank_X[one]
    return rank_X[: len(rank_E)]
