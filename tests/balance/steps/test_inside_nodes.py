"""Inside the nodes: every unit served by a copy that is there, batch-static ones included."""

import numpy as np
import pytest

from balance.steps.batch_copies import choose_batch_copies
from balance.steps.copies import Search
from balance.steps.inside_nodes import copy_inside_nodes
from balance.steps.present import Present
from balance.topology import Topology


def host(topology, seed=0, copies_per_node=1, num_experts=12):
    """Loads of 3 micro-batches and 2 layers, homes in order, batch-static copies chosen."""
    rng = np.random.default_rng(seed)
    unit_BLE = rng.poisson(rng.lognormal(4, 1.5, (3, 2, num_experts)))
    present = Present.of(topology, num_experts)
    home_E = topology.contiguous_home_rank_E(num_experts)
    rank_LE = np.tile(np.searchsorted(present.ranks, home_E), (2, 1))
    copies, rank_LE = choose_batch_copies(unit_BLE, rank_LE, present, 1, copies_per_node, False)
    return unit_BLE, present, copies.serve(unit_BLE, rank_LE, present), rank_LE


@pytest.mark.parametrize(
    "topology",
    [
        pytest.param(Topology(1, 4), id="one node"),
        pytest.param(Topology(2, 3), id="alike nodes"),
        pytest.param(Topology(3, (3, 2, 1)), id="uneven nodes"),
        pytest.param(Topology(2, 3, rank_speed=(1, 2, 1, 1, 1, 3)), id="unequal speeds"),
        pytest.param(Topology(2, 3, missing_ranks=(1,)), id="a missing rank"),
        pytest.param(Topology(1, 10), id="ten ranks: by flow"),
    ],
)
def test_every_unit_is_served_where_a_copy_is(topology):
    unit_BLE, present, serving, rank_LE = host(topology)
    inside = copy_inside_nodes(serving, rank_LE, None, present, 1, Search())
    static_LM = serving.copies.in_spare_slots(present, 1)
    expert_BLM = np.where(inside.copy_BLM >= 0, inside.copy_BLM, static_LM)
    served_BLE = inside.home_unit_BLE.copy()
    for b, layer, slot in np.argwhere(expert_BLM >= 0):
        served_BLE[b, layer, expert_BLM[b, layer, slot]] += inside.spare_unit_BLM[b, layer, slot]
    assert (served_BLE == unit_BLE).all()
    assert (inside.spare_unit_BLM[expert_BLM < 0] == 0).all()
    assert ((inside.copy_BLM < 0) | (static_LM < 0)).all(), "two copies in one slot"


def test_a_copy_that_would_serve_too_little_is_not_made():
    _, present, serving, rank_LE = host(Topology(2, 3))
    inside = copy_inside_nodes(serving, rank_LE, None, present, 1, Search(min_load=40))
    assert (inside.spare_unit_BLM[inside.copy_BLM >= 0] >= 40).all()
