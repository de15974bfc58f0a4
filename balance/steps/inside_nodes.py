"""Copies and quotas inside the nodes, for all micro-batches and layers at once.

Nodes with the same ranks' speeds are solved in one batch. What a node has to serve is given: the
home experts of its ranks, and its share of the experts that have a batch-static copy on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from balance.exact import bounds, split
from balance.exact import rank_sets as subsets
from balance.steps import copies as replicate
from balance.steps import copies_by_flow as replicate_wide
from balance.steps.homes import Present


@dataclass(frozen=True)
class Hosted:
    """What every node serves.

    Args:
        load_BLZ: units served by each host entry: E home experts, S batch-static copies, and one
            entry without load, for padding.
        expert_LZ: expert of each entry, -1 where there is none.
        rank_LZ: present rank of each entry, -1 where there is none.
        spare_of_LZ: spare slot, counted over all present ranks, that a batch-static copy takes;
            -1 for home experts.
        local_BLDE: units that tokens on each present rank ask of each expert; None when unknown.
    """

    load_BLZ: np.ndarray
    expert_LZ: np.ndarray
    rank_LZ: np.ndarray
    spare_of_LZ: np.ndarray
    local_BLDE: np.ndarray | None


@dataclass
class NodePlans:
    """The outcome, over spare slots M = present ranks × spare slots per rank.

    Args:
        copy_BLM: expert of each micro-batch copy, -1 for none.
        quota_BLM: units that it serves.
        taken_BLZ: units of each host entry that such copies serve.
        bound_BL: lower bound of the slowest rank's time, given what each node serves.
    """

    copy_BLM: np.ndarray
    quota_BLM: np.ndarray
    taken_BLZ: np.ndarray
    bound_BL: np.ndarray


def plan_nodes(
    hosted: Hosted,
    present: Present,
    spares_per_rank: int,
    search: replicate.Search,
    min_quota: int,
) -> NodePlans:
    """Choose copies for the spare slots of every node and split the load over all copies.

    Args:
        hosted: what every node serves.
        present: ranks, their nodes and speeds.
        spares_per_rank: spare slots of each rank.
        search: effort and tolerance.
        min_quota: a copy that would serve fewer units is not made.
    """
    num_micro_batches, num_layers, _ = hosted.load_BLZ.shape
    shape_BLM = (num_micro_batches, num_layers, len(present.ranks) * spares_per_rank)
    plans = NodePlans(
        np.full(shape_BLM, -1, dtype=np.int64),
        np.zeros(shape_BLM, dtype=np.int64),
        np.zeros_like(hosted.load_BLZ),
        np.zeros(shape_BLM[:2]),
    )
    for ranks_GD in _alike(present):
        nodes = [_Node.gather(hosted, ranks_D, spares_per_rank) for ranks_D in ranks_GD]
        speed_D = torch.from_numpy(present.speed_D[ranks_GD[0]])
        solved = _solve(nodes, speed_D, search, min_quota)
        for node, (copy_NS, quota_NS, bound_N) in zip(nodes, solved, strict=True):
            node.scatter(plans, copy_NS.numpy(), quota_NS.numpy(), bound_N.numpy())
    return plans


def _alike(present: Present) -> list[np.ndarray]:
    """Nodes with equal ranks, as rows of present ranks: one [G, D] array per kind of node."""
    kinds: dict[tuple[float, ...], list[np.ndarray]] = {}
    for node in range(int(present.node_of_D.max()) + 1):
        ranks_D = np.flatnonzero(present.node_of_D == node)
        kinds.setdefault(tuple(present.speed_D[ranks_D]), []).append(ranks_D)
    return [np.stack(rows) for rows in kinds.values()]


@dataclass
class _Node:
    """N = B · L problems of one node, over X host entries, D ranks and S spare slots."""

    spare_of_S: np.ndarray
    entry_NX: np.ndarray
    expert_NX: np.ndarray
    load_NX: np.ndarray
    home_NX: np.ndarray
    usable_NS: np.ndarray
    local_NDE: np.ndarray | None

    @classmethod
    def gather(cls, hosted: Hosted, ranks_D: np.ndarray, spares_per_rank: int) -> _Node:
        num_micro_batches, num_layers, num_entries = hosted.load_BLZ.shape
        spare_of_S = (ranks_D[:, None] * spares_per_rank + np.arange(spares_per_rank)).ravel()
        here_LZ = np.isin(hosted.rank_LZ, ranks_D)
        width = max(1, int(here_LZ.sum(1).max()))
        entry_LX = np.argsort(~here_LZ, axis=1, kind="stable")[:, :width]
        is_here_LX = np.take_along_axis(here_LZ, entry_LX, 1)
        entry_LX = np.where(is_here_LX, entry_LX, num_entries - 1)
        rank_LX = np.take_along_axis(hosted.rank_LZ, entry_LX, 1)
        home_LX = np.where(is_here_LX, np.searchsorted(ranks_D, rank_LX), 0)
        usable_LS = (hosted.spare_of_LZ[:, None, :] != spare_of_S[:, None]).all(2)
        load_BLX = np.take_along_axis(hosted.load_BLZ, entry_LX[None], 2)
        local_BLDE = hosted.local_BLDE
        return cls(
            spare_of_S,
            np.tile(entry_LX, (num_micro_batches, 1)),
            np.tile(np.take_along_axis(hosted.expert_LZ, entry_LX, 1), (num_micro_batches, 1)),
            load_BLX.reshape(num_micro_batches * num_layers, width),
            np.tile(home_LX, (num_micro_batches, 1)),
            np.tile(usable_LS, (num_micro_batches, 1)),
            None if local_BLDE is None else _flat(local_BLDE[:, :, ranks_D]),
        )

    def wishes(self, copy_NS: np.ndarray) -> np.ndarray | None:
        """Units that each copy finds on its own rank; None when sources are unknown."""
        if self.local_NDE is None:
            return None
        every = np.arange(len(copy_NS))[:, None]
        rank_of_S = np.arange(copy_NS.shape[1]) // (
            copy_NS.shape[1] // self.local_NDE.shape[1] or 1
        )
        expert_NS = np.take_along_axis(self.expert_NX, np.maximum(copy_NS, 0), 1)
        return np.where(copy_NS >= 0, self.local_NDE[every, rank_of_S, expert_NS], 0)

    def scatter(
        self, plans: NodePlans, copy_NS: np.ndarray, quota_NS: np.ndarray, bound_N: np.ndarray
    ) -> None:
        """Write what was decided for this node into the plans of all nodes."""
        shape_BL = plans.bound_BL.shape
        shape_BLS = (*shape_BL, len(self.spare_of_S))
        expert_NS = np.take_along_axis(self.expert_NX, np.maximum(copy_NS, 0), 1)
        expert_NS = np.where(copy_NS >= 0, expert_NS, -1)
        plans.copy_BLM[:, :, self.spare_of_S] = expert_NS.reshape(shape_BLS)
        plans.quota_BLM[:, :, self.spare_of_S] = quota_NS.reshape(shape_BLS)
        taken_NZ = plans.taken_BLZ.reshape(len(copy_NS), plans.taken_BLZ.shape[2])
        problem, slot = (copy_NS >= 0).nonzero()
        entry = self.entry_NX[problem, copy_NS[problem, slot]]
        np.add.at(taken_NZ, (problem, entry), quota_NS[problem, slot])
        np.maximum(plans.bound_BL, bound_N.reshape(shape_BL), out=plans.bound_BL)


def _solve(
    nodes: list[_Node], speed_D: torch.Tensor, search: replicate.Search, min_quota: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each of some alike nodes: copies, their quotas and the lower bound."""
    width = max(node.load_NX.shape[1] for node in nodes)
    load_NX = torch.cat([_widen(node.load_NX, width) for node in nodes])
    home_NX = torch.cat([_widen(node.home_NX, width) for node in nodes])
    usable_NS = torch.from_numpy(np.concatenate([node.usable_NS for node in nodes]))
    num_ranks = len(speed_D)
    spares_per_rank = usable_NS.shape[1] // num_ranks
    rank_of_S = torch.arange(num_ranks).repeat_interleave(spares_per_rank)
    slots_ND = usable_NS.view(len(usable_NS), num_ranks, spares_per_rank).sum(2)
    bound_N = torch.maximum(
        bounds.ideal_level(load_NX.sum(1), speed_D),
        bounds.slot_level(load_NX, home_NX, slots_ND, speed_D),
    )
    wide = num_ranks > subsets.MAX_RANKS
    choose = replicate_wide.choose_copies if wide else replicate.choose_copies
    copy_NS = choose(load_NX, home_NX, rank_of_S, speed_D, bound_N, usable_NS, search)
    quota_NS = torch.zeros_like(copy_NS)
    rows = torch.arange(len(copy_NS))
    num_problems = len(nodes[0].load_NX)
    while len(rows):
        wish_NS = _wishes(nodes, copy_NS)
        quota_NS[rows] = split.integer_quotas(
            load_NX[rows],
            home_NX[rows],
            copy_NS[rows],
            rank_of_S,
            speed_D,
            None if wish_NS is None else wish_NS[rows].clamp(min=min_quota),
        )
        rows = rows[_drop_smallest(copy_NS, quota_NS, rows, min_quota)]
    return list(
        zip(
            copy_NS.split(num_problems),
            quota_NS.split(num_problems),
            bound_N.split(num_problems),
            strict=True,
        )
    )


