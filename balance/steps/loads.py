"""The loads to plan for, checked at the border and counted in the unit of the plan."""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from balance.options import PlanOptions
from balance.plan import Plan
from balance.steps.present import Present
from balance.topology import Topology
from balance.trace import Trace


@dataclass(frozen=True)
class Batch:
    """Loads in units: assignments, or tiles of ``tile_rows`` assignments.

    Attributes:
        load_BLRE: int32 assignments from each source rank; R = 1 when sources are unknown.
        unit_BLE: int64 units of each expert, a last tile that is not full counted whole.
        knows_sources: were the source ranks given?
        topology: the machine.
        options: what the plan may do.
        present: the ranks that are there.
        trace: the routing itself; None when counts were given.
    """

    load_BLRE: np.ndarray
    unit_BLE: np.ndarray
    knows_sources: bool
    topology: Topology
    options: PlanOptions
    present: Present
    trace: Trace | None

    @classmethod
    def make(cls, given: Trace | Any, topology: Topology, options: PlanOptions) -> Self:
        """Check a trace or counts, and count them in units."""
        trace = given if isinstance(given, Trace) else None
        load_BLRE = _check_counts(given if trace is None else trace.counts(topology.num_ranks))
        num_sources = load_BLRE.shape[2]
        if num_sources not in (1, topology.num_ranks):
            raise ValueError(
                f"counts must have {topology.num_ranks} source ranks, got {num_sources}"
            )
        present = Present.of(topology, load_BLRE.shape[3])
        most = topology.spare_slots_per_rank * int(np.bincount(present.node_of_D).min())
        if options.cross_node_copies > most:
            raise ValueError(
                f"cross_node_copies must fit the spare slots of the smallest node, {most}, got "
                f"{options.cross_node_copies}"
            )
        unit_BLE = -(-load_BLRE.sum(2, dtype=np.int64) // options.tile_rows)
        knows_sources = trace is not None or (num_sources == topology.num_ranks > 1)
        return cls(load_BLRE, unit_BLE, knows_sources, topology, options, present, trace)

    @property
    def spares_per_rank(self) -> int:
        """Spare slots of each rank."""
        return self.topology.spare_slots_per_rank

    def of_layers(self, chosen_L: np.ndarray) -> "Batch":
        """The same with some of its layers; routing is left out."""
        return replace(
            self,
            load_BLRE=self.load_BLRE[:, chosen_L],
            unit_BLE=self.unit_BLE[:, chosen_L],
            trace=None,
        )

    def local_BLDE(self) -> np.ndarray | None:
        """Whole units that tokens on each present rank ask of each expert; None when unknown."""
        if not self.knows_sources:
            return None
        return self.load_BLRE[:, :, self.present.ranks] // self.options.tile_rows


def previous_homes(
    previous: Plan | Any | None, batch: Batch
) -> tuple[np.ndarray, np.ndarray | None]:
    """Home ranks before this plan, and their slots where the layout is still the same."""
    topology = batch.topology
    _, num_layers, num_experts = batch.unit_BLE.shape
    if previous is None:
        whole = replace(topology, missing_ranks=())
        return np.tile(whole.contiguous_home_rank_E(num_experts), (num_layers, 1)), None
    home_LE = previous.home_rank_LE if isinstance(previous, Plan) else np.asarray(previous)
    if home_LE.shape != (num_layers, num_experts) or home_LE.dtype.kind not in "iu":
        raise ValueError(
            f"previous must be a plan or integer home ranks [{num_layers}, {num_experts}], got "
            f"{home_LE.dtype} {list(home_LE.shape)}"
        )
    home_LE = home_LE.astype(np.int64)
    if home_LE.size and not 0 <= home_LE.min() <= home_LE.max() < topology.num_ranks:
        raise ValueError(f"previous must lie in 0..{topology.num_ranks - 1}, got {home_LE.max()}")
    same_layout = (
        isinstance(previous, Plan)
        and previous.slots_per_rank == topology.slots_per_rank(num_experts)
        and previous.topology.home_slots(num_experts) == topology.home_slots(num_experts)
    )
    return home_LE, previous.home_slot_LE.astype(np.int64) if same_layout else None


def as_problems(value: np.ndarray) -> np.ndarray:
    """Micro-batches and layers in one axis: [B, L, ...] -> [F, ...]."""
    num_micro_batches, num_layers, *rest = value.shape
    return value.reshape(num_micro_batches * num_layers, *rest)


def _check_counts(counts: Any) -> np.ndarray:
    """Counts as load_BLRE int32, or ValueError: nothing is rounded, wrapped or cut silently."""
    counts = np.asarray(counts)
    if counts.ndim == 3:
        counts = counts[:, :, None]
    if counts.ndim != 4 or 0 in counts.shape[1:]:
        raise ValueError(
            f"counts must be load_BLRE or load_BLE with layers, ranks and experts, got "
            f"{list(counts.shape)}"
        )
    if counts.dtype.kind == "f":
        if not np.isfinite(counts).all() or (counts != np.floor(counts)).any():
            raise ValueError("counts must be whole numbers, got fractions, NaN or infinity")
    elif counts.dtype.kind not in "iub":
        raise ValueError(f"counts must be integers, got {counts.dtype}")
    if counts.size and counts.min() < 0:
        raise ValueError(f"counts must be >= 0, got {counts.min()}")
    most = np.iinfo(np.int32).max
    if counts.size and counts.max() > most:
        raise ValueError(f"counts must fit int32, got {counts.max()}")
    total_BL = counts.sum((2, 3), dtype=np.int64)
    if total_BL.max(initial=0) > most:
        raise ValueError(
            f"counts of a micro-batch and layer must sum to at most {most}, got {total_BL.max()}"
        )
    return counts.astype(np.int32)
