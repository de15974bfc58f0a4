"""The split over all nodes: legal, never slower, and better where node by node is not enough."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balance import Topology, make_plan
from balance.recorded.synthetic import SyntheticConfig, make_counts
from balance.steps.across_nodes import Splits, level_across_nodes
from balance.steps.copies import Search
from balance.steps.present import Present


def untouched(rows, splits, divided_FEN):
    """Chooses no other copies."""
    assert (divided_FEN.sum(2) == splits.unit_FE).all(), "every unit has a node"
    return splits


def one_problem(topology, load_E, rank_E, static_M):
    present = Present.of(topology, len(load_E))
    splits = Splits(
        np.array([load_E]),
        np.array([rank_E]),
        np.array([static_M]),
        np.full((1, len(static_M)), -1),
        np.array([load_E]),
        np.zeros((1, len(static_M)), dtype=np.int64),
    )
    return splits, present


def test_a_batch_static_copy_levels_two_nodes():
    # Rank 0 of node 0 has all the load, and its expert a copy on rank 2 of node 1.
    splits, present = one_problem(Topology(2, 2), [90, 10, 0, 0], [0, 1, 2, 3], [-1, -1, 0, -1])
    bound_F = np.array([25.0])
    level_across_nodes(splits, bound_F, Search(tolerance=0.0), present, untouched)
    assert splits.level_F(present) == [45.0]
    assert splits.home_unit_FE.tolist() == [[45, 10, 0, 0]]
    assert splits.spare_unit_FM.tolist() == [[0, 0, 45, 0]]


def test_the_bound_knows_which_ranks_cannot_receive():
    # Rank 0 keeps its only spare slot for an expert without load, so it serves 4 of the 100.
    splits, present = one_problem(Topology(2, 2), [4, 90, 3, 3], [0, 1, 2, 3], [2, -1, 1, -1])
    bound_F = np.array([25.0])
    level_across_nodes(splits, bound_F, Search(tolerance=0.0), present, untouched)
    assert bound_F[0] == pytest.approx((100 - 4 - 3) / 3)


def test_small_copies_are_taken_out():
    splits, present = one_problem(Topology(1, 2), [9, 1], [0, 1], [-1, -1])
    splits.copy_FM[0, 1], splits.home_unit_FE[0, 0], splits.spare_unit_FM[0, 1] = 0, 8, 1
    level_across_nodes(splits, np.array([5.0]), Search(0.0, min_load=5), present, untouched)
    assert splits.copy_FM.tolist() == [[-1, 0]], "kept: no level may rise"
    assert splits.level_F(present) == [8.0]


@given(seed=st.integers(0, 2**32 - 1), spares=st.integers(1, 2), skew=st.sampled_from([0.5, 2.0]))
@settings(max_examples=25, deadline=None)
def test_bound_holds_and_quotas_add_up(seed, spares, skew):
    rng = np.random.default_rng(seed)
    load_BLE = rng.poisson(rng.lognormal(4, skew, (3, 2, 12)))
    topology = Topology(3, (2, 2, 1), spare_slots_per_rank=spares)
    plan = make_plan(load_BLE, topology, cross_node_copies=1)
    assert (plan.gap_BL() >= -1e-9).all()
    assert (plan.rank_load_BLR().sum(2) == load_BLE.sum(2)).all()


@pytest.mark.slow
def test_domains_on_eight_nodes_come_near_the_bound():
    config = SyntheticConfig(
        num_layers=1, num_micro_batches=12, tokens_per_micro_batch=65536, order="domain"
    )
    plan = make_plan(make_counts(config), Topology(8, 8), cross_node_copies=2)
    assert plan.summary()["imbalance_avg"] <= 1.01
