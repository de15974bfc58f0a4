"""Where experts can live: nodes, ranks, their speeds, and the slots on them.

Slot p is on rank ``p // Q``. On every rank the first slots are *home* slots (the copy that owns
the optimizer state) and the last ones are *spare* slots (extra copies, for a batch or a
micro-batch):

    num_nodes=1, ranks_per_node=2, spare_slots_per_rank=1, 5 experts  ->  Q = 3 + 1

    slot        0 1 2 | 3    4 5  6 | 7
    rank        0 0 0   0    1 1  1   1
    holds       0 1 2   s    3 4 -1   s        s = spare, -1 = empty home slot
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from balance.checks import whole


@dataclass(frozen=True)
class Topology:
    """The machine a plan is made for.

    Attributes:
        num_nodes: Nodes N >= 1. Copies made for one micro-batch stay inside a node,
            where links are fast.
        ranks_per_node: Ranks of every node, or a sequence with one count per node (uneven nodes).
        spare_slots_per_rank: Slots for extra copies on every rank, >= 0.
        home_slots_per_rank: Slots for owned experts on every rank; None means just enough,
            ``ceil(experts / present ranks)``.
        rank_speed: Relative speed of each rank, > 0; None means all 1. Load is measured in
            assignments / speed.
        missing_ranks: Ranks that hold nothing (failed or drained); their slots keep their numbers.

    Raises:
        ValueError: A count is out of range, a length does not match, or no rank is left.
    """

    num_nodes: int = 1
    ranks_per_node: int | Sequence[int] = 8
    spare_slots_per_rank: int = 1
    home_slots_per_rank: int | None = None
    rank_speed: Sequence[float] | None = None
    missing_ranks: Sequence[int] = ()

    def __post_init__(self) -> None:
        freeze = object.__setattr__
        for name, least in (("num_nodes", 1), ("spare_slots_per_rank", 0)):
            freeze(self, name, whole(name, getattr(self, name), least))
        if self.home_slots_per_rank is not None:
            slots = whole("home_slots_per_rank", self.home_slots_per_rank, 1)
            freeze(self, "home_slots_per_rank", slots)
        if isinstance(self.ranks_per_node, Sequence | np.ndarray):
            counts = tuple(whole("ranks_per_node", count, 1) for count in self.ranks_per_node)
            freeze(self, "ranks_per_node", counts)
        else:
            freeze(self, "ranks_per_node", whole("ranks_per_node", self.ranks_per_node, 1))
        if self.rank_speed is not None:
            freeze(self, "rank_speed", tuple(float(speed) for speed in self.rank_speed))
        missing = {whole("missing_ranks", rank, 0) for rank in self.missing_ranks}
        freeze(self, "missing_ranks", tuple(sorted(missing)))
        self._check()

    def _check(self) -> None:
        """Do the nodes have ranks, and the ranks speeds?"""
        if len(self.ranks_of_N) != self.num_nodes:
            raise ValueError(
                f"ranks_per_node must give at least 1 rank to each of the {self.num_nodes} nodes, "
                f"got {self.ranks_per_node}"
            )
        speeds = self.rank_speed
        if speeds is not None and len(speeds) != self.num_ranks:
            raise ValueError(
                f"rank_speed must have one entry per rank ({self.num_ranks}), got {len(speeds)}"
            )
        if speeds is not None and not all(0 < speed < np.inf for speed in speeds):
            raise ValueError(f"rank_speed must be finite and > 0, got {speeds}")
        if any(not 0 <= rank < self.num_ranks for rank in self.missing_ranks):
            raise ValueError(
                f"missing_ranks must lie in 0..{self.num_ranks - 1}, got {self.missing_ranks}"
            )
        if len(self.missing_ranks) == self.num_ranks:
            raise ValueError(f"missing_ranks must leave a rank, got all {self.num_ranks}")

    @property
    def ranks_of_N(self) -> tuple[int, ...]:
        """How many ranks each node has, missing ones included."""
        if isinstance(self.ranks_per_node, int | np.integer):
            return (int(self.ranks_per_node),) * self.num_nodes
        return tuple(self.ranks_per_node)

    @property
    def num_ranks(self) -> int:
        """R, missing ranks included."""
        return sum(self.ranks_of_N)

    @cached_property
    def node_of_R(self) -> np.ndarray:
        """[R] int64: the node of each rank."""
        return np.repeat(np.arange(self.num_nodes), self.ranks_of_N)

    @cached_property
    def present_R(self) -> np.ndarray:
        """[R] bool: False for missing ranks."""
        present_R = np.ones(self.num_ranks, dtype=bool)
        present_R[list(self.missing_ranks)] = False
        return present_R

    @cached_property
    def speed_R(self) -> np.ndarray:
        """[R] float64: relative speed, 0 for missing ranks."""
        speed_R = np.ones(self.num_ranks) if self.rank_speed is None else np.array(self.rank_speed)
        return np.where(self.present_R, speed_R, 0.0)

    def home_slots(self, num_experts: int) -> int:
        """Home slots on each rank.

        Raises:
            ValueError: ``num_experts`` is not positive or does not fit the home slots.
        """
        num_present = int(self.present_R.sum())
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        needed = -(-num_experts // num_present)
        if self.home_slots_per_rank is not None and self.home_slots_per_rank < needed:
            raise ValueError(
                f"home_slots_per_rank must be at least {needed} for {num_experts} experts on "
                f"{num_present} present ranks, got {self.home_slots_per_rank}"
            )
        return self.home_slots_per_rank or needed

    def slots_per_rank(self, num_experts: int) -> int:
        """Q: home slots plus spare slots of one rank."""
        return self.home_slots(num_experts) + self.spare_slots_per_rank

    def num_slots(self, num_experts: int) -> int:
        """P = R·Q."""
        return self.num_ranks * self.slots_per_rank(num_experts)

    def rank_of_P(self, num_experts: int) -> np.ndarray:
        """[P] int64: the rank of each slot."""
        return np.repeat(np.arange(self.num_ranks), self.slots_per_rank(num_experts))

    def is_spare_P(self, num_experts: int) -> np.ndarray:
        """[P] bool: True for spare slots, those of missing ranks included."""
        slot_in_rank_P = np.arange(self.num_slots(num_experts)) % self.slots_per_rank(num_experts)
        return slot_in_rank_P >= self.home_slots(num_experts)

    def contiguous_home_rank_E(self, num_experts: int) -> np.ndarray:
        """[E] int64: home rank when nothing is planned.

        Experts in order, in blocks that differ by at most one expert, over the present ranks.
        """
        self.home_slots(num_experts)
        ranks = np.flatnonzero(self.present_R)
        small, num_larger = divmod(num_experts, len(ranks))
        sizes = np.where(np.arange(len(ranks)) < num_larger, small + 1, small)
        return np.repeat(ranks, sizes)
