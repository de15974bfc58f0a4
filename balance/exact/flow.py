"""The best split over any number of ranks: Newton steps on minimum cuts, which are its proof.

Subset tables end at eight ranks. Beyond, a threshold t is feasible when a flow moves every rank's
surplus over ``t · speed`` to ranks with room, along copies. If not, the ranks that the surplus can
still reach form a set u whose load cannot leave it, so ``inside(u) / speed(u) > t`` is the next
threshold (Dinkelbach's method). It ends, exactly, at the maximum over all sets, and u proves it.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Flow:
    """Where the load went.

    Attributes:
        load_XD: load of expert x that rank d serves; zero where d holds no copy.
        stuck_D: bool, the ranks of a set whose load does not fit under the limits; None when
            everything fits.
    """

    load_XD: np.ndarray
    stuck_D: np.ndarray | None


def best_level(
    load_X: np.ndarray,
    holds_XD: np.ndarray,
    speed_D: np.ndarray,
    start_XD: np.ndarray | None = None,
) -> tuple[float, np.ndarray]:
    """Least possible time of the slowest rank, and the set of ranks that proves it.

    Args:
        load_X: loads, >= 0.
        holds_XD: bool, rank d holds a copy of expert x; at least one per expert.
        speed_D: > 0.
        start_XD: a split to start from, which saves time when it is good; None for any.

    Returns:
        The level, max over sets u of inside(u) / speed(u), and tight_D bool, the set.
    """
    load_XD = np.zeros(holds_XD.shape)
    if start_XD is None:
        load_XD[np.arange(len(load_X)), holds_XD.argmax(1)] = load_X
    else:
        load_XD += start_XD
    tight_D = np.ones(len(speed_D), dtype=bool)
    level = load_X.sum() / speed_D.sum()
    while True:
        flow = fit_under(load_XD, holds_XD, level * speed_D)
        if flow.stuck_D is None:
            return float(level), tight_D
        load_XD = flow.load_XD
        inside_X = ~(holds_XD & ~flow.stuck_D).any(1)
        higher = load_X[inside_X].sum() / speed_D[flow.stuck_D].sum()
        if higher <= level:
            return float(level), tight_D
        level, tight_D = higher, flow.stuck_D


def fit_under(load_XD: np.ndarray, holds_XD: np.ndarray, limit_D: np.ndarray) -> Flow:
    """Move load between copies until no rank is over its limit, or prove that this is impossible.

    Integer loads and limits give an integer flow; with floats, a 1e-12th of the total passes for
    nothing. Augments along shortest paths of ranks.

    Args:
        load_XD: a split to start from, zero where ``holds_XD`` is False.
        holds_XD: bool, where load may go.
        limit_D: most load per rank.
    """
    load_XD = load_XD.copy()
    shared_X = np.flatnonzero(holds_XD.sum(1) > 1)
    nothing = 0 if load_XD.dtype.kind in "iu" else 1e-12 * load_XD.sum()
    while True:
        over_D = load_XD.sum(0) - limit_D
        over_D[np.abs(over_D) <= nothing] = 0
        sources = np.flatnonzero(over_D > 0)
        if not len(sources):
            return Flow(load_XD, None)
        source = int(sources[0])
        path, reached_D = _path_to_room(source, load_XD, holds_XD, shared_X, over_D)
        if path is None:
            return Flow(load_XD, reached_D)
        amount = min(over_D[source], -over_D[path[-1][2]])
        amount = min(amount, *(load_XD[expert, giver] for expert, giver, _ in path))
        for expert, giver, taker in path:
            load_XD[expert, giver] -= amount
            load_XD[expert, taker] += amount


def _path_to_room(
    source: int,
    load_XD: np.ndarray,
    holds_XD: np.ndarray,
    shared_X: np.ndarray,
    over_D: np.ndarray,
) -> tuple[list[tuple[int, int, int]] | None, np.ndarray]:
    """Shortest chain of (expert, from rank, to rank) to a rank with room, and the ranks seen."""
    gives_XD, takes_XD = load_XD[shared_X] > 0, holds_XD[shared_X]
    reaches_DD = gives_XD.T.astype(np.float32) @ takes_XD.astype(np.float32) > 0
    reached_D = np.zeros(len(over_D), dtype=bool)
    reached_D[source] = True
    giver_D = np.full(len(over_D), -1)
    frontier = np.array([source])
    while len(frontier):
        takers = np.flatnonzero(reaches_DD[frontier].any(0) & ~reached_D)
        giver_D[takers] = frontier[reaches_DD[frontier][:, takers].argmax(0)]
        reached_D[takers] = True
        roomy = takers[over_D[takers] < 0]
        if len(roomy):
            ranks = _walk_back(giver_D, int(roomy[over_D[roomy].argmin()]))
            expert_of = {
                (g, t): int(shared_X[(gives_XD[:, g] & takes_XD[:, t]).argmax()])
                for g, t in pairwise(ranks)
            }
            return [(expert, g, t) for (g, t), expert in expert_of.items()], reached_D
        frontier = takers
    return None, reached_D


def _walk_back(giver_D: np.ndarray, rank: int) -> list[int]:
    """The ranks of a chain, from its source."""
    ranks = [rank]
    while giver_D[rank] >= 0:
        rank = int(giver_D[rank])
        ranks.append(rank)
    return ranks[::-1]
