"""Every measure at its two known points, uniform and one-hot, and in units and edge cases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balance.measures import load as cost

UNIFORM = np.full(8, 5.0)
ONE_HOT = np.array([0, 0, 24.0, 0, 0, 0, 0, 0])
NOTHING = np.zeros(8)


@pytest.mark.parametrize(
    ("load", "imbalance", "straggler", "violation", "gini", "efficiency"),
    [
        (UNIFORM, 1.0, 0.0, 0.0, 0.0, 1.0),
        (ONE_HOT, 8.0, 21.0, 7.0, 7 / 8, 1 / 8),
        (NOTHING, 1.0, 0.0, 0.0, 0.0, 1.0),
        (np.array([1.0, 3.0]), 1.5, 1.0, 0.5, 0.25, 2 / 3),
    ],
    ids=["uniform", "one-hot", "no-load", "one-and-three"],
)
def test_known_points(load, imbalance, straggler, violation, gini, efficiency):
    assert cost.imbalance(load) == imbalance
    assert cost.straggler(load) == straggler
    assert cost.max_violation(load) == violation
    assert cost.gini(load) == pytest.approx(gini, abs=1e-15)
    assert cost.efficiency(load) == pytest.approx(efficiency, abs=1e-15)


def test_gini_equals_its_definition():
    load = np.random.default_rng(0).random(20)
    differences = np.abs(load[:, None] - load[None, :]).mean()
    assert cost.gini(load) == pytest.approx(differences / (2 * load.mean()))


def test_efficiency_weighs_layers_by_their_time():
    # A long balanced layer hides a short unbalanced one: (8 + 2) / (8 + 4).
    assert cost.efficiency([[8, 8], [4, 0]]) == pytest.approx(10 / 12)
    assert cost.imbalance([[8, 8], [4, 0]]).tolist() == [1.0, 2.0]


def test_summary_of_many_layers():
    load_BLR = np.stack([np.stack([UNIFORM] * 9 + [ONE_HOT])] * 2)
    balance = cost.summarize(load_BLR)
    assert balance.imbalance_avg == pytest.approx((9 + 8) / 10)
    assert balance.imbalance_worst == 8.0
    assert balance.imbalance_p95 == pytest.approx(np.percentile([1] * 18 + [8] * 2, 95))
    assert balance.straggler_avg == pytest.approx(2.1)
    assert balance.efficiency == pytest.approx((9 * 5 + 3) / (9 * 5 + 24))


def test_summary_of_no_problems():
    assert cost.summarize(np.zeros((0, 3, 8))) == cost.Balance(1.0, 1.0, 1.0, 1.0, 0.0)


def test_speeds_make_proportional_load_perfect():
    speed = [1.0, 0.5, 2.0]
    assert cost.imbalance([10, 5, 20], speed) == 1.0
    assert cost.imbalance([10, 10, 10], speed) == pytest.approx(20 / (30 / 3.5))
    assert cost.straggler([10, 10, 10], speed) == pytest.approx(20 - 30 / 3.5)


def test_missing_rank_may_hold_nothing():
    assert cost.imbalance([4, 0, 4], [1, 0, 1]) == 1.0
    assert cost.imbalance([4, 1, 4], [1, 0, 1]) == np.inf


@settings(deadline=None, max_examples=50)
@given(
    load=st.lists(st.integers(0, 1000), min_size=2, max_size=9),
    scale=st.floats(0.01, 100),
    seed=st.integers(0, 99),
)
def test_scale_and_order_change_no_ratio(load, scale, seed):
    shuffled = np.random.default_rng(seed).permutation(load) * scale
    for measure in (cost.imbalance, cost.max_violation, cost.gini, cost.efficiency):
        assert measure(shuffled) == pytest.approx(measure(load), abs=1e-12)
    assert 1.0 <= cost.imbalance(load) <= len(load)
    assert -1e-12 <= cost.gini(load) <= 1 - 1 / len(load) + 1e-12


def test_tiles():
    assert cost.round_to_tiles([0, 1, 64, 65], 64).tolist() == [0, 64, 64, 128]
    assert cost.round_to_tiles([384 / 3 + 1e-13], 128).tolist() == [128]
    # Two experts on two ranks: 3 + 65 rows against 64 + 0.
    assert cost.tile_rank_load([[3, 64], [65, 0]], 64).tolist() == [64 + 128, 64]


def test_bytes():
    assert cost.expert_bytes(2048, 768) == 3 * 2048 * 768 * 2
    assert cost.bytes_moved(5, 2, 100) == 5 * 100 + 2 * 7 * 100
    assert cost.bytes_moved(5, 2, 100, state_bytes=300) == 1100


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_loads_are_refused(bad):
    with pytest.raises(ValueError, match="load_R must be finite and not negative"):
        cost.imbalance([1.0, bad])


def test_bad_shapes_and_speeds_are_refused():
    with pytest.raises(ValueError, match="load_R must have a last axis"):
        cost.imbalance([])
    with pytest.raises(ValueError, match="speed_R must give one speed for each of 2 ranks"):
        cost.imbalance([1, 1], [1, 1, 1])
    with pytest.raises(ValueError, match="not all 0"):
        cost.imbalance([1, 1], [0, 0])
    with pytest.raises(ValueError, match="tile must be positive, got 0"):
        cost.round_to_tiles([1], 0)
