"""Is a plan one that can be executed?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from balance.plan import Plan


def why_illegal(plan: Plan) -> str | None:
    """The first broken rule of a plan, or None.

    Every expert sits in its home slot; a rank holds no expert twice; missing ranks hold nothing;
    batch-static copies never change; other copies stay on a node with the home or a batch-static
    copy; quotas are not negative, stand only where a copy is, and sum to the loads.
    """
    experts = plan.expert_of_BLP.astype(np.int64)
    num_experts, rank_of_P = plan.num_experts, plan.topology.rank_of_P(plan.num_experts)
    if experts.shape[2:] != rank_of_P.shape:
        return f"expert_of_BLP must have {len(rank_of_P)} slots, got {list(experts.shape)}"
    if experts.size and not -1 <= experts.min() <= experts.max() < num_experts:
        return f"expert_of_BLP must lie in -1..{num_experts - 1}"
    filled = experts >= 0
    layers = np.arange(plan.num_layers)[:, None]
    if (experts[:, layers, plan.home_slot_LE] != np.arange(num_experts)).any():
        return "an expert is not in its home slot"
    if (filled & ~plan.topology.present_R[rank_of_P]).any():
        return "a missing rank holds an expert"
    # Empty slots get keys of their own, so that only real copies can be equal.
    key = np.where(filled, rank_of_P * num_experts + experts, -1 - np.arange(len(rank_of_P)))
    key.sort(axis=2)
    if (key[:, :, 1:] == key[:, :, :-1]).any():
        return "a rank holds two copies of an expert"
    node_of_P = plan.topology.node_of_R[rank_of_P]
    hosts_LNE = np.zeros((plan.num_layers, plan.topology.num_nodes, num_experts + 1), dtype=bool)
    hosts_LNE[layers, node_of_P[plan.home_slot_LE], np.arange(num_experts)] = True
    layer, slot = plan.is_static_LP.nonzero()
    hosts_LNE[layer, node_of_P[slot], experts[:1, layer, slot]] = True
    if (filled & ~hosts_LNE[layers, node_of_P, experts]).any():
        return "a micro-batch copy is on a node without a copy that stays for the batch"
    if (experts != experts[:1])[:, plan.is_static_LP].any():
        return "a batch-static copy changes between micro-batches"
    if (plan.quota_BLP < 0).any() or (plan.quota_BLP[~filled] != 0).any():
        return "a quota is negative or stands on an empty slot"
    served = np.zeros((*experts.shape[:2], num_experts + 1), dtype=np.int64)
    grid = np.ogrid[: experts.shape[0], : experts.shape[1], : experts.shape[2]]
    np.add.at(served, (grid[0], grid[1], experts), plan.quota_BLP)
    if (served[:, :, :num_experts] != plan.load_BLRE.sum(2)).any():
        return "quotas do not sum to the loads"
    return None
