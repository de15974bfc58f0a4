"""The plan: which expert every slot holds, and how many tokens each copy serves."""

import json
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, Self

import numpy as np

from balance.exact.quotas import assign_slots, quota_prefix, slots_of_experts
from balance.measures.legal import why_illegal
from balance.measures.load import (
    bytes_moved,
    ratio_to,
    round_to_tiles,
    summarize,
    summarize_bound,
)
from balance.measures.traffic import Traffic, count_traffic
from balance.options import PlanOptions
from balance.topology import Topology
from balance.trace import Trace


@dataclass(frozen=True, eq=False)
class Plan:
    """Placement and quotas for every micro-batch and layer, checked on construction.

    Attributes:
        topology: the machine.
        options: what the planner was asked for.
        expert_of_BLP: int32 expert in each slot, -1 for an empty slot; slot p is on rank p // Q.
        quota_BLP: int32 assignments that each slot serves.
        home_slot_LE: int32 slot of each expert's home copy, the same for the whole batch.
        is_static_LP: bool, spare slots whose copy stays for the batch and may serve other nodes.
        load_BLRE: int32 assignments from each source rank; R = 1 when sources are unknown.
        bound_BL: lower bound of the slowest rank's load / speed, in rows when tiles count.
        previous_home_LE: int64 home ranks before this plan.
        plan_seconds: time it took to plan.
        trace: the routing that was planned for; None when counts were given.

    Raises:
        ValueError: the plan is not legal; the message says where.
    """

    topology: Topology
    options: PlanOptions
    expert_of_BLP: np.ndarray
    quota_BLP: np.ndarray
    home_slot_LE: np.ndarray
    is_static_LP: np.ndarray
    load_BLRE: np.ndarray
    bound_BL: np.ndarray
    previous_home_LE: np.ndarray
    plan_seconds: float = 0.0
    trace: Trace | None = None

    def __post_init__(self) -> None:
        reason = why_illegal(
            self.topology,
            self.expert_of_BLP,
            self.quota_BLP,
            self.home_slot_LE,
            self.is_static_LP,
            self.load_BLRE.sum(2, dtype=np.int64),
        )
        if reason is not None:
            raise ValueError(f"plan must be legal: {reason}")

    @property
    def num_micro_batches(self) -> int:
        """B."""
        return self.load_BLRE.shape[0]

    @property
    def num_layers(self) -> int:
        """L."""
        return self.load_BLRE.shape[1]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.load_BLRE.shape[3]

    @property
    def slots_per_rank(self) -> int:
        """Q."""
        return self.topology.slots_per_rank(self.num_experts)

    @property
    def home_rank_LE(self) -> np.ndarray:
        """Home rank of every expert, int64 [L, E]."""
        return self.home_slot_LE.astype(np.int64) // self.slots_per_rank

    def expert_of_P(self, micro_batch: int, layer: int) -> np.ndarray:
        """Expert in each slot, int32, -1 for an empty slot (``physical_to_logical_map``)."""
        self._check_place(micro_batch, layer)
        return self.expert_of_BLP[micro_batch, layer]

    def slots_of_experts(self, micro_batch: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """slot_of_EV int32 padded with -1, and copies_E int32 (EPLB's log2phy and logcnt)."""
        return slots_of_experts(self.expert_of_P(micro_batch, layer), self.num_experts)

    def eplb_maps(self, micro_batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All layers' phy2log [L, P], log2phy [L, E, V] and logcnt [L, E], int64, padded with -1.

        As EPLB's ``rebalance_experts`` returns them, except that empty slots hold -1.
        """
        self._check_place(micro_batch, 0)
        maps = [self.slots_of_experts(micro_batch, layer) for layer in range(self.num_layers)]
        most = max((slots.shape[1] for slots, _ in maps), default=1)
        log2phy = np.full((self.num_layers, self.num_experts, most), -1, dtype=np.int64)
        for layer, (slots, _) in enumerate(maps):
            log2phy[layer, :, : slots.shape[1]] = slots
        logcnt = np.array([copies for _, copies in maps], dtype=np.int64)
        return self.expert_of_BLP[micro_batch].astype(np.int64), log2phy, logcnt

    def quota_prefix(self, micro_batch: int, layer: int) -> np.ndarray:
        """prefix_REV int32: assignment number t of (source rank r, expert e) goes to the first
        copy v, in the order of ``slots_of_experts``, with ``prefix_REV[r, e, v] > t``."""
        slot_of_EV, _ = self.slots_of_experts(micro_batch, layer)
        is_copy_EV = slot_of_EV >= 0
        quota_EV = np.where(is_copy_EV, self.quota_BLP[micro_batch, layer][slot_of_EV], 0)
        rank_of_EV = np.where(is_copy_EV, slot_of_EV // self.slots_per_rank, -1)
        load_RE = self.load_BLRE[micro_batch, layer]
        node_of_R = self.topology.node_of_R if self.knows_sources else np.zeros(0, np.int64)
        return quota_prefix(load_RE, quota_EV, rank_of_EV, node_of_R)

    @property
    def knows_sources(self) -> bool:
        """Were the source ranks of the assignments given?"""
        return self.load_BLRE.shape[2] == self.topology.num_ranks

    def slot_of_TK(self, micro_batch: int, layer: int, trace: Trace | None = None) -> np.ndarray:
        """Slot of every choice of every token of a micro-batch, int32, -1 for no expert.

        Args:
            micro_batch: which, from 0.
            layer: which, from 0.
            trace: the routing; None takes the one that the plan was made from.

        Raises:
            ValueError: no trace is known, or it does not hold the planned assignments.
        """
        trace = self._trace_or(trace)
        slot_of_EV, _ = self.slots_of_experts(micro_batch, layer)
        prefix_REV = self.quota_prefix(micro_batch, layer)
        source_rank_T = trace.source_ranks_of(micro_batch)
        if not self.knows_sources:
            source_rank_T = np.zeros_like(source_rank_T)
        expert_of_TK = trace.ids_of(micro_batch)[:, layer]
        self._check_same_loads(micro_batch, layer, expert_of_TK, source_rank_T)
        return assign_slots(expert_of_TK, source_rank_T, prefix_REV, slot_of_EV)

    def _check_same_loads(
        self, micro_batch: int, layer: int, expert_of_TK: np.ndarray, source_rank_T: np.ndarray
    ) -> None:
        """Refuse routing that is not what was planned for."""
        load_RE = self.load_BLRE[micro_batch, layer]
        is_real_TK = expert_of_TK >= 0
        expert_A = expert_of_TK[is_real_TK]
        source_A = np.broadcast_to(source_rank_T[:, None], expert_of_TK.shape)[is_real_TK]
        found_RE = np.zeros(load_RE.shape, dtype=np.int64)
        fits = (expert_A < found_RE.shape[1]).all() and (source_A < found_RE.shape[0]).all()
        if fits:
            np.add.at(found_RE, (source_A, expert_A), 1)
        if not fits or (found_RE != load_RE).any():
            raise ValueError(
                f"trace must hold the assignments that were planned, got others in micro-batch "
                f"{micro_batch}, layer {layer}"
            )

    def traffic(self, trace: Trace | None = None) -> Traffic:
        """Sends between ranks and nodes over all micro-batches and layers of a trace.

        Raises:
            ValueError: as ``slot_of_TK``.
        """
        trace = self._trace_or(trace)
        total = Traffic()
        for micro_batch, layer in np.ndindex(self.num_micro_batches, self.num_layers):
            slot_of_TK = self.slot_of_TK(micro_batch, layer, trace)
            source_rank_T = trace.source_ranks_of(micro_batch)
            total += count_traffic(slot_of_TK, source_rank_T, self.slots_per_rank, self.topology)
        return total

    def rank_load_BLR(self) -> np.ndarray:
        """Assignments on each rank, float64; in rows of whole tiles when tiles count."""
        rows_BLP = round_to_tiles(self.quota_BLP, self.options.tile_rows)
        shape = (*rows_BLP.shape[:2], self.topology.num_ranks, self.slots_per_rank)
        return rows_BLP.reshape(shape).sum(3)

    def level_BL(self) -> np.ndarray:
        """Load / speed of the slowest rank."""
        present_R = self.topology.present_R
        load_BLR = self.rank_load_BLR()[:, :, present_R]
        return (load_BLR / self.topology.speed_R[present_R]).max(2)

    def gap_BL(self) -> np.ndarray:
        """Level over lower bound - 1; 0 where there is no load."""
        return ratio_to(self.bound_BL, self.level_BL()) - 1

    def summary(self) -> dict[str, float]:
        """Figures of the plan.

        imbalance_*, efficiency, straggler_avg as in ``balance.measures.load``;
        ``lower_bound_avg`` is the least imbalance that homes and batch-static copies allow;
        ``gap_*`` compare each level with its bound. ``copies_avg`` counts micro-batch copies per
        micro-batch and layer, ``static_copies_avg`` batch-static ones per layer, ``moves_avg``
        home moves per layer. ``moved_bytes`` is what all of them send in this batch.
        """
        num_static = int(self.is_static_LP.sum())
        num_homes = self.num_layers * self.num_experts
        num_copies = int((self.expert_of_BLP >= 0).sum())
        num_copies -= self.num_micro_batches * (num_homes + num_static)
        num_moves = int((self.home_rank_LE != self.previous_home_LE).sum())
        load_BLR, speed_R = self.rank_load_BLR(), self.topology.speed_R
        return {
            **asdict(summarize(load_BLR, speed_R)),
            **summarize_bound(self.level_BL(), self.bound_BL, load_BLR.sum(2) / speed_R.sum()),
            "copies_avg": num_copies / max(1, self.bound_BL.size),
            "static_copies_avg": num_static / max(1, self.num_layers),
            "moves_avg": num_moves / max(1, self.num_layers),
            "moved_bytes": bytes_moved(
                num_copies + num_static,
                num_moves,
                self.options.copy_bytes,
                self.options.state_bytes,
            ),
            "plan_seconds": self.plan_seconds,
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan, without its trace, as one compressed npz file at exactly this path."""
        settings = {"topology": asdict(self.topology), "options": asdict(self.options)}
        with open(path, "wb") as file:
            np.savez_compressed(
                file,
                settings=np.str_(json.dumps(settings)),
                plan_seconds=np.float64(self.plan_seconds),
                **{name: getattr(self, name) for name in _ARRAYS},
            )

    @classmethod
    def load(cls, path: str | PathLike[str], trace: Trace | None = None) -> Self:
        """Read what ``save`` wrote; legality is checked again.

        Raises:
            ValueError: the file is no plan, or not a legal one.
        """
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in ("settings", *_ARRAYS) if name not in file]
            if missing:
                raise ValueError(f"path must be a saved Plan; {path} lacks {', '.join(missing)}")
            settings: dict[str, Any] = json.loads(str(file["settings"]))
            return cls(
                Topology(**settings["topology"]),
                PlanOptions(**settings["options"]),
                **{name: file[name] for name in _ARRAYS},
                plan_seconds=float(file["plan_seconds"]),
                trace=trace,
            )

    def _trace_or(self, trace: Trace | None) -> Trace:
        """The trace given, else the one that was planned for."""
        trace = trace or self.trace
        if trace is None:
            raise ValueError(
                "trace must be given: the plan was made from counts or read from file"
            )
        return trace

    def _check_place(self, micro_batch: int, layer: int) -> None:
        """Is there such a micro-batch and layer?"""
        for name, value, count in (
            ("micro_batch", micro_batch, self.num_micro_batches),
            ("layer", layer, self.num_layers),
        ):
            if not 0 <= value < count:
                raise ValueError(f"{name} must lie in [0, {count}), got {value}")


_ARRAYS = (
    "expert_of_BLP",
    "quota_BLP",
    "home_slot_LE",
    "is_static_LP",
    "load_BLRE",
    "bound_BL",
    "previous_home_LE",
)
