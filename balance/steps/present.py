"""The ranks that are there, numbered without gaps, so that no later step asks who is missing."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from balance.topology import Topology


@dataclass(frozen=True)
class Present:
    """The present ranks of a topology and the seats for homes on them.

    Attributes:
        ranks: number in the topology of each present rank, ascending.
        node_of_D: node of each, numbered without gaps too: a node without ranks is no node.
        speed_D: relative speed of each, > 0.
        seats_D: home slots of each.
    """

    ranks: np.ndarray
    node_of_D: np.ndarray
    speed_D: np.ndarray
    seats_D: np.ndarray

    @classmethod
    def of(cls, topology: Topology, num_experts: int) -> Self:
        """The present ranks of a machine that hosts so many experts per layer."""
        ranks = np.flatnonzero(topology.present_R)
        node_of_D = np.unique(topology.node_of_R[ranks], return_inverse=True)[1]
        seats_D = np.full(len(ranks), topology.home_slots(num_experts))
        return cls(ranks, node_of_D, topology.speed_R[ranks], seats_D)

    @property
    def num_nodes(self) -> int:
        """Nodes that have a present rank."""
        return int(self.node_of_D.max()) + 1

    @property
    def speed_N(self) -> np.ndarray:
        """Speed of all ranks of each node together, float64."""
        return np.bincount(self.node_of_D, self.speed_D)

    def ranks_of_node(self, node: int) -> np.ndarray:
        """Present ranks of a node, ascending."""
        return np.flatnonzero(self.node_of_D == node)

    def rank_load(self, load_BLE: np.ndarray, rank_LE: np.ndarray) -> np.ndarray:
        """Load of each present rank's home experts, float64 [B, L, D]."""
        at_rank_LED = (rank_LE[:, :, None] == np.arange(len(self.ranks))).astype(np.float64)
        return (load_BLE.transpose(1, 0, 2) @ at_rank_LED).transpose(1, 0, 2)

    def lack(self, load_BLE: np.ndarray, rank_LE: np.ndarray) -> np.ndarray:
        """Load that each rank's homes fall short of its part of the whole by, float64 [B, L, D].

        A rank's part is what it would serve if all were busy all the time; negative where its
        homes ask for more than that.
        """
        part_BLD = load_BLE.sum(2)[:, :, None] * (self.speed_D / self.speed_D.sum())
        return part_BLD - self.rank_load(load_BLE, rank_LE)
