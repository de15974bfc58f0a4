"""Copies that stay on another node for the whole batch: where they sit, what each node serves.

Which experts get one is chosen in ``balance.steps.batch_copy_experts``, which rank of the node
holds it in ``balance.steps.batch_copy_ranks``. What is known here is their outcome, and from it,
once per batch, how every micro-batch divides its units over the nodes.
"""

from dataclasses import dataclass

import numpy as np
import torch

from balance.exact import bounds, split
from balance.steps.batch_copy_experts import choose_experts
from balance.steps.batch_copy_ranks import choose_seats
from balance.steps.present import Present


@dataclass(frozen=True)
class BatchCopies:
    """Batch-static copies, in J = nodes × copies per node entries; -1 where there is none.

    Attributes:
        copy_LJ: expert of each entry.
        rank_LJ: present rank that holds it.
        spare_LJ: spare slot that it takes, counted over the spare slots M of all present ranks.
        node_of_J: node of each entry.
    """

    copy_LJ: np.ndarray
    rank_LJ: np.ndarray
    spare_LJ: np.ndarray
    node_of_J: np.ndarray

    @property
    def num_entries(self) -> int:
        """J."""
        return self.copy_LJ.shape[1]

    def of_layers(self, layers: np.ndarray) -> "BatchCopies":
        """The entries of some layers, in any order and number."""
        return BatchCopies(
            self.copy_LJ[layers], self.rank_LJ[layers], self.spare_LJ[layers], self.node_of_J
        )

    def serve(self, unit_BLE: np.ndarray, rank_LE: np.ndarray, present: Present) -> "Serving":
        """Divide units over the nodes such that the slowest node is fastest, in whole units.

        Where that leaves a choice, an entry serves what its rank lacks to be busy all the time; an
        entry that has no rank yet serves an equal share.

        Args:
            unit_BLE: int64 units to serve.
            rank_LE: present rank of each home.
            present: ranks, nodes, speeds.
        """
        num_micro_batches, num_layers, num_experts = unit_BLE.shape
        if not self.num_entries:
            return self.serve_shares(unit_BLE, np.zeros((num_micro_batches, num_layers, 0), int))
        problem = (
            torch.from_numpy(unit_BLE.reshape(num_micro_batches * num_layers, num_experts)),
            torch.from_numpy(present.node_of_D[rank_LE]).repeat(num_micro_batches, 1),
            torch.from_numpy(self.copy_LJ).repeat(num_micro_batches, 1),
            torch.from_numpy(self.node_of_J),
            torch.from_numpy(present.speed_N),
        )
        has_ranks = bool((self.rank_LJ >= 0).any())
        wish_BLJ = self._lacking_units(unit_BLE, rank_LE, present) if has_ranks else None
        share_FJ = split.integer_quotas(
            *problem, None if wish_BLJ is None else torch.from_numpy(wish_BLJ).flatten(0, 1)
        )
        share_BLJ = share_FJ.numpy().reshape(num_micro_batches, num_layers, self.num_entries)
        bound_BL = bounds.node_level(*problem).numpy().reshape(num_micro_batches, num_layers)
        return self.serve_shares(unit_BLE, share_BLJ, bound_BL)

    def serve_shares(
        self, unit_BLE: np.ndarray, share_BLJ: np.ndarray, bound_BL: np.ndarray | None = None
    ) -> "Serving":
        """With what each entry serves given; home nodes serve the rest."""
        rest_BLE = unit_BLE.copy()
        for layer, entry in zip(*(self.copy_LJ >= 0).nonzero(), strict=True):
            rest_BLE[:, layer, self.copy_LJ[layer, entry]] -= share_BLJ[:, layer, entry]
        return Serving(self, share_BLJ, rest_BLE, bound_BL)

    def shares_of(self, divided_LEN: np.ndarray) -> np.ndarray:
        """Entries' part, share_LJ, of the units of each expert that each node shall serve."""
        layers = np.arange(len(self.copy_LJ))[:, None]
        share_LJ = divided_LEN[layers, np.maximum(self.copy_LJ, 0), self.node_of_J]
        return np.where(self.copy_LJ >= 0, share_LJ, 0)

    def relabelled(
        self, label_LD: np.ndarray, present: Present, spares_per_rank: int
    ) -> "BatchCopies":
        """The same on ranks, and nodes of ranks, with new labels."""
        copies_per_node = np.bincount(self.node_of_J).max(initial=1)
        first_of_J = np.searchsorted(present.node_of_D, self.node_of_J)
        node_LJ = present.node_of_D[label_LD[:, first_of_J]]
        entry_LJ = node_LJ * copies_per_node + np.arange(self.num_entries) % copies_per_node
        rank_LJ = np.take_along_axis(label_LD, np.maximum(self.rank_LJ, 0), 1)
        spare_LJ = rank_LJ * spares_per_rank + self.spare_LJ % max(1, spares_per_rank)
        values = (self.copy_LJ, rank_LJ, spare_LJ)
        moved = [np.full_like(self.copy_LJ, -1) for _ in values]
        for new_LJ, old_LJ in zip(moved, values, strict=True):
            np.put_along_axis(new_LJ, entry_LJ, np.where(self.rank_LJ >= 0, old_LJ, -1), 1)
        copy_LJ, rank_LJ, spare_LJ = moved
        return BatchCopies(copy_LJ, rank_LJ, spare_LJ, self.node_of_J)

    def in_spare_slots(self, present: Present, spares_per_rank: int) -> np.ndarray:
        """Expert of each spare slot of the present ranks, -1 for none: static_LM."""
        static_LM = np.full((len(self.copy_LJ), len(present.ranks) * spares_per_rank), -1)
        self.write_to_spares(static_LM, self.copy_LJ)
        return static_LM

    def write_to_spares(self, value_LM: np.ndarray, value_LJ: np.ndarray) -> None:
        """Write values of the entries, [..., L, J], to their spare slots, [..., L, M]."""
        layer, entry = (self.spare_LJ >= 0).nonzero()
        value_LM[..., layer, self.spare_LJ[layer, entry]] = value_LJ[..., layer, entry]

    def _lacking_units(
        self, unit_BLE: np.ndarray, rank_LE: np.ndarray, present: Present
    ) -> np.ndarray:
        """Units that keep each entry's rank busy, shared among the entries of that rank."""
        lack_BLD = np.maximum(present.lack(unit_BLE, rank_LE), 0).astype(np.int64)
        sharers_LJ = (self.rank_LJ[:, :, None] == self.rank_LJ[:, None, :]).sum(2)
        wish_BLJ = np.take_along_axis(lack_BLD, np.maximum(self.rank_LJ, 0)[None], 2) // sharers_LJ
        return np.where(self.copy_LJ >= 0, wish_BLJ, 0)


