"""From homes, copies and units to slots and assignments."""

import numpy as np

from balance.steps.candidate import Candidate
from balance.steps.loads import Batch
from balance.topology import Topology


def home_slots_of(
    home_LE: np.ndarray, topology: Topology, previous_slot_LE: np.ndarray | None
) -> np.ndarray:
    """Slot of each home copy: the previous one where the rank stays, else the first free one."""
    num_experts = home_LE.shape[1]
    slots_per_rank = topology.slots_per_rank(num_experts)
    is_home_P = ~topology.is_spare_P(num_experts)
    slot_LE = np.full_like(home_LE, -1)
    if previous_slot_LE is not None:
        slot_LE = np.where(previous_slot_LE // slots_per_rank == home_LE, previous_slot_LE, -1)
    for slot_E, home_E in zip(slot_LE, home_LE, strict=True):
        movers = np.flatnonzero(slot_E < 0)
        movers = movers[np.argsort(home_E[movers], kind="stable")]
        free_P = is_home_P.copy()
        free_P[slot_E[slot_E >= 0]] = False
        free = np.flatnonzero(free_P)
        rank = home_E[movers]
        nth = np.arange(len(movers)) - np.searchsorted(rank, rank)
        slot_E[movers] = free[np.searchsorted(free // slots_per_rank, rank) + nth]
    return slot_LE


def slot_arrays(batch: Batch, slot_LE: np.ndarray, chosen: Candidate) -> dict[str, np.ndarray]:
    """The arrays of a ``Plan``: expert_of_BLP, quota_BLP in assignments, is_static_LP.

    Args:
        batch: loads and topology.
        slot_LE: slot of each home copy.
        chosen: copies, and who serves how many units.
    """
    num_micro_batches, num_layers, num_experts = batch.unit_BLE.shape
    topology = batch.topology
    is_present_P = topology.present_R[topology.rank_of_P(num_experts)]
    spare_slots = np.flatnonzero(topology.is_spare_P(num_experts) & is_present_P)
    shape_BLP = (num_micro_batches, num_layers, len(is_present_P))
    spare_BLM = np.where(chosen.copy_BLM >= 0, chosen.copy_BLM, chosen.static_LM)
    expert_of_BLP = np.full(shape_BLP, -1, dtype=np.int32)
    quota_BLP = np.zeros(shape_BLP, dtype=np.int32)
    is_static_LP = np.zeros(shape_BLP[1:], dtype=bool)
    layers = np.arange(num_layers)[:, None]
    expert_of_BLP[:, layers, slot_LE] = np.arange(num_experts)
    expert_of_BLP[:, :, spare_slots] = spare_BLM
    home_BLE, quota_BLM = _in_assignments(batch, spare_BLM, chosen)
    quota_BLP[:, layers, slot_LE] = home_BLE
    quota_BLP[:, :, spare_slots] = quota_BLM
    is_static_LP[:, spare_slots] = chosen.static_LM >= 0
    return {
        "expert_of_BLP": expert_of_BLP,
        "quota_BLP": quota_BLP,
        "is_static_LP": is_static_LP,
    }


def _in_assignments(
    batch: Batch, spare_BLM: np.ndarray, chosen: Candidate
) -> tuple[np.ndarray, np.ndarray]:
    """Quotas of home and spare copies in assignments.

    An expert's last tile is seldom full: the rows it lacks are taken from its home copy, or from
    its first spare copy where the home serves nothing.
    """
    tile_rows = batch.options.tile_rows
    home_BLE = chosen.home_unit_BLE * tile_rows
    quota_BLM = chosen.spare_unit_BLM * tile_rows
    lacking_BLE = batch.unit_BLE * tile_rows - batch.load_BLRE.sum(2, dtype=np.int64)
    from_home_BLE = np.where(home_BLE > 0, lacking_BLE, 0)
    home_BLE = home_BLE - from_home_BLE
    lacking_BLE = lacking_BLE - from_home_BLE
    for slot in range(spare_BLM.shape[2] if tile_rows > 1 else 0):
        expert_BL1 = np.maximum(spare_BLM[:, :, slot, None], 0)
        serves_BL1 = quota_BLM[:, :, slot, None] > 0
        lack_BL1 = np.where(serves_BL1, np.take_along_axis(lacking_BLE, expert_BL1, 2), 0)
        quota_BLM[:, :, slot] -= lack_BL1[:, :, 0]
        left_BL1 = np.take_along_axis(lacking_BLE, expert_BL1, 2) - lack_BL1
        np.put_along_axis(lacking_BLE, expert_BL1, left_BL1, 2)
    return home_BLE, quota_BLM
