"""Is a plan one that can be executed?"""

import numpy as np

from balance.topology import Topology


def why_illegal(
    topology: Topology,
    expert_of_BLP: np.ndarray,
    quota_BLP: np.ndarray,
    home_slot_LE: np.ndarray,
    is_static_LP: np.ndarray,
    load_BLE: np.ndarray,
) -> str | None:
    """The first broken rule of a plan, or None; arguments as in ``balance.plan.Plan``.

    Every expert sits in its home slot; a rank holds no expert twice; missing ranks hold nothing;
    batch-static copies never change; other copies stay on a node with the home or a batch-static
    copy; quotas are not negative, stand only where a copy is, and sum to the loads.
    """
    num_experts = load_BLE.shape[2]
    rank_of_P = topology.rank_of_P(num_experts)
    if expert_of_BLP.shape != (*load_BLE.shape[:2], len(rank_of_P)):
        return f"expert_of_BLP must have {len(rank_of_P)} slots, got {list(expert_of_BLP.shape)}"
    experts = expert_of_BLP.astype(np.int64)
    if experts.size and not -1 <= experts.min() <= experts.max() < num_experts:
        return f"expert_of_BLP must lie in -1..{num_experts - 1}"
    reason = _why_misplaced(topology, rank_of_P, experts, home_slot_LE, is_static_LP, num_experts)
    return reason or _why_unbalanced(experts, quota_BLP, load_BLE)


def _why_misplaced(
    topology: Topology,
    rank_of_P: np.ndarray,
    experts: np.ndarray,
    home_slot_LE: np.ndarray,
    is_static_LP: np.ndarray,
    num_experts: int,
) -> str | None:
    """The first broken rule of where copies are, or None."""
    filled = experts >= 0
    layers = np.arange(len(home_slot_LE))[:, None]
    if (experts[:, layers, home_slot_LE] != np.arange(num_experts)).any():
        return "an expert is not in its home slot"
    if (filled & ~topology.present_R[rank_of_P]).any():
        return "a missing rank holds an expert"
    # Empty slots get keys of their own, so that only real copies can be equal.
    key = np.where(filled, rank_of_P * num_experts + experts, -1 - np.arange(len(rank_of_P)))
    key.sort(axis=2)
    if (key[:, :, 1:] == key[:, :, :-1]).any():
        return "a rank holds two copies of an expert"
    if (experts != experts[:1])[:, is_static_LP].any():
        return "a batch-static copy changes between micro-batches"
    node_of_P = topology.node_of_R[rank_of_P]
    hosts_LNE = np.zeros((len(layers), topology.num_nodes, num_experts + 1), dtype=bool)
    hosts_LNE[layers, node_of_P[home_slot_LE], np.arange(num_experts)] = True
    layer, slot = is_static_LP.nonzero()
    hosts_LNE[layer, node_of_P[slot], experts[:1, layer, slot]] = True
    if (filled & ~hosts_LNE[layers, node_of_P, experts]).any():
        return "a micro-batch copy is on a node without a copy that stays for the batch"
    return None


def _why_unbalanced(
    experts: np.ndarray, quota_BLP: np.ndarray, load_BLE: np.ndarray
) -> str | None:
    """The first broken rule of what copies serve, or None."""
    if (quota_BLP < 0).any() or (quota_BLP[experts < 0] != 0).any():
        return "a quota is negative or stands on an empty slot"
    served = np.zeros((*experts.shape[:2], load_BLE.shape[2] + 1), dtype=np.int64)
    batch, layer, _ = np.ogrid[tuple(slice(size) for size in experts.shape)]
    np.add.at(served, (batch, layer, experts), quota_BLP)
    if (served[:, :, :-1] != load_BLE).any():
        return "quotas do not sum to the loads"
    return None
