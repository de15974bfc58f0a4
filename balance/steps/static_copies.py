"""Copies that stay on another node for the whole batch: where they sit, what each node serves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from balance.exact import split
from balance.steps.batch_copies import choose_cross_node_copies
from balance.steps.batch_copy_ranks import choose_seats
from balance.steps.homes import Present


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

    def equal_shares(
        self, load_BLE: np.ndarray, rank_LE: np.ndarray, present: Present
    ) -> np.ndarray:
        """As ``shares``, for entries that have no rank yet: equal ones where there is a choice."""
        shape_BLS = (*load_BLE.shape[:2], self.copy_LS.shape[1])
        if not self.copy_LS.shape[1]:
            return np.zeros(shape_BLS, dtype=np.int64)
        problem = self.node_problem(load_BLE, rank_LE, present)
        return split.integer_quotas(*problem).numpy().reshape(shape_BLS)

    def relabelled(
        self, label_LD: np.ndarray, present: Present, spares_per_rank: int
    ) -> StaticCopies:
        """The same on ranks, and nodes of ranks, with new labels."""
        copies_per_node = np.bincount(self.node_of_S).max(initial=1)
        first_of_S = np.searchsorted(present.node_of_D, self.node_of_S)
        node_LS = present.node_of_D[label_LD[:, first_of_S]]
        entry_LS = node_LS * copies_per_node + np.arange(len(self.node_of_S)) % copies_per_node
        rank_LS = np.take_along_axis(label_LD, np.maximum(self.rank_LS, 0), 1)
        spare_LS = rank_LS * spares_per_rank + self.spare_LS % max(1, spares_per_rank)
        values = (self.copy_LS, rank_LS, spare_LS)
        moved = [np.full_like(self.copy_LS, -1) for _ in values]
        for new_LS, old_LS in zip(moved, values, strict=True):
            np.put_along_axis(new_LS, entry_LS, np.where(self.rank_LS >= 0, old_LS, -1), 1)
        copy_LS, rank_LS, spare_LS = moved
        return StaticCopies(copy_LS, rank_LS, spare_LS, self.node_of_S)

    def of_layers(self, layers: np.ndarray) -> StaticCopies:
        """The entries of some layers, in any order and number."""
        return StaticCopies(
            self.copy_LS[layers], self.rank_LS[layers], self.spare_LS[layers], self.node_of_S
        )

    def in_spare_slots(self, present: Present, spares_per_rank: int) -> np.ndarray:
        """Expert of each spare slot of the present ranks, -1 for none: [L, M]."""
        static_LM = np.full((len(self.copy_LS), len(present.ranks) * spares_per_rank), -1)
        self.put(static_LM, self.copy_LS)
        return static_LM

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
    homes_are_free: bool,
) -> tuple[StaticCopies, np.ndarray]:
    """Choose batch-static copies, their ranks, and the homes beside them: copies and rank_LE."""
    node_LE = present.node_of_D[rank_LE]
    speed_N = np.bincount(present.node_of_D, present.speed_D)
    copy_LS, node_of_S = choose_cross_node_copies(load_BLE, node_LE, speed_N, copies_per_node)
    rank_LS, depth_LS = np.full_like(copy_LS, -1), np.full_like(copy_LS, -1)
    unseated = StaticCopies(copy_LS, rank_LS, rank_LS, node_of_S)
    share_BLS = unseated.equal_shares(load_BLE, rank_LE, present)
    rest_BLE = load_BLE - unseated.served(share_BLS, load_BLE.shape[2])
    seats = [
        choose_seats(
            rest_BLE[:, layer],
            share_BLS[:, layer],
            rank_LE[layer],
            copy_LS[layer],
            node_of_S,
            present,
            spares_per_rank,
            homes_are_free,
        )
        for layer in range(len(copy_LS))
    ]
    rank_LE = rank_LE.copy()
    for layer, seat in enumerate(seats):
        rank_LS[layer], depth_LS[layer], rank_LE[layer] = seat.rank_S, seat.depth_S, seat.rank_E
    spare_LS = np.where(rank_LS >= 0, rank_LS * spares_per_rank + depth_LS, -1)
    return StaticCopies(copy_LS, rank_LS, spare_LS, node_of_S), rank_LE
