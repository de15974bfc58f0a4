"""Present ranks: numbered without gaps, and what their homes serve and lack."""

import numpy as np

from balance.steps.present import Present
from balance.topology import Topology


def test_missing_ranks_and_nodes_leave_no_gap():
    topology = Topology(3, (2, 1, 2), rank_speed=(1, 2, 3, 4, 5), missing_ranks=(0, 2))
    present = Present.of(topology, 6)
    assert present.ranks.tolist() == [1, 3, 4]
    assert present.node_of_D.tolist() == [0, 1, 1]
    assert present.speed_N.tolist() == [2, 9]
    assert present.ranks_of_node(1).tolist() == [1, 2]


def test_rank_load():
    present = Present.of(Topology(1, 3, missing_ranks=(1,)), 2)
    load_BLD = present.rank_load(np.array([[[3, 4]]]), np.array([[1, 1]]))
    assert load_BLD.tolist() == [[[0, 7]]]


def test_lack_is_the_part_of_the_whole_that_homes_do_not_ask_for():
    present = Present.of(Topology(1, 2, rank_speed=(1, 3)), 2)
    # 8 units: 2 for the slow rank, 6 for the fast one, whose home asks for 3.
    lack_BLD = present.lack(np.array([[[5, 3]]]), np.array([[0, 1]]))
    assert lack_BLD.tolist() == [[[-3, 3]]]