def _drop_smallest(
    copy_NS: torch.Tensor, quota_NS: torch.Tensor, rows: torch.Tensor, min_quota: int
) -> torch.Tensor:
    """Take out the smallest copy of each problem if it serves too little; where was one?"""
    if not copy_NS.shape[1]:
        return torch.zeros(len(rows), dtype=torch.bool)
    endless = torch.iinfo(quota_NS.dtype).max
    least_N, slot_N = torch.where(copy_NS[rows] >= 0, quota_NS[rows], endless).min(1)
    small_N = least_N < max(1, min_quota)
    copy_NS[rows[small_N], slot_N[small_N]] = -1
    return small_N


def _wishes(nodes: list[_Node], copy_NS: torch.Tensor) -> torch.Tensor | None:
    wishes = [
        node.wishes(part.numpy())
        for node, part in zip(nodes, copy_NS.split(len(nodes[0].load_NX)), strict=True)
    ]
    known = [wish_NS for wish_NS in wishes if wish_NS is not None]
    return torch.from_numpy(np.concatenate(known)) if known else None


def _widen(value_NX: np.ndarray, width: int) -> torch.Tensor:
    """Add entries without load so that all nodes have the same number of them."""
    return torch.from_numpy(np.pad(value_NX, ((0, 0), (0, width - value_NX.shape[1]))))


def _flat(value_BLDE: np.ndarray) -> np.ndarray:
    num_micro_batches, num_layers, *rest = value_BLDE.shape
    return value_BLDE.reshape(num_micro_batches * num_layers, *rest)
