"""Copies and quotas inside the nodes, for all micro-batches and layers at once.

What a node has to serve is given: the home experts of its ranks, and its share of the experts that
have a batch-static copy on it. Nodes with the same ranks' speeds are solved in one batch.
"""

from dataclasses import dataclass

import numpy as np
import torch

from balance.exact import bounds, rank_sets, split
from balance.steps.batch_copies import Serving
from balance.steps.copies import Search, choose_copies
from balance.steps.copies_by_flow import choose_copies_by_flow
from balance.steps.node_problems import Copied, Hosted, NodeProblems, alike_nodes
from balance.steps.present import Present


@dataclass(frozen=True)
class InsideNodes:
    """Who serves what, when every node serves what it was given.

    Attributes:
        copy_BLM: expert of the micro-batch copy in each spare slot of present ranks, -1 for none.
        home_unit_BLE: units that each home copy serves.
        spare_unit_BLM: units that each spare slot serves, batch-static copies included.
        bound_BL: lower bound of the slowest rank's time, given what each node serves.
    """

    copy_BLM: np.ndarray
    home_unit_BLE: np.ndarray
    spare_unit_BLM: np.ndarray
    bound_BL: np.ndarray


def copy_inside_nodes(
    serving: Serving,
    rank_LE: np.ndarray,
    local_BLDE: np.ndarray | None,
    present: Present,
    spares_per_rank: int,
    search: Search,
) -> InsideNodes:
    """Choose copies for the spare slots of every node and split its load over all copies.

    Args:
        serving: batch-static copies, and what each of them and each home node serves.
        rank_LE: present rank of each home.
        local_BLDE: units that tokens on each present rank ask of each expert; None when unknown.
        present: ranks, their nodes and speeds.
        spares_per_rank: spare slots of each rank.
        search: effort and tolerance; a copy that would serve less than its ``min_load`` is not
            made.
    """
    hosted = Hosted.of(serving, rank_LE, local_BLDE)
    copied = Copied.nothing(hosted, len(present.ranks) * spares_per_rank)
    for ranks_nD in alike_nodes(present):
        nodes = [NodeProblems.gather(hosted, ranks_D, spares_per_rank) for ranks_D in ranks_nD]
        speed_D = torch.from_numpy(present.speed_D[ranks_nD[0]])
        _copy_and_split(nodes, speed_D, search, copied)
    num_experts = rank_LE.shape[1]
    left_BLZ = hosted.load_BLZ - copied.taken_BLZ
    serving.copies.write_to_spares(copied.quota_BLM, left_BLZ[:, :, num_experts:-1])
    return InsideNodes(
        copied.copy_BLM, left_BLZ[:, :, :num_experts], copied.quota_BLM, copied.bound_BL
    )


def _copy_and_split(
    nodes: list[NodeProblems], speed_D: torch.Tensor, search: Search, copied: Copied
) -> None:
    """Copies, their quotas and the lower bound of some alike nodes, written to ``copied``."""
    width = max(node.load_FX.shape[1] for node in nodes)
    load_FX = torch.cat([_widen(node.load_FX, width) for node in nodes])
    home_FX = torch.cat([_widen(node.home_FX, width) for node in nodes])
    usable_FJ = torch.from_numpy(np.concatenate([node.usable_FJ for node in nodes]))
    num_ranks = len(speed_D)
    spares_per_rank = usable_FJ.shape[1] // num_ranks
    rank_of_J = torch.arange(num_ranks).repeat_interleave(spares_per_rank)
    slots_FD = usable_FJ.view(len(usable_FJ), num_ranks, spares_per_rank).sum(2)
    bound_F = torch.maximum(
        bounds.ideal_level(load_FX.sum(1), speed_D),
        bounds.slot_level(load_FX, home_FX, slots_FD, speed_D),
    )
    choose = choose_copies if num_ranks <= rank_sets.MAX_RANKS else choose_copies_by_flow
    copy_FJ = choose(load_FX, home_FX, rank_of_J, speed_D, bound_F, usable_FJ, search)
    quota_FJ = _quotas(nodes, load_FX, home_FX, copy_FJ, rank_of_J, speed_D, search.min_load)
    num_problems = len(nodes[0].load_FX)
    parts = (value.split(num_problems) for value in (copy_FJ, quota_FJ, bound_F))
    for node, *part in zip(nodes, *parts, strict=True):
        node.scatter(copied, *(value.numpy() for value in part))


def _quotas(
    nodes: list[NodeProblems],
    load_FX: torch.Tensor,
    home_FX: torch.Tensor,
    copy_FJ: torch.Tensor,
    rank_of_J: torch.Tensor,
    speed_D: torch.Tensor,
    min_quota: int,
) -> torch.Tensor:
    """quota_FJ; copies that would serve less than ``min_quota`` are taken out of ``copy_FJ``."""
    quota_FJ = torch.zeros_like(copy_FJ)
    rows = torch.arange(len(copy_FJ))
    while len(rows):
        wish_FJ = _local_units(nodes, copy_FJ)
        quota_FJ[rows] = split.integer_quotas(
            load_FX[rows],
            home_FX[rows],
            copy_FJ[rows],
            rank_of_J,
            speed_D,
            None if wish_FJ is None else wish_FJ[rows].clamp(min=min_quota),
        )
        rows = rows[_drop_smallest(copy_FJ, quota_FJ, rows, min_quota)]
    return quota_FJ


def _drop_smallest(
    copy_FJ: torch.Tensor, quota_FJ: torch.Tensor, rows: torch.Tensor, min_quota: int
) -> torch.Tensor:
    """Take out the smallest copy of each problem if it serves too little; where was one?"""
    if not copy_FJ.shape[1]:
        return torch.zeros(len(rows), dtype=torch.bool)
    endless = torch.iinfo(quota_FJ.dtype).max
    least_F, slot_F = torch.where(copy_FJ[rows] >= 0, quota_FJ[rows], endless).min(1)
    small_F = least_F < max(1, min_quota)
    copy_FJ[rows[small_F], slot_F[small_F]] = -1
    return small_F


def _local_units(nodes: list[NodeProblems], copy_FJ: torch.Tensor) -> torch.Tensor | None:
    """Units that each copy finds on its own rank; None when sources are unknown."""
    wishes = [
        node.wishes(part.numpy())
        for node, part in zip(nodes, copy_FJ.split(len(nodes[0].load_FX)), strict=True)
    ]
    known = [wish_FJ for wish_FJ in wishes if wish_FJ is not None]
    return torch.from_numpy(np.concatenate(known)) if known else None


def _widen(value_FX: np.ndarray, width: int) -> torch.Tensor:
    """Add entries without load so that all nodes have the same number of them."""
    return torch.from_numpy(np.pad(value_FX, ((0, 0), (0, width - value_FX.shape[1]))))
