"""Homes: seats kept, nodes levelled, move budgets held, missing ranks emptied with least moves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balance.steps.homes import longest_first, rehome, reorder_homes
from balance.topology import Topology
from tests.helpers.strategies import topologies


def node_cost_L(load_BLE, home_LE, topology):
    """Sum over micro-batches of the slowest node's time."""
    at_node_LEN = np.eye(topology.num_nodes)[topology.node_of_R[home_LE]]
    load_BLN = np.einsum("ble,len->bln", load_BLE, at_node_LEN)
    return (load_BLN / np.bincount(topology.node_of_R, topology.speed_R)).max(2).sum(0)


def draw_batch(draw, max_experts=12):
    topology = draw(topologies())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_experts = draw(st.integers(1, max_experts))
    load_BLE = np.round(rng.lognormal(3, 1, (4, 2, num_experts)))
    return topology, load_BLE, np.tile(topology.contiguous_home_rank_E(num_experts), (2, 1))


batches = st.composite(draw_batch)


@given(batch=batches(), budget=st.none() | st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_seats_budget_and_cost(batch, budget):
    topology, load_BLE, before_LE = batch
    home_LE = reorder_homes(load_BLE, before_LE, topology, budget)
    seats = topology.home_slots(load_BLE.shape[2])
    for home_E, before_E in zip(home_LE, before_LE, strict=True):
        assert np.bincount(home_E).max() <= seats
        assert topology.present_R[home_E].all()
        assert budget is None or (home_E != before_E).sum() <= budget
    if budget is not None:
        before_L = node_cost_L(load_BLE, before_LE, topology)
        assert (node_cost_L(load_BLE, home_LE, topology) <= before_L * (1 + 1e-5)).all()


def test_micro_batches_count_and_not_their_sums():
    # Experts 0 and 1 are hot in micro-batch 0, 2 and 3 in micro-batch 1; all sums are equal.
    load_BLE = np.array([[[8, 8, 0, 0]], [[0, 0, 8, 8]]])
    topology = Topology(2, 1, spare_slots_per_rank=0)
    home_LE = reorder_homes(load_BLE, np.array([[0, 0, 1, 1]]), topology)
    assert home_LE[0, 0] != home_LE[0, 1] and home_LE[0, 2] != home_LE[0, 3]


def test_a_small_budget_gets_the_best_swap():
    load_BLE = np.array([[[10, 9, 1, 2]]])
    topology = Topology(2, 1)
    home_LE = reorder_homes(load_BLE, np.array([[0, 0, 1, 1]]), topology, move_budget=2)
    # 19 against 3: trading 10 for 2 or 9 for 1 leaves 11 each.
    assert node_cost_L(load_BLE, home_LE, topology) == 11
    unmoved = reorder_homes(load_BLE, np.array([[0, 0, 1, 1]]), topology, move_budget=1)
    assert (unmoved == [0, 0, 1, 1]).all()


def test_a_free_seat_costs_one_move():
    load_BLE = np.array([[[6, 5, 4]]])
    topology = Topology(1, 3, 0, home_slots_per_rank=3)
    home_LE = reorder_homes(load_BLE, np.array([[0, 0, 1]]), topology, move_budget=1)
    assert (home_LE != [0, 0, 1]).sum() == 1 and sorted(home_LE[0]) == [0, 1, 2]


def test_a_fast_rank_gets_more():
    topology = Topology(1, 2, 0, home_slots_per_rank=4, rank_speed=(1, 3))
    home_LE = reorder_homes(np.ones((1, 1, 4)), np.array([[0, 0, 1, 1]]), topology)
    assert np.bincount(home_LE[0]).tolist() == [1, 3]


def test_longest_first_by_hand():
    place_LE = longest_first(np.array([[5, 9, 4, 3]]), np.array([2, 2]), np.ones(2))
    assert place_LE.tolist() == [[1, 0, 1, 0]]


@given(batch=batches(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_rehome_moves_only_the_stranded(batch, seed):
    topology, load_BLE, _ = batch
    whole = Topology(topology.num_nodes, topology.ranks_of_N)
    before_LE = np.tile(whole.contiguous_home_rank_E(load_BLE.shape[2]), (2, 1))
    home_LE = rehome(before_LE, load_BLE.sum(0), topology)
    stranded_LE = ~topology.present_R[before_LE]
    assert ((home_LE != before_LE) == stranded_LE).all()
    assert topology.present_R[home_LE].all()
    seats = topology.home_slots(load_BLE.shape[2])
    assert max(np.bincount(home_E).max() for home_E in home_LE) <= seats


def test_rehome_fills_the_emptier_node_first():
    topology = Topology(2, 2, missing_ranks=(0,), home_slots_per_rank=4)
    load_LE = np.array([[5, 5, 9, 9, 1, 1, 1, 1]])
    home_LE = rehome(np.array([[0, 0, 1, 1, 2, 2, 3, 3]]), load_LE, topology)
    assert topology.node_of_R[home_LE[0, :2]].tolist() == [1, 1]
    assert set(home_LE[0, :2]) == {2, 3}


def test_rehome_says_when_nothing_fits():
    with pytest.raises(ValueError, match="previous must fit 1 home slots"):
        rehome(np.array([[0, 0]]), np.ones((1, 2)), Topology(1, 2))
