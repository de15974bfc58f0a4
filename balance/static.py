"""Copies that stay on another node for the whole batch: where they sit, what each node serves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from balance import split
from balance.crossnode import choose_cross_node_copies
from balance.placement import Present

# In units of the copied expert's load, at most an average rank's; on the gpt-oss-20b trace
# 0, 0.5, 1 and 1.5 leave 0.8, 0.5, 0.4 and 0.2 % above the bound (two nodes, by domain).
GIVER_SURPLUS = 1.5


@dataclass(frozen=True)
class StaticCopies:
    """Batch-static copies, in S = nodes × copies per node entries; -1 where there is none.

    Args:
        copy_LS: expert of each entry.
        rank_LS: present rank that holds it.
        spare_LS: spare slot that it takes, counted over the spare slots of present ranks.
        node_of_S: node of each entry.
    """

    copy_LS: np.ndarray
    rank_LS: np.ndarray
    spare_LS: np.ndarray
    node_of_S: np.ndarray

    def shares(self, load_BLE: np.ndarray, rank_LE: np.ndarray, present: Present) -> np.ndarray:
        """Units that each entry serves, share_BLS int64, such that the slowest node is fastest.

        Where that leaves a choice, an entry serves what its rank lacks to be busy all the time.
        """
        shape_BLS = (*load_BLE.shape[:2], self.copy_LS.shape[1])
        if not self.copy_LS.shape[1]:
            return np.zeros(shape_BLS, dtype=np.int64)
        problem = self.node_problem(load_BLE, rank_LE, present)
        lack_BLD = self._lack(load_BLE, rank_LE, present)
        sharers_LS = (self.rank_LS[:, :, None] == self.rank_LS[:, None, :]).sum(2)
        wish_BLS = np.take_along_axis(lack_BLD, np.maximum(self.rank_LS, 0)[None], 2) // sharers_LS
        wish_NS = torch.from_numpy(np.where(self.copy_LS >= 0, wish_BLS, 0))
        share_NS = split.integer_quotas(*problem, wish_NS.flatten(0, 1))
        return share_NS.numpy().reshape(shape_BLS)

    @staticmethod
    def _lack(load_BLE: np.ndarray, rank_LE: np.ndarray, present: Present) -> np.ndarray:
        """Units that each rank's homes lack to the ideal time, int64 [B, L, D]."""
        busy_BLD = load_BLE.sum(2)[:, :, None] * (present.speed_D / present.speed_D.sum())
        lack_BLD = busy_BLD - present.rank_load(load_BLE, rank_LE)
        return np.maximum(lack_BLD, 0).astype(np.int64)

    def node_problem(
        self, load_BLE: np.ndarray, rank_LE: np.ndarray, present: Present
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loads, home nodes, copies, their nodes, node speeds: a split between N = B · L nodes."""
        num_micro_batches, num_layers, num_experts = load_BLE.shape
        return (
            torch.from_numpy(load_BLE.reshape(num_micro_batches * num_layers, num_experts)),
            torch.from_numpy(present.node_of_D[rank_LE]).repeat(num_micro_batches, 1),
            torch.from_numpy(self.copy_LS).repeat(num_micro_batches, 1),
            torch.from_numpy(self.node_of_S),
            torch.from_numpy(np.bincount(present.node_of_D, present.speed_D)),
        )

    def served(self, share_BLS: np.ndarray, num_experts: int) -> np.ndarray:
        """Units of each expert that its batch-static copies serve: [B, L, E]."""
        served_BLE = np.zeros((*share_BLS.shape[:2], num_experts), dtype=np.int64)
        for layer, entry in zip(*(self.copy_LS >= 0).nonzero(), strict=True):
            served_BLE[:, layer, self.copy_LS[layer, entry]] += share_BLS[:, layer, entry]
        return served_BLE

    def surplus(self, load_LE: np.ndarray, present: Present) -> np.ndarray:
        """Load by which homes should overfill the ranks that hold entries, [L, D].

        A rank whose spare slot is taken cannot receive from its node; a rank with too much load
        never has to.
        """
        surplus_LD = np.zeros((len(load_LE), len(present.ranks)))
        for layer, entry in zip(*(self.copy_LS >= 0).nonzero(), strict=True):
            load_E = load_LE[layer]
            most = min(load_E[self.copy_LS[layer, entry]], load_E.sum() / len(present.ranks))
            surplus_LD[layer, self.rank_LS[layer, entry]] += GIVER_SURPLUS * most
        return surplus_LD

    def put(self, value_LM: np.ndarray, value_LS: np.ndarray) -> None:
        """Write values of the entries, [..., L, S], to their spare slots, [..., L, M]."""
        layer, entry = (self.spare_LS >= 0).nonzero()
        value_LM[..., layer, self.spare_LS[layer, entry]] = value_LS[..., layer, entry]


def choose_static_copies(
    load_BLE: np.ndarray,
    rank_LE: np.ndarray,
    present: Present,
    spares_per_rank: int,
    copies_per_node: int,
) -> StaticCopies:
    """Choose batch-static copies and seat them on the ranks of each node with heaviest homes.

    Those ranks have load to give, and so do best without the spare slot.
    """
    node_LE = present.node_of_D[rank_LE]
    speed_N = np.bincount(present.node_of_D, present.speed_D)
    copy_LS, node_of_S = choose_cross_node_copies(load_BLE, node_LE, speed_N, copies_per_node)
    load_LE = load_BLE.sum(0)
    rank_LS = np.full_like(copy_LS, -1)
    spare_LS = np.full_like(copy_LS, -1)
    num_ranks = len(present.ranks)
    for layer in range(len(copy_LS)):
        time_D = np.bincount(rank_LE[layer], load_LE[layer], num_ranks) / present.speed_D
        for node in range(len(speed_N)):
            entries = np.flatnonzero((node_of_S == node) & (copy_LS[layer] >= 0))
            ranks = np.flatnonzero(present.node_of_D == node)
            ranks = ranks[np.argsort(-time_D[ranks], kind="stable")]
            depth, nth = np.divmod(np.arange(len(entries)), len(ranks))
            rank_LS[layer, entries] = ranks[nth]
            spare_LS[layer, entries] = ranks[nth] * spares_per_rank + depth
    return StaticCopies(copy_LS, rank_LS, spare_LS, node_of_S)
