"""Which rank plays which part, so that fewest homes move?

Ranks of equal speed in one node are interchangeable, and so are nodes with equal ranks: every plan
has twins with the same levels. The one that keeps most homes where they were is a best assignment
of ranks inside each pair of nodes, and then of nodes.
"""

import numpy as np

from balance.steps.present import Present

_NEVER = -(1 << 40)


def keep_most(rank_LE: np.ndarray, before_LE: np.ndarray, present: Present) -> np.ndarray:
    """New label of each present rank in each layer, int64 [L, D].

    Args:
        rank_LE: present rank of each expert's home.
        before_LE: present rank it had before, -1 for one that is missing now.
        present: ranks, their nodes and speeds.
    """
    num_ranks = len(present.ranks)
    label_LD = np.tile(np.arange(num_ranks), (len(rank_LE), 1))
    for label_D, rank_E, before_E in zip(label_LD, rank_LE, before_LE, strict=True):
        known = before_E >= 0
        stays_DD = np.zeros((num_ranks, num_ranks), dtype=np.int64)
        np.add.at(stays_DD, (rank_E[known], before_E[known]), 1)
        _label_layer(label_D, stays_DD, present)
    return label_LD


def _label_layer(label_D: np.ndarray, stays_DD: np.ndarray, present: Present) -> None:
    """``keep_most`` of one layer; stays_DD counts homes that were on rank d and are on rank e."""
    ranks_of_N = [present.ranks_of_node(node) for node in range(present.num_nodes)]
    every = range(len(ranks_of_N))
    gain_NN = np.full((len(every), len(every)), _NEVER * len(label_D))
    labels: dict[tuple[int, int], np.ndarray] = {}
    for here in every:
        for there in every:
            mine_D, theirs_D = ranks_of_N[here], ranks_of_N[there]
            if len(mine_D) == len(theirs_D):
                same_DD = present.speed_D[mine_D][:, None] == present.speed_D[theirs_D]
                gain_DD = np.where(same_DD, stays_DD[np.ix_(mine_D, theirs_D)], _NEVER)
                part_D = best_assignment(gain_DD)
                gain_NN[here, there] = gain_DD[np.arange(len(part_D)), part_D].sum()
                labels[here, there] = theirs_D[part_D]
    for here, there in enumerate(best_assignment(gain_NN).tolist()):
        label_D[ranks_of_N[here]] = labels[here, there]


def best_assignment(gain: np.ndarray) -> np.ndarray:
    """Column of each row, all different, with the largest sum of gains.

    The Hungarian method with potentials (Kuhn, 1955; Munkres, 1957), rows added one by one along
    shortest augmenting paths. Prefers the diagonal where it is as good as anything.

    Args:
        gain: int64, square.

    Returns:
        column of each row, int64.
    """
    # By hand: scipy.optimize.linear_sum_assignment breaks ties otherwise, and needs scipy.
    size = len(gain)
    cost = -gain * (size + 1) - np.eye(size, dtype=np.int64)
    row_price, column_price = np.zeros((2, size + 1), dtype=np.int64)
    row_of_column = np.full(size + 1, size)
    for row in range(size):
        row_of_column[size], column = row, size
        distance = np.full(size, np.iinfo(np.int64).max)
        came_from, done = np.full(size, size), np.zeros(size + 1, dtype=bool)
        while row_of_column[column] < size:
            done[column] = True
            tree_row = row_of_column[column]
            reduced = cost[tree_row] - row_price[tree_row] - column_price[:size]
            nearer = ~done[:size] & (reduced < distance)
            distance[nearer], came_from[nearer] = reduced[nearer], column
            open_columns = np.flatnonzero(~done[:size])
            step_to = int(open_columns[distance[open_columns].argmin()])
            step = distance[step_to]
            row_price[row_of_column[done]] += step
            column_price[done] -= step
            distance[open_columns] -= step
            column = step_to
        while column < size:
            row_of_column[column] = row_of_column[came_from[column]]
            column = came_from[column]
    return np.argsort(row_of_column[:size])
