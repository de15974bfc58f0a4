"""The load of the nodes, cut into problems of one node each, and the answers put together again.

Nodes host unequal numbers of experts. Each problem gets as many entries as the fullest node of its
layer needs; those of the others are filled up with one that has no load.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from balance.steps.batch_copies import Serving
from balance.steps.loads import as_problems
from balance.steps.present import Present


@dataclass(frozen=True)
class Hosted:
    """What every node serves, in Z entries: E home experts, J batch-static copies, one empty.

    Attributes:
        load_BLZ: units served by each entry.
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

    @classmethod
    def of(cls, serving: Serving, rank_LE: np.ndarray, local_BLDE: np.ndarray | None) -> Self:
        """Home experts, batch-static copies and the empty entry, side by side."""
        num_layers, num_experts = rank_LE.shape
        nothing = np.full((num_layers, 1), -1)
        no_load = np.zeros_like(serving.rest_BLE[:, :, :1])
        expert_LE = np.tile(np.arange(num_experts), (num_layers, 1))
        copies = serving.copies
        return cls(
            np.concatenate([serving.rest_BLE, serving.share_BLJ, no_load], axis=2),
            np.concatenate([expert_LE, copies.copy_LJ, nothing], axis=1),
            np.concatenate([rank_LE, copies.rank_LJ, nothing], axis=1),
            np.concatenate([np.full_like(rank_LE, -1), copies.spare_LJ, nothing], axis=1),
            local_BLDE,
        )


@dataclass
class Copied:
    """Micro-batch copies of all nodes, over spare slots M = present ranks × spare slots per rank.

    Attributes:
        copy_BLM: expert of each micro-batch copy, -1 for none.
        quota_BLM: units that it serves.
        taken_BLZ: units of each host entry that such copies serve.
        bound_BL: lower bound of the slowest rank's time, given what each node serves.
    """

    copy_BLM: np.ndarray
    quota_BLM: np.ndarray
    taken_BLZ: np.ndarray
    bound_BL: np.ndarray

    @classmethod
    def nothing(cls, hosted: Hosted, num_spares: int) -> Self:
        """No copies yet."""
        num_micro_batches, num_layers, _ = hosted.load_BLZ.shape
        shape_BLM = (num_micro_batches, num_layers, num_spares)
        return cls(
            np.full(shape_BLM, -1, dtype=np.int64),
            np.zeros(shape_BLM, dtype=np.int64),
            np.zeros_like(hosted.load_BLZ),
            np.zeros(shape_BLM[:2]),
        )


@dataclass
class NodeProblems:
    """F = B · L problems of one node, over X host entries, D ranks and J spare slots.

    Attributes:
        spare_of_J: each spare slot's number among those of all present ranks.
        entry_FX: host entry behind each of the node's entries.
        expert_FX: its expert.
        load_FX: its units.
        home_FX: its rank in the node.
        usable_FJ: bool, spare slots that no batch-static copy takes.
        local_FDE: units that tokens on each rank ask of each expert; None when unknown.
    """

    spare_of_J: np.ndarray
    entry_FX: np.ndarray
    expert_FX: np.ndarray
    load_FX: np.ndarray
    home_FX: np.ndarray
    usable_FJ: np.ndarray
    local_FDE: np.ndarray | None

    @classmethod
    def gather(cls, hosted: Hosted, ranks_D: np.ndarray, spares_per_rank: int) -> Self:
        """The part of the hosted load that is on some ranks, which are a node."""
        num_micro_batches, _, num_entries = hosted.load_BLZ.shape
        spare_of_J = (ranks_D[:, None] * spares_per_rank + np.arange(spares_per_rank)).ravel()
        here_LZ = np.isin(hosted.rank_LZ, ranks_D)
        width = max(1, int(here_LZ.sum(1).max()))
        entry_LX = np.argsort(~here_LZ, axis=1, kind="stable")[:, :width]
        is_here_LX = np.take_along_axis(here_LZ, entry_LX, 1)
        entry_LX = np.where(is_here_LX, entry_LX, num_entries - 1)
        rank_LX = np.take_along_axis(hosted.rank_LZ, entry_LX, 1)
        home_LX = np.where(is_here_LX, np.searchsorted(ranks_D, rank_LX), 0)
        usable_LJ = (hosted.spare_of_LZ[:, None, :] != spare_of_J[:, None]).all(2)
        load_BLX = np.take_along_axis(hosted.load_BLZ, entry_LX[None], 2)
        local_BLDE = hosted.local_BLDE
        return cls(
            spare_of_J,
            np.tile(entry_LX, (num_micro_batches, 1)),
            np.tile(np.take_along_axis(hosted.expert_LZ, entry_LX, 1), (num_micro_batches, 1)),
            as_problems(load_BLX),
            np.tile(home_LX, (num_micro_batches, 1)),
            np.tile(usable_LJ, (num_micro_batches, 1)),
            None if local_BLDE is None else as_problems(local_BLDE[:, :, ranks_D]),
        )

    def wishes(self, copy_FJ: np.ndarray) -> np.ndarray | None:
        """Units that each copy finds on its own rank; None when sources are unknown."""
        if self.local_FDE is None:
            return None
        every = np.arange(len(copy_FJ))[:, None]
        spares_per_rank = copy_FJ.shape[1] // self.local_FDE.shape[1]
        rank_of_J = np.arange(copy_FJ.shape[1]) // (spares_per_rank or 1)
        expert_FJ = np.take_along_axis(self.expert_FX, np.maximum(copy_FJ, 0), 1)
        return np.where(copy_FJ >= 0, self.local_FDE[every, rank_of_J, expert_FJ], 0)

    def scatter(
        self, copied: Copied, copy_FJ: np.ndarray, quota_FJ: np.ndarray, bound_F: np.ndarray
    ) -> None:
        """Write what was decided for this node, in its own numbers, to that of all nodes."""
        shape_BL = copied.bound_BL.shape
        shape_BLJ = (*shape_BL, len(self.spare_of_J))
        expert_FJ = np.take_along_axis(self.expert_FX, np.maximum(copy_FJ, 0), 1)
        expert_FJ = np.where(copy_FJ >= 0, expert_FJ, -1)
        copied.copy_BLM[:, :, self.spare_of_J] = expert_FJ.reshape(shape_BLJ)
        copied.quota_BLM[:, :, self.spare_of_J] = quota_FJ.reshape(shape_BLJ)
        taken_FZ = copied.taken_BLZ.reshape(len(copy_FJ), copied.taken_BLZ.shape[2])
        problem, slot = (copy_FJ >= 0).nonzero()
        entry = self.entry_FX[problem, copy_FJ[problem, slot]]
        np.add.at(taken_FZ, (problem, entry), quota_FJ[problem, slot])
        np.maximum(copied.bound_BL, bound_F.reshape(shape_BL), out=copied.bound_BL)


def alike_nodes(present: Present) -> list[np.ndarray]:
    """Nodes with equal ranks, as rows of present ranks: one ranks_nD array per kind of node."""
    kinds: dict[tuple[float, ...], list[np.ndarray]] = {}
    for node in range(present.num_nodes):
        ranks_D = present.ranks_of_node(node)
        kinds.setdefault(tuple(present.speed_D[ranks_D]), []).append(ranks_D)
    return [np.stack(rows) for rows in kinds.values()]
