"""Copies for nodes of more than eight ranks, one problem at a time.

The same bottleneck argument as ``balance.steps.copies`` with ``balance.exact.flow`` in place of the table
of sets: start from a greedy filling (the emptiest rank takes the largest piece that an overloaded
one has to give), then move one copy at a time out of the tight set while the level falls.
"""

from __future__ import annotations

import numpy as np
import torch

from balance.exact import flow
from balance.steps.copies import Search

# Experts and slots tried per move; each trial costs a flow.
TRIED_EXPERTS, TRIED_SLOTS, MAX_MOVES = 4, 4, 24


def choose_copies(
    load_NX: torch.Tensor,
    home_NX: torch.Tensor,
    rank_of_S: torch.Tensor,
    speed_D: torch.Tensor,
    bound_N: torch.Tensor,
    usable_NS: torch.Tensor | None = None,
    search: Search | None = None,
) -> torch.Tensor:
    """As ``balance.steps.copies.choose_copies``, for any number of ranks."""
    search = search or Search()
    copy_NS = np.full((len(load_NX), len(rank_of_S)), -1)
    usable = np.ones(copy_NS.shape, dtype=bool) if usable_NS is None else usable_NS.numpy()
    for n, load_X in enumerate(load_NX.double().numpy()):
        goal = float(bound_N[n]) * (1 + search.tolerance)
        problem = _Problem(load_X, home_NX[n].numpy(), rank_of_S.numpy(), speed_D.numpy())
        problem.fill(copy_NS[n], usable[n], goal, search.min_load)
        problem.improve(copy_NS[n], usable[n], goal, search.min_load)
        problem.prune(copy_NS[n], goal)
    return torch.from_numpy(copy_NS)


class _Problem:
    """One node in one micro-batch and layer."""

    def __init__(
        self, load_X: np.ndarray, home_X: np.ndarray, rank_of_S: np.ndarray, speed_D: np.ndarray
    ) -> None:
        self.load_X = load_X
        self.home_X = home_X
        self.rank_of_S = rank_of_S
        self.speed_D = speed_D

    def holds(self, copy_S: np.ndarray) -> np.ndarray:
        """[X, D] bool: which ranks hold a copy."""
        holds_XD = np.zeros((len(self.load_X), len(self.speed_D)), dtype=bool)
        holds_XD[np.arange(len(self.load_X)), self.home_X] = True
        holds_XD[copy_S[copy_S >= 0], self.rank_of_S[copy_S >= 0]] = True
        return holds_XD

    def level(self, copy_S: np.ndarray) -> tuple[float, np.ndarray]:
        """Time of the slowest rank after the best split, and the tight set."""
        return flow.best_level(self.load_X, self.holds(copy_S), self.speed_D)

    def fill(self, copy_S: np.ndarray, usable_S: np.ndarray, goal: float, min_load: int) -> None:
        """Give each free slot, most room first, the largest piece that an overloaded rank has."""
        room_D = goal * self.speed_D - np.bincount(
            self.home_X, self.load_X, minlength=len(self.speed_D)
        )
        left_X = np.where(self.load_X >= min_load, self.load_X, 0)
        for _ in range(len(copy_S)):
            free = np.flatnonzero((copy_S < 0) & usable_S & (room_D[self.rank_of_S] > 0))
            if not len(free) or (room_D >= 0).all():
                return
            slot = free[room_D[self.rank_of_S[free]].argmax()]
            rank = self.rank_of_S[slot]
            surplus_X = np.minimum(left_X, -room_D[self.home_X])
            surplus_X[self.holds(copy_S)[:, rank]] = 0
            piece_X = np.minimum(surplus_X, room_D[rank])
            expert = np.lexsort((-surplus_X, -piece_X))[0]
            if piece_X[expert] <= 0:
                usable_S = usable_S & (self.rank_of_S != rank)
                continue
            copy_S[slot] = expert
            left_X[expert] -= piece_X[expert]
            room_D[rank] -= piece_X[expert]
            room_D[self.home_X[expert]] += piece_X[expert]

    def improve(
        self, copy_S: np.ndarray, usable_S: np.ndarray, goal: float, min_load: int
    ) -> None:
        """Move copies out of the tight set while the level falls."""
        level, tight_D = self.level(copy_S)
        for _ in range(MAX_MOVES):
            if level <= goal:
                return
            trials = self._moves(copy_S, usable_S, tight_D, min_load)
            outcomes = [self.level(trial_S) for trial_S in trials]
            if not outcomes:
                return
            best = int(np.argmin([outcome[0] for outcome in outcomes]))
            if outcomes[best][0] >= level * (1 - 1e-9):
                return
            copy_S[:] = trials[best]
            level, tight_D = outcomes[best]

    def _moves(
        self, copy_S: np.ndarray, usable_S: np.ndarray, tight_D: np.ndarray, min_load: int
    ) -> list[np.ndarray]:
        holds_XD = self.holds(copy_S)
        locked = np.flatnonzero(
            ~(holds_XD & ~tight_D).any(1) & (self.load_X >= max(min_load, 1e-12))
        )
        experts = locked[np.argsort(-self.load_X[locked], kind="stable")][:TRIED_EXPERTS]
        outside = np.flatnonzero(usable_S & ~tight_D[self.rank_of_S])
        home_time_D = np.bincount(self.home_X, self.load_X, len(self.speed_D)) / self.speed_D
        order = np.lexsort((home_time_D[self.rank_of_S[outside]], copy_S[outside] >= 0))
        trials = []
        for slot in outside[order][:TRIED_SLOTS]:
            for expert in experts:
                trial_S = copy_S.copy()
                trial_S[slot] = expert
                trials.append(trial_S)
        return trials

    def prune(self, copy_S: np.ndarray, goal: float) -> None:
        """Take out copies, lightest expert first, while goal or level stay as they are."""
        limit = max(goal, self.level(copy_S)[0] * (1 + 1e-9))
        filled = np.flatnonzero(copy_S >= 0)
        for slot in filled[np.argsort(self.load_X[copy_S[filled]], kind="stable")]:
            expert, copy_S[slot] = copy_S[slot], -1
            if self.level(copy_S)[0] > limit:
                copy_S[slot] = expert
