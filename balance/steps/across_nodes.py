"""One split over the ranks of all nodes, where batch-static copies join them.

Node by node is not enough: a rank whose spare slot a batch-static copy takes may lack load that
only another node can give, and which copies a node needs depends on what it has to serve. So for
problems above their goal the split over all ranks is solved as one minimum cut, the copies inside
the nodes are chosen again for what that split gives each node, and so on while the level falls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch

from balance.exact import flow, split
from balance.steps.homes import Present

MAX_ROUNDS = 6


@dataclass
class Splits:
    """N problems over present ranks D, with spare slots M = D × spare slots per rank.

    Args:
        unit_NE: units to serve.
        rank_NE: present rank of each home copy.
        static_NM: expert of the batch-static copy in each spare slot, -1 for none.
        copy_NM: expert of the micro-batch copy in each spare slot, -1 for none.
        home_unit_NE: units that each home copy serves.
        spare_unit_NM: units that each spare slot serves.
    """

    unit_NE: np.ndarray
    rank_NE: np.ndarray
    static_NM: np.ndarray
    copy_NM: np.ndarray
    home_unit_NE: np.ndarray
    spare_unit_NM: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> Splits:
        return Splits(*(getattr(self, field.name)[rows] for field in fields(self)))

    def put(self, rows: np.ndarray, other: Splits) -> None:
        """Replace copies and quotas of some problems."""
        for name in ("copy_NM", "home_unit_NE", "spare_unit_NM"):
            getattr(self, name)[rows] = getattr(other, name)

    def load_of(self, n: int, num_ranks: int) -> np.ndarray:
        """Units of each expert on each rank, int64 [E, D]."""
        load_ED = np.zeros((self.unit_NE.shape[1], num_ranks), dtype=np.int64)
        load_ED[np.arange(len(load_ED)), self.rank_NE[n]] = self.home_unit_NE[n]
        slots, experts, ranks = self._filled(n, num_ranks)
        load_ED[experts, ranks] += self.spare_unit_NM[n, slots]
        return load_ED

    def stays_of(self, n: int, num_ranks: int) -> np.ndarray:
        """Which ranks hold a home or batch-static copy of each expert, bool [E, D]."""
        stays_ED = np.zeros((self.unit_NE.shape[1], num_ranks), dtype=bool)
        stays_ED[np.arange(len(stays_ED)), self.rank_NE[n]] = True
        slots = np.flatnonzero(self.static_NM[n] >= 0)
        stays_ED[self.static_NM[n, slots], slots * num_ranks // self.static_NM.shape[1]] = True
        return stays_ED

    def holds_of(self, n: int, num_ranks: int) -> np.ndarray:
        """Which ranks hold any copy of each expert, bool [E, D]."""
        holds_ED = self.stays_of(n, num_ranks)
        _, experts, ranks = self._filled(n, num_ranks)
        holds_ED[experts, ranks] = True
        return holds_ED

    def serve(self, n: int, load_ED: np.ndarray) -> None:
        """Take over a split."""
        self.home_unit_NE[n] = load_ED[np.arange(len(load_ED)), self.rank_NE[n]]
        slots, experts, ranks = self._filled(n, load_ED.shape[1])
        self.spare_unit_NM[n] = 0
        self.spare_unit_NM[n, slots] = load_ED[experts, ranks]

    def level_N(self, present: Present) -> np.ndarray:
        """Time of the slowest rank."""
        num_problems, num_ranks = len(self.unit_NE), len(present.ranks)
        place_NE = np.arange(num_problems)[:, None] * num_ranks + self.rank_NE
        load_X = np.bincount(place_NE.ravel(), self.home_unit_NE.ravel(), num_problems * num_ranks)
        spares = self.spare_unit_NM.shape[1] // num_ranks
        load_ND = self.spare_unit_NM.reshape(num_problems, num_ranks, spares).sum(2)
        load_ND = load_ND + load_X.reshape(num_problems, num_ranks)
        return (load_ND / present.speed_D).max(1)

    def _filled(self, n: int, num_ranks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        expert_M = np.where(self.copy_NM[n] >= 0, self.copy_NM[n], self.static_NM[n])
        slots = np.flatnonzero(expert_M >= 0)
        return slots, expert_M[slots], slots * num_ranks // len(expert_M)


def level_across_nodes(
    splits: Splits,
    bound_N: np.ndarray,
    tolerance: float,
    present: Present,
    min_quota: int,
    copy_again: Callable[[np.ndarray, Splits, np.ndarray], Splits],
) -> None:
    """Improve the problems above their goal, in place; no level rises.

    Args:
        splits: a legal split of every problem.
        bound_N: lower bounds of the levels; raised in place where a better one is found.
        tolerance: levels within this of their bound are good enough.
        present: ranks, their nodes and speeds.
        min_quota: a micro-batch copy that would serve fewer units is taken out.
        copy_again: given row numbers, their splits and the units of each expert that each node
            shall serve [N, E, nodes], the splits with copies chosen again.
    """
    slack = 1 + tolerance
    goal_N = bound_N * slack
    level_N = splits.level_N(present)
    rows = np.flatnonzero(level_N > goal_N)
    trial = splits[rows]
    for step in range(MAX_ROUNDS):
        if not len(rows):
            return
        if step:
            trial = splits[rows]
            divided_NEn = _divide_over_nodes(trial, rows, bound_N, present)
            trial = copy_again(rows, trial, divided_NEn)
        for n, row in enumerate(rows):
            _split_over_all(trial, n, bound_N[row], present, min_quota)
        trial_level_N = trial.level_N(present)
        better_N = trial_level_N < level_N[rows] * (1 - 1e-9)
        splits.put(rows[better_N], trial[better_N])
        level_N[rows] = np.minimum(level_N[rows], trial_level_N)
        goal_N = np.maximum(goal_N, bound_N * slack)
        rows = rows[(better_N | (step == 0)) & (level_N[rows] > goal_N[rows])]


def _split_over_all(
    splits: Splits, n: int, bound: float, present: Present, min_quota: int
) -> None:
    """The best split over given copies; copies that would serve too little go, smallest first."""
    num_ranks, speed_D = len(present.ranks), present.speed_D
    load_ED = splits.load_of(n, num_ranks)
    while True:
        holds_ED = splits.holds_of(n, num_ranks)
        level, _ = flow.best_level(splits.unit_NE[n], holds_ED, speed_D, load_ED)
        load_ED = _settle_at(max(level, bound), load_ED, holds_ED, speed_D)
        splits.serve(n, load_ED)
        quota_M = np.where(splits.copy_NM[n] >= 0, splits.spare_unit_NM[n], np.iinfo(np.int64).max)
        if not len(quota_M) or quota_M.min() >= min_quota:
            return
        slot = int(quota_M.argmin())
        expert, rank = splits.copy_NM[n, slot], slot * num_ranks // len(quota_M)
        load_ED[expert, splits.rank_NE[n, expert]] += load_ED[expert, rank]
        load_ED[expert, rank] = 0
        splits.copy_NM[n, slot] = -1


def _divide_over_nodes(
    splits: Splits, rows: np.ndarray, bound_N: np.ndarray, present: Present
) -> np.ndarray:
    """Units of each expert that each node should serve, [N, E, nodes], and better bounds.

    Ranks with a spare slot for the micro-batch are one place per node: copies can level them. A
    rank whose spare slots all hold batch-static copies is a place of its own, which can give to
    its node but serves only its homes and those copies. The best split over places needs no less
    time than any plan with these homes and batch-static copies.
    """
    num_ranks, num_nodes = len(present.ranks), int(present.node_of_D.max()) + 1
    divided_NEn = np.zeros((len(rows), splits.unit_NE.shape[1], num_nodes), dtype=np.int64)
    for n, row in enumerate(rows):
        full_D = (splits.static_NM[n].reshape(num_ranks, -1) >= 0).all(1)
        place_of_D = np.where(full_D, num_nodes + np.arange(num_ranks), present.node_of_D)
        places, place_of_D = np.unique(place_of_D, return_inverse=True)
        node_of_P = np.empty(len(places), dtype=np.int64)
        node_of_P[place_of_D] = present.node_of_D
        at_DP = place_of_D[:, None] == np.arange(len(places))
        speed_P = present.speed_D @ at_DP
        load_ED = splits.load_of(n, num_ranks)
        holds_EP = splits.stays_of(n, num_ranks) @ at_DP
        in_node_Pn = node_of_P[:, None] == np.arange(num_nodes)
        holds_EP |= (holds_EP @ in_node_Pn @ in_node_Pn.T) & (places < num_nodes)
        load_EP = load_ED @ at_DP
        level, _ = flow.best_level(splits.unit_NE[n], holds_EP, speed_P, load_EP)
        bound_N[row] = max(bound_N[row], level)
        load_EP = _settle_at(bound_N[row], load_EP, holds_EP, speed_P)
        divided_NEn[n] = load_EP @ in_node_Pn
    return divided_NEn


def _settle_at(
    level: float, load_XD: np.ndarray, holds_XD: np.ndarray, speed_D: np.ndarray
) -> np.ndarray:
    """Whole units near a split, at this level or the next ones possible."""
    speeds = torch.from_numpy(speed_D)
    limit_1D = split.integral_limits(torch.tensor([level], dtype=torch.float64), speeds)
    return split.settle(load_XD, holds_XD, limit_1D, speeds)
