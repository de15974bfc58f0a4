"""Topology: slot layout, uneven nodes, missing ranks, and every message."""

import numpy as np
import pytest

from balance.topology import Topology


@pytest.mark.parametrize(
    ("topology", "num_experts", "slots_per_rank", "home_rank_E"),
    [
        pytest.param(Topology(1, 2), 4, 3, [0, 0, 1, 1], id="one spare by default"),
        pytest.param(Topology(1, 2), 5, 4, [0, 0, 0, 1, 1], id="experts do not divide by ranks"),
        pytest.param(Topology(2, (1, 2), 0), 3, 1, [0, 1, 2], id="uneven nodes, no spares"),
        pytest.param(Topology(1, 3, missing_ranks=(1,)), 4, 3, [0, 0, 2, 2], id="one missing"),
        pytest.param(Topology(1, 4), 2, 2, [0, 1], id="fewer experts than ranks"),
        pytest.param(Topology(1, 1, home_slots_per_rank=3), 2, 4, [0, 0], id="roomy"),
    ],
)
def test_layout(topology, num_experts, slots_per_rank, home_rank_E):
    assert topology.slots_per_rank(num_experts) == slots_per_rank
    assert topology.contiguous_home_rank_E(num_experts).tolist() == home_rank_E
    homes_of_R = np.bincount(home_rank_E, minlength=topology.num_ranks)
    is_home_P = ~topology.is_spare_P(num_experts)
    slots_of_R = np.bincount(topology.rank_of_P(num_experts)[is_home_P])
    assert (homes_of_R <= slots_of_R).all() and (slots_of_R == slots_of_R[0]).all()


def test_layout_of_the_docstring():
    topology = Topology(num_nodes=1, ranks_per_node=2, spare_slots_per_rank=1)
    assert topology.rank_of_P(5).tolist() == [0] * 4 + [1] * 4
    assert topology.is_spare_P(5).tolist() == [False] * 3 + [True] + [False] * 3 + [True]


def test_nodes_and_speeds():
    topology = Topology(2, (1, 3), rank_speed=(1, 2, 1, 1), missing_ranks=[3])
    assert topology.num_ranks == 4
    assert topology.node_of_R.tolist() == [0, 1, 1, 1]
    assert topology.present_R.tolist() == [True, True, True, False]
    assert topology.speed_R.tolist() == [1, 2, 1, 0]


def test_equal_topologies_hash_alike():
    assert hash(Topology(2, [1, 2])) == hash(Topology(2, (1, 2)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"num_nodes": 0}, "num_nodes", id="no node"),
        pytest.param({"ranks_per_node": 0}, "ranks_per_node", id="no rank"),
        pytest.param({"num_nodes": 2, "ranks_per_node": (4,)}, "ranks_per_node", id="one count"),
        pytest.param({"num_nodes": 2, "ranks_per_node": (4, 0)}, "ranks_per_node", id="bare node"),
        pytest.param({"spare_slots_per_rank": -1}, "spare_slots_per_rank", id="negative spares"),
        pytest.param({"home_slots_per_rank": 0}, "home_slots_per_rank", id="no home"),
        pytest.param({"rank_speed": (1.0,)}, "rank_speed", id="speeds of other length"),
        pytest.param({"rank_speed": (1,) * 7 + (0,)}, "rank_speed", id="zero speed"),
        pytest.param({"rank_speed": (1,) * 7 + (np.nan,)}, "rank_speed", id="NaN speed"),
        pytest.param({"num_nodes": 1.5}, "num_nodes", id="half a node"),
        pytest.param({"ranks_per_node": (2.7,)}, "ranks_per_node", id="part of a rank"),
        pytest.param({"ranks_per_node": 8.0}, "ranks_per_node", id="ranks as a float"),
        pytest.param({"spare_slots_per_rank": 1.5}, "spare_slots_per_rank", id="half a slot"),
        pytest.param({"home_slots_per_rank": 1.5}, "home_slots_per_rank", id="half a home"),
        pytest.param({"missing_ranks": (0.5,)}, "missing_ranks", id="half a missing rank"),
        pytest.param({"missing_ranks": (8,)}, "missing_ranks", id="rank out of range"),
        pytest.param({"missing_ranks": range(8)}, "missing_ranks", id="nobody left"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        Topology(**arguments)


def test_experts_must_fit():
    with pytest.raises(ValueError, match="home_slots_per_rank must be at least 2"):
        Topology(1, 4, home_slots_per_rank=1).home_slots(5)
    with pytest.raises(ValueError, match="num_experts"):
        Topology().home_slots(0)
