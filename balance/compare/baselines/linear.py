"""LPLB-like: copies fixed for the batch, tokens split by a linear program per micro-batch.

DeepSeek's LPLB copies experts along a fixed graph of ranks. Here the copies are EPLB's, given the
batch's true loads, which is the stronger start; the program and its optimum are the same.
"""

import numpy as np

from balance.compare.baselines.common import Served, contiguous_ER, num_arrivals
from balance.compare.baselines.eplb import place
from balance.topology import Topology


def eplb_and_linear_split(load_BE: np.ndarray, topology: Topology) -> Served:
    """EPLB's placement from the batch's true load, and the best split over it."""
    copies_ER = place(load_BE.sum(0), topology)
    load_BER = np.stack([split(load_E, copies_ER > 0, topology.speed_R) for load_E in load_BE])
    arrivals_B = np.zeros(len(load_BE), np.int64)
    arrivals_B[:1] = num_arrivals(copies_ER, contiguous_ER(topology, load_BE.shape[1]))
    num_copies = int(np.count_nonzero(copies_ER)) - load_BE.shape[1]
    return Served(load_BER, np.full(len(load_BE), num_copies), arrivals_B)


def split(load_E: np.ndarray, holds_ER: np.ndarray, speed_R: np.ndarray) -> np.ndarray:
    """load_ER with the least time of the slowest rank, solved by HiGHS.

    minimise t subject to sum over r of x[e, r] = load[e], sum over e of x[e, r] <= t · speed[r].

    Args:
        load_E: assignments, not negative.
        holds_ER: bool, at least one rank for every expert, none of speed 0.
        speed_R: relative speeds.
    """
    # Here, so that importing balance does not need scipy.
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    total = load_E.sum()
    if total == 0:
        return np.zeros(holds_ER.shape)
    # One variable for each expert on each rank that holds it, and the time t last.
    expert_of_variable, rank_of_variable = np.nonzero(holds_ER)
    num_variables = len(expert_of_variable)
    present = np.flatnonzero(speed_R > 0)
    row_of_R = np.full(len(speed_R), -1)
    row_of_R[present] = np.arange(len(present))
    columns = np.arange(num_variables)
    limit = csr_array(
        (
            np.concatenate([np.ones(num_variables), -speed_R[present]]),
            (
                np.concatenate([row_of_R[rank_of_variable], np.arange(len(present))]),
                np.concatenate([columns, np.full(len(present), num_variables)]),
            ),
        ),
        shape=(len(present), num_variables + 1),
    )
    conserve = csr_array(
        (np.ones(num_variables), (expert_of_variable, columns)),
        shape=(len(load_E), num_variables + 1),
    )
    time = np.append(np.zeros(num_variables), 1.0)
    nothing = np.zeros(len(present))
    solution = linprog(time, limit, nothing, conserve, load_E / total, method="highs")
    if solution.status != 0:
        raise RuntimeError(f"HiGHS did not solve the split: {solution.message}")
    load_ER = np.zeros(holds_ER.shape)
    load_ER[expert_of_variable, rank_of_variable] = solution.x[:-1] * total
    return load_ER
