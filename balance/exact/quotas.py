"""Which copy serves which token, without a table per token?

The quotas of an expert's copies are dealt out to source ranks. Token number t, in order, of those
on rank r that chose expert e goes to the first copy v with ``quota_prefix_REV[r, e, v] > t``.

    two source ranks with 5 and 3 tokens for e, copies with quotas 4 and 4, on ranks 0 and 1
    quota_prefix[:, e] = [[4, 5],   rank 0: tokens 0..3 to copy 0, token 4 to copy 1
                          [0, 3]]   rank 1: all three to copy 1, which is local
"""

import numpy as np


def slots_of_experts(expert_of_P: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots of every expert and how many there are (EPLB's ``log2phy`` and ``logcnt``).

    Args:
        expert_of_P: expert in each slot, -1 for none.
        num_experts: E.

    Returns:
        slot_of_EV int32, ascending, padded with -1 to the most copies of any expert, and copies_E
        int32.
    """
    slots = np.flatnonzero(expert_of_P >= 0)
    slots = slots[np.argsort(expert_of_P[slots], kind="stable")]
    experts = expert_of_P[slots]
    copies_E = np.bincount(experts, minlength=num_experts)
    nth = np.arange(len(slots)) - np.repeat(np.cumsum(copies_E) - copies_E, copies_E)
    slot_of_EV = np.full((num_experts, max(1, int(copies_E.max()))), -1, dtype=np.int32)
    slot_of_EV[experts, nth] = slots
    return slot_of_EV, copies_E.astype(np.int32)


def quota_prefix(
    load_RE: np.ndarray, quota_EV: np.ndarray, rank_of_EV: np.ndarray, node_of_R: np.ndarray
) -> np.ndarray:
    """Deal the quotas of copies out to source ranks: own rank first, then own node, then anyone.

    Args:
        load_RE: int64 assignments from each source rank to each expert.
        quota_EV: int64 assignments that each copy serves; sums to the expert's load.
        rank_of_EV: rank of each copy, -1 for padding, where the quota is 0.
        node_of_R: node of each rank; empty when source ranks are unknown (load_RE has one row).

    Returns:
        prefix_REV int32, cumulative over copies; the last entry is the source's load.
    """
    load_RE, quota_EV = load_RE.astype(np.int64), quota_EV.astype(np.int64)
    dealt_REV = np.zeros((*load_RE.shape, quota_EV.shape[1]), dtype=np.int64)
    if len(node_of_R):
        expert, copy = (rank_of_EV >= 0).nonzero()
        rank = rank_of_EV[expert, copy]
        dealt_REV[rank, expert, copy] = np.minimum(load_RE[rank, expert], quota_EV[expert, copy])
        node_of_EV = np.where(rank_of_EV >= 0, node_of_R[rank_of_EV], -1)
        for node in np.unique(node_of_R):
            _deal(dealt_REV, load_RE, quota_EV, node_of_R == node, node_of_EV == node)
    _deal(dealt_REV, load_RE, quota_EV, np.ones(len(load_RE), bool), np.ones(quota_EV.shape, bool))
    return dealt_REV.cumsum(2).astype(np.int32)


def _deal(
    dealt_REV: np.ndarray,
    load_RE: np.ndarray,
    quota_EV: np.ndarray,
    giver_R: np.ndarray,
    taker_EV: np.ndarray,
) -> None:
    """Match what is left of the givers' loads with what is left of the takers' quotas, in order.

    Laid end to end, rank r's tokens and copy v's quota meet where their intervals overlap.
    """
    supply_rE = (load_RE - dealt_REV.sum(2))[giver_R]
    demand_EV = (quota_EV - dealt_REV.sum(0)) * taker_EV
    supply_end_rE = supply_rE.cumsum(0)
    demand_end_EV = demand_EV.cumsum(1)
    end_rEV = np.minimum(supply_end_rE[:, :, None], demand_end_EV)
    start_rEV = np.maximum((supply_end_rE - supply_rE)[:, :, None], demand_end_EV - demand_EV)
    dealt_REV[giver_R] += np.maximum(end_rEV - start_rEV, 0)


def assign_slots(
    expert_of_TK: np.ndarray,
    source_rank_T: np.ndarray,
    prefix_REV: np.ndarray,
    slot_of_EV: np.ndarray,
) -> np.ndarray:
    """Slot of every assignment, by its ordinal among those of the same source rank and expert.

    Args:
        expert_of_TK: expert ids in [0, E), or -1 for none; assignments count in token-major order.
        source_rank_T: rank of each token.
        prefix_REV: as ``quota_prefix`` returns it.
        slot_of_EV: as ``slots_of_experts`` returns it.

    Returns:
        slot_of_TK int32, -1 where there is no expert.

    Raises:
        ValueError: a source rank has more assignments for an expert than the plan counted.
    """
    num_experts = len(slot_of_EV)
    expert_A = expert_of_TK.reshape(-1).astype(np.int64)
    source_A = np.repeat(source_rank_T.astype(np.int64), expert_of_TK.shape[1])
    real = np.flatnonzero(expert_A >= 0)
    key = source_A[real] * num_experts + expert_A[real]
    order = np.argsort(key, kind="stable")
    sorted_key = key[order]
    ordinal = np.empty(len(key), dtype=np.int64)
    ordinal[order] = np.arange(len(key)) - np.searchsorted(sorted_key, sorted_key)
    prefix_aV = prefix_REV[source_A[real], expert_A[real]]
    copy_a = (prefix_aV <= ordinal[:, None]).sum(1)
    if (copy_a >= slot_of_EV.shape[1]).any():
        worst = real[copy_a.argmax()]
        raise ValueError(
            f"expert_of_TK must hold the assignments that were planned, got one more from source "
            f"rank {source_A[worst]} to expert {expert_A[worst]}"
        )
    slot_A = np.full(len(expert_A), -1, dtype=np.int32)
    slot_A[real] = slot_of_EV[expert_A[real], copy_a]
    return slot_A.reshape(expert_of_TK.shape)