@dataclass(frozen=True)
class Serving:
    """Batch-static copies that have been told what they serve.

    Attributes:
        copies: the entries.
        share_BLJ: units that each entry serves.
        rest_BLE: units left to the home node of each expert.
        bound_BL: no split between these nodes is faster; None where shares were given.
    """

    copies: BatchCopies
    share_BLJ: np.ndarray
    rest_BLE: np.ndarray
    bound_BL: np.ndarray | None = None


def choose_batch_copies(
    unit_BLE: np.ndarray,
    rank_LE: np.ndarray,
    present: Present,
    spares_per_rank: int,
    copies_per_node: int,
    homes_are_free: bool,
) -> tuple[BatchCopies, np.ndarray]:
    """Choose batch-static copies, their ranks, and the homes beside them.

    Args:
        unit_BLE: int64 units to serve.
        rank_LE: present rank of each home.
        present: ranks, nodes, speeds.
        spares_per_rank: spare slots of each rank.
        copies_per_node: most of them that such copies take on a node.
        homes_are_free: may homes trade ranks inside their node?

    Returns:
        The copies, and rank_LE after such trades.
    """
    node_LE = present.node_of_D[rank_LE]
    copy_LJ, node_of_J = choose_experts(unit_BLE, node_LE, present.speed_N, copies_per_node)
    nowhere_LJ = np.full_like(copy_LJ, -1)
    guess = BatchCopies(copy_LJ, nowhere_LJ, nowhere_LJ, node_of_J).serve(
        unit_BLE, rank_LE, present
    )
    seats = [
        choose_seats(
            guess.rest_BLE[:, layer],
            guess.share_BLJ[:, layer],
            rank_LE[layer],
            copy_LJ[layer],
            node_of_J,
            present,
            spares_per_rank,
            homes_are_free,
        )
        for layer in range(len(copy_LJ))
    ]
    rank_LJ = np.stack([seat.rank_J for seat in seats])
    depth_LJ = np.stack([seat.depth_J for seat in seats])
    spare_LJ = np.where(rank_LJ >= 0, rank_LJ * spares_per_rank + depth_LJ, -1)
    rank_LE = np.stack([seat.rank_E for seat in seats])
    return BatchCopies(copy_LJ, rank_LJ, spare_LJ, node_of_J), rank_LE
