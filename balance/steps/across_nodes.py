"""One split over the ranks of all nodes, where batch-static copies join them.

Node by node is not enough: a rank whose spare slot a batch-static copy takes may lack load that
only another node can give, and which copies a node needs depends on what it has to serve. So for
problems above their goal the split over all ranks is solved as one minimum cut, the copies inside
the nodes are chosen again for what that split gives each node, and so on while the level falls.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch

from balance.exact import flow, split
from balance.steps.copies import Search
from balance.steps.present import Present

MAX_ROUNDS = 6


@dataclass
class Splits:
    """F problems over present ranks D, with spare slots M = D × spare slots per rank.

    Attributes:
        unit_FE: units to serve.
        rank_FE: present rank of each home copy.
        static_FM: expert of the batch-static copy in each spare slot, -1 for none.
        copy_FM: expert of the micro-batch copy in each spare slot, -1 for none.
        home_unit_FE: units that each home copy serves.
        spare_unit_FM: units that each spare slot serves.
    """

    unit_FE: np.ndarray
    rank_FE: np.ndarray
    static_FM: np.ndarray
    copy_FM: np.ndarray
    home_unit_FE: np.ndarray
    spare_unit_FM: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> "Splits":
        """Some of the problems, copied."""
        return Splits(*(getattr(self, field.name)[rows] for field in fields(self)))

    def adopt(self, rows: np.ndarray, other: "Splits") -> None:
        """Take over the copies and quotas of other splits of some problems."""
        for name in ("copy_FM", "home_unit_FE", "spare_unit_FM"):
            getattr(self, name)[rows] = getattr(other, name)

    def load_of(self, f: int, num_ranks: int) -> np.ndarray:
        """Units of each expert on each rank, int64 [E, D]."""
        load_ED = np.zeros((self.unit_FE.shape[1], num_ranks), dtype=np.int64)
        load_ED[np.arange(len(load_ED)), self.rank_FE[f]] = self.home_unit_FE[f]
        slots, experts, ranks = self._filled(f, num_ranks)
        load_ED[experts, ranks] += self.spare_unit_FM[f, slots]
        return load_ED

    def stays_of(self, f: int, num_ranks: int) -> np.ndarray:
        """Which ranks hold a home or batch-static copy of each expert, bool [E, D]."""
        stays_ED = np.zeros((self.unit_FE.shape[1], num_ranks), dtype=bool)
        stays_ED[np.arange(len(stays_ED)), self.rank_FE[f]] = True
        slots = np.flatnonzero(self.static_FM[f] >= 0)
        stays_ED[self.static_FM[f, slots], slots * num_ranks // self.static_FM.shape[1]] = True
        return stays_ED

    def holds_of(self, f: int, num_ranks: int) -> np.ndarray:
        """Which ranks hold any copy of each expert, bool [E, D]."""
        holds_ED = self.stays_of(f, num_ranks)
        _, experts, ranks = self._filled(f, num_ranks)
        holds_ED[experts, ranks] = True
        return holds_ED

    def set_load(self, f: int, load_ED: np.ndarray) -> None:
        """Make one problem's quotas what each rank serves of each expert."""
        self.home_unit_FE[f] = load_ED[np.arange(len(load_ED)), self.rank_FE[f]]
        slots, experts, ranks = self._filled(f, load_ED.shape[1])
        self.spare_unit_FM[f] = 0
        self.spare_unit_FM[f, slots] = load_ED[experts, ranks]

    def level_F(self, present: Present) -> np.ndarray:
        """Time of the slowest rank."""
        num_problems, num_ranks = len(self.unit_FE), len(present.ranks)
        cell_FE = np.arange(num_problems)[:, None] * num_ranks + self.rank_FE
        home_FD = np.bincount(cell_FE.ravel(), self.home_unit_FE.ravel(), num_problems * num_ranks)
        spares = self.spare_unit_FM.shape[1] // num_ranks
        load_FD = self.spare_unit_FM.reshape(num_problems, num_ranks, spares).sum(2)
        load_FD = load_FD + home_FD.reshape(num_problems, num_ranks)
        return (load_FD / present.speed_D).max(1)

    def _filled(self, f: int, num_ranks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Spare slots of a problem that hold something: slots, their experts, their ranks."""
        expert_M = np.where(self.copy_FM[f] >= 0, self.copy_FM[f], self.static_FM[f])
        slots = np.flatnonzero(expert_M >= 0)
        return slots, expert_M[slots], slots * num_ranks // len(expert_M)


def level_across_nodes(
    splits: Splits,
    bound_F: np.ndarray,
    search: Search,
    present: Present,
    copy_again: Callable[[np.ndarray, Splits, np.ndarray], Splits],
) -> None:
    """Improve the problems above their goal, in place; no level rises.

    Args:
        splits: a legal split of every problem.
        bound_F: lower bounds of the levels; raised in place where a better one is found.
        search: levels within its ``tolerance`` of their bound are good enough; a micro-batch copy
            that would serve less than its ``min_load`` is taken out.
        present: ranks, their nodes and speeds.
        copy_again: given row numbers, their splits and the units of each expert that each node
            shall serve [F, E, N], the splits with copies chosen again.
    """
    slack = 1 + search.tolerance
    goal_F = bound_F * slack
    level_F = splits.level_F(present)
    rows = np.flatnonzero(level_F > goal_F)
    trial = splits[rows]
    for step in range(MAX_ROUNDS):
        if not len(rows):
            return
        if step:
            trial = splits[rows]
            divided_FEN = _divide_over_nodes(trial, rows, bound_F, present)
            trial = copy_again(rows, trial, divided_FEN)
        for f, row in enumerate(rows):
            _split_over_all(trial, f, bound_F[row], present, search.min_load)
        trial_level_F = trial.level_F(present)
        better_F = trial_level_F < level_F[rows] * (1 - 1e-9)
        splits.adopt(rows[better_F], trial[better_F])
        level_F[rows] = np.minimum(level_F[rows], trial_level_F)
        goal_F = np.maximum(goal_F, bound_F * slack)
        rows = rows[(better_F | (step == 0)) & (level_F[rows] > goal_F[rows])]


def _split_over_all(
    splits: Splits, f: int, bound: float, present: Present, min_quota: int
) -> None:
    """The best split over given copies; copies that would serve too little go, smallest first."""
    num_ranks, speed_D = len(present.ranks), present.speed_D
    load_ED = splits.load_of(f, num_ranks)
    while True:
        holds_ED = splits.holds_of(f, num_ranks)
        level, _ = flow.best_level(splits.unit_FE[f], holds_ED, speed_D, load_ED)
        load_ED = _settle_at(max(level, bound), load_ED, holds_ED, speed_D)
        splits.set_load(f, load_ED)
        quota_M = np.where(splits.copy_FM[f] >= 0, splits.spare_unit_FM[f], np.iinfo(np.int64).max)
        if not len(quota_M) or quota_M.min() >= min_quota:
            return
        slot = int(quota_M.argmin())
        expert, rank = splits.copy_FM[f, slot], slot * num_ranks // len(quota_M)
        load_ED[expert, splits.rank_FE[f, expert]] += load_ED[expert, rank]
        load_ED[expert, rank] = 0
        splits.copy_FM[f, slot] = -1


def _divide_over_nodes(
    splits: Splits, rows: np.ndarray, bound_F: np.ndarray, present: Present
) -> np.ndarray:
    """Units of each expert that each node should serve, divided_FEN, and better bounds.

    Ranks with a spare slot for the micro-batch are one place per node: copies can level them. A
    rank whose spare slots all hold batch-static copies is a place of its own, which can give to
    its node but serves only its homes and those copies. The best split over places needs no less
    time than any plan with these homes and batch-static copies.
    """
    num_ranks, num_nodes = len(present.ranks), present.num_nodes
    divided_FEN = np.zeros((len(rows), splits.unit_FE.shape[1], num_nodes), dtype=np.int64)
    for f, row in enumerate(rows):
        full_D = (splits.static_FM[f].reshape(num_ranks, -1) >= 0).all(1)
        place_of_D = np.where(full_D, num_nodes + np.arange(num_ranks), present.node_of_D)
        places, place_of_D = np.unique(place_of_D, return_inverse=True)
        node_of_G = np.empty(len(places), dtype=np.int64)
        node_of_G[place_of_D] = present.node_of_D
        at_DG = place_of_D[:, None] == np.arange(len(places))
        speed_G = present.speed_D @ at_DG
        load_ED = splits.load_of(f, num_ranks)
        holds_EG = splits.stays_of(f, num_ranks) @ at_DG
        in_node_GN = node_of_G[:, None] == np.arange(num_nodes)
        holds_EG |= (holds_EG @ in_node_GN @ in_node_GN.T) & (places < num_nodes)
        load_EG = load_ED @ at_DG
        level, _ = flow.best_level(splits.unit_FE[f], holds_EG, speed_G, load_EG)
        bound_F[row] = max(bound_F[row], level)
        load_EG = _settle_at(bound_F[row], load_EG, holds_EG, speed_G)
        divided_FEN[f] = load_EG @ in_node_GN
    return divided_FEN


def _settle_at(
    level: float, load_XD: np.ndarray, holds_XD: np.ndarray, speed_D: np.ndarray
) -> np.ndarray:
    """Whole units near a split, at this level or the next ones possible."""
    speeds = torch.from_numpy(speed_D)
    limit_1D = split.integral_limits(torch.tensor([level], dtype=torch.float64), speeds)
    return split.settle(load_XD, holds_XD, limit_1D, speeds)
