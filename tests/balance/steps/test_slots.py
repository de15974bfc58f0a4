"""Slots of homes: in order on each rank, and kept where the rank stays."""

import numpy as np

from balance.steps.slots import home_slots_of
from balance.topology import Topology

TOPOLOGY = Topology(num_nodes=1, ranks_per_node=2, spare_slots_per_rank=1)


def test_layout_of_the_topology_docstring():
    assert home_slots_of(np.array([[0, 0, 0, 1, 1]]), TOPOLOGY, None).tolist() == [[0, 1, 2, 4, 5]]


def test_an_expert_that_stays_keeps_its_slot():
    # Experts 0 and 3 trade ranks and take the slot that the other has left.
    before_LE = np.array([[0, 1, 2, 5, 4]])
    slot_LE = home_slots_of(np.array([[1, 0, 0, 0, 1]]), TOPOLOGY, before_LE)
    assert slot_LE.tolist() == [[5, 1, 2, 0, 4]]
