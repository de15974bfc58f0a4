"""Relabelling ranks: the best assignment, and plans that keep homes where they were for free."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from balance import Topology, make_plan
from balance.steps.present import Present
from balance.steps.rename_ranks import best_assignment, keep_most


@given(size=st.integers(1, 9), high=st.integers(0, 20), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_no_assignment_gains_more(size, high, seed):
    gain = np.random.default_rng(seed).integers(-high, high + 1, (size, size))
    column = best_assignment(gain)
    assert sorted(column) == list(range(size))
    best = gain[linear_sum_assignment(gain, maximize=True)].sum()
    assert gain[np.arange(size), column].sum() == best


def test_equal_gains_change_nothing():
    assert (best_assignment(np.full((7, 7), 3)) == np.arange(7)).all()


def test_no_node_at_all_may_be_left_empty_handed():
    assert len(best_assignment(np.zeros((0, 0), dtype=np.int64))) == 0


@pytest.mark.parametrize(
    ("topology", "mixed"),
    [
        pytest.param(Topology(1, 4), [3, 0, 2, 1], id="ranks of a node"),
        pytest.param(Topology(2, 2), [3, 2, 0, 1], id="nodes, and ranks of each"),
        pytest.param(Topology(2, 2, rank_speed=(1, 2, 2, 1)), [3, 2, 1, 0], id="equal speeds"),
        pytest.param(Topology(2, (1, 3)), [0, 2, 3, 1], id="uneven nodes"),
        pytest.param(Topology(2, 3, missing_ranks=(4, 5)), [2, 0, 1, 3], id="missing ranks"),
    ],
)
def test_a_relabelled_placement_is_recognised(topology, mixed):
    present = Present.of(topology, 12)
    before_LE = np.arange(12)[None] % 4
    label_LD = keep_most(np.array(mixed)[before_LE], before_LE, present)
    assert (label_LD[0][mixed] == np.arange(4)).all()


def test_unequal_ranks_never_trade():
    topology = Topology(2, (2, 2), rank_speed=(1, 2, 1, 3))
    before_LE = np.array([[1, 0, 3, 2]])
    label_LD = keep_most(np.array([[0, 1, 2, 3]]), before_LE, Present.of(topology, 4))
    assert (label_LD == np.arange(4)).all()


def test_homes_that_only_changed_names_stay():
    load_BLE = np.random.default_rng(5).lognormal(5, 1, (6, 2, 24)).astype(int)
    first = make_plan(load_BLE, Topology(2, 4))
    renamed_LE = np.array([6, 4, 5, 7, 1, 3, 2, 0])[first.home_rank_LE]
    second = make_plan(load_BLE, Topology(2, 4), previous=renamed_LE)
    assert second.summary()["moves_avg"] == 0
    assert (second.level_BL() == first.level_BL()).all()
