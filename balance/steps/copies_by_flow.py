"""Copies for nodes of more than eight ranks, one problem at a time.

The same bottleneck argument as in ``balance.steps.copies``, with flows (``balance.exact.flow``) in
place of the table of sets: start from a greedy filling (the emptiest rank takes the largest piece
that an overloaded one has to give), then move one copy at a time out of the tight set while the
level falls.
"""

import numpy as np
import torch

from balance.exact import flow
from balance.steps.copies import Search

# Experts and slots tried per move; each trial costs a flow.
TRIED_EXPERTS, TRIED_SLOTS, MAX_MOVES = 4, 4, 24


def choose_copies_by_flow(
    load_FX: torch.Tensor,
    home_FX: torch.Tensor,
    rank_of_J: torch.Tensor,
    speed_D: torch.Tensor,
    bound_F: torch.Tensor,
    usable_FJ: torch.Tensor | None = None,
    search: Search | None = None,
) -> torch.Tensor:
    """As ``balance.steps.copies.choose_copies``, for any number of ranks."""
    search = search or Search()
    copy_FJ = np.full((len(load_FX), len(rank_of_J)), -1)
    if usable_FJ is None:
        usable_FJ = torch.ones(copy_FJ.shape, dtype=torch.bool)
    for f, load_X in enumerate(load_FX.double().numpy()):
        goal = float(bound_F[f]) * (1 + search.tolerance)
        problem = _Problem(load_X, home_FX[f].numpy(), rank_of_J.numpy(), speed_D.numpy())
        usable_J = usable_FJ[f].numpy()
        problem.fill_greedily(copy_FJ[f], usable_J, goal, search.min_load)
        problem.improve(copy_FJ[f], usable_J, goal, search.min_load)
        problem.take_out_needless(copy_FJ[f], goal)
    return torch.from_numpy(copy_FJ)


class _Problem:
    """One node in one micro-batch and layer."""

    def __init__(
        self, load_X: np.ndarray, home_X: np.ndarray, rank_of_J: np.ndarray, speed_D: np.ndarray
    ) -> None:
        self.load_X = load_X
        self.home_X = home_X
        self.rank_of_J = rank_of_J
        self.speed_D = speed_D

    def holds(self, copy_J: np.ndarray) -> np.ndarray:
        """[X, D] bool: which ranks hold a copy."""
        holds_XD = np.zeros((len(self.load_X), len(self.speed_D)), dtype=bool)
        holds_XD[np.arange(len(self.load_X)), self.home_X] = True
        holds_XD[copy_J[copy_J >= 0], self.rank_of_J[copy_J >= 0]] = True
        return holds_XD

    def level(self, copy_J: np.ndarray) -> tuple[float, np.ndarray]:
        """Time of the slowest rank after the best split, and the tight set."""
        return flow.best_level(self.load_X, self.holds(copy_J), self.speed_D)

    def fill_greedily(
        self, copy_J: np.ndarray, usable_J: np.ndarray, goal: float, min_load: int
    ) -> None:
        """Give each free slot, most room first, the largest piece that an overloaded rank has."""
        room_D = goal * self.speed_D - np.bincount(
            self.home_X, self.load_X, minlength=len(self.speed_D)
        )
        left_X = np.where(self.load_X >= min_load, self.load_X, 0)
        for _ in range(len(copy_J)):
            free = np.flatnonzero((copy_J < 0) & usable_J & (room_D[self.rank_of_J] > 0))
            if not len(free) or (room_D >= 0).all():
                return
            slot = free[room_D[self.rank_of_J[free]].argmax()]
            rank = self.rank_of_J[slot]
            surplus_X = np.minimum(left_X, -room_D[self.home_X])
            surplus_X[self.holds(copy_J)[:, rank]] = 0
            piece_X = np.minimum(surplus_X, room_D[rank])
            expert = np.lexsort((-surplus_X, -piece_X))[0]
            if piece_X[expert] <= 0:
                usable_J = usable_J & (self.rank_of_J != rank)
                continue
            copy_J[slot] = expert
            left_X[expert] -= piece_X[expert]
            room_D[rank] -= piece_X[expert]
            room_D[self.home_X[expert]] += piece_X[expert]

    def improve(
        self, copy_J: np.ndarray, usable_J: np.ndarray, goal: float, min_load: int
    ) -> None:
        """Move copies out of the tight set while the level falls."""
        level, tight_D = self.level(copy_J)
        for _ in range(MAX_MOVES):
            if level <= goal:
                return
            trials = self._moves(copy_J, usable_J, tight_D, min_load)
            outcomes = [self.level(trial_J) for trial_J in trials]
            if not outcomes:
                return
            best = int(np.argmin([outcome[0] for outcome in outcomes]))
            if outcomes[best][0] >= level * (1 - 1e-9):
                return
            copy_J[:] = trials[best]
            level, tight_D = outcomes[best]

    def _moves(
        self, copy_J: np.ndarray, usable_J: np.ndarray, tight_D: np.ndarray, min_load: int
    ) -> list[np.ndarray]:
        """Every copy_J with one of the heaviest locked experts in a slot outside the tight set."""
        holds_XD = self.holds(copy_J)
        locked = np.flatnonzero(
            ~(holds_XD & ~tight_D).any(1) & (self.load_X >= max(min_load, 1e-12))
        )
        experts = locked[np.argsort(-self.load_X[locked], kind="stable")][:TRIED_EXPERTS]
        outside = np.flatnonzero(usable_J & ~tight_D[self.rank_of_J])
        home_time_D = np.bincount(self.home_X, self.load_X, len(self.speed_D)) / self.speed_D
        order = np.lexsort((home_time_D[self.rank_of_J[outside]], copy_J[outside] >= 0))
        trials = []
        for slot in outside[order][:TRIED_SLOTS]:
            for expert in experts:
                trial_J = copy_J.copy()
                trial_J[slot] = expert
                trials.append(trial_J)
        return trials

    def take_out_needless(self, copy_J: np.ndarray, goal: float) -> None:
        """Take out copies, lightest expert first, while goal or level stay as they are."""
        limit = max(goal, self.level(copy_J)[0] * (1 + 1e-9))
        filled = np.flatnonzero(copy_J >= 0)
        for slot in filled[np.argsort(self.load_X[copy_J[filled]], kind="stable")]:
            expert, copy_J[slot] = copy_J[slot], -1
            if self.level(copy_J)[0] > limit:
                copy_J[slot] = expert
