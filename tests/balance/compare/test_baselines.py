"""Baselines: published examples, conservation, slot limits, and an order of merit."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balance.compare.baselines import BASELINES, eplb, run_baseline
from balance.compare.baselines.common import pack_evenly
from balance.compare.baselines.eplb import replicate_hottest
from balance.compare.baselines.greedy import spill, threshold
from balance.compare.baselines.linear import split
from balance.compare.baselines.reorder import anneal, migrate
from balance.measures import load as cost
from balance.recorded.packing import pack
from balance.topology import Topology

REAL_TRACE = Path(__file__).parents[4] / "shared/traces/gptoss20b.npz"

# The example of EPLB's README: 2 layers of 12 experts in 4 groups, 16 replicas, 2 nodes, 8 GPUs.
README_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
README_EXPERT_OF_P = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]

TOPOLOGIES = {
    "one-node": Topology(1, 4, 1),
    "two-nodes": Topology(2, 3, 1),
    "uneven-nodes": Topology(2, [2, 3], 2),
    "unequal-speeds": Topology(1, 4, 1, rank_speed=[1, 0.5, 2, 1]),
    "missing-rank": Topology(2, 3, 1, missing_ranks=[1]),
    "one-rank": Topology(1, 1, 1),
    "no-spare-slots": Topology(1, 4, 0),
}


def skewed(shape, seed=0):
    rng = np.random.default_rng(seed)
    return np.floor(rng.lognormal(3, 1.2, shape))


@pytest.mark.parametrize("layer", [0, 1])
def test_eplb_reproduces_its_readme(layer):
    expert_of_P = eplb(np.array(README_LOADS[layer]), 16, 4, 2, 8)
    assert expert_of_P.tolist() == README_EXPERT_OF_P[layer]


def test_eplb_on_the_flash_lb_example():
    """Published comparison: EPLB ends at 232 where 181.25 is possible."""
    load_E = np.array([600, 560, 120, 120, 20, 10, 10, 10.0])
    expert_of_P = eplb(load_E, 16, 1, 1, 8)
    share = load_E / np.bincount(expert_of_P)
    assert share[expert_of_P].reshape(8, 2).sum(1).max() == 232


@pytest.mark.parametrize(
    ("load", "arguments", "message"),
    [
        ([1, np.nan], (2, 1, 1, 1), "load_E must be finite"),
        ([1, -1], (2, 1, 1, 1), "load_E must be finite and not negative"),
        ([1, 1], (1, 1, 1, 1), "num_slots must hold all 2 experts"),
        ([1, 1], (3, 1, 1, 2), "a multiple of 2 ranks, got 3"),
        ([1, 1], (2, 3, 1, 1), "num_groups must divide the 2 experts, got 3"),
        ([1, 1], (3, 1, 2, 3), "num_nodes must divide the 3 ranks, got 2"),
    ],
)
def test_eplb_refuses_bad_arguments(load, arguments, message):
    with pytest.raises(ValueError, match=message):
        eplb(np.array(load), *arguments)


def test_packing_is_heaviest_first_and_even():
    pack_of_X, place_of_X = pack_evenly(np.array([1.0, 9, 5, 4]), 2)
    assert pack_of_X.tolist() == [0, 0, 1, 1]
    assert place_of_X.tolist() == [1, 0, 0, 1]
    with pytest.raises(ValueError, match="num_packs must divide the 3 items, got 2"):
        pack_evenly(np.ones(3), 2)


def test_replication_goes_to_the_hottest_copy():
    assert replicate_hottest(np.array([9.0, 5, 1]), 6).tolist() == [0, 1, 2, 0, 1, 0]


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)
@pytest.mark.parametrize("name", BASELINES)
def test_every_assignment_is_served_by_a_present_rank(name, topology):
    load_BLE = skewed((3, 2, 10))
    load_BLE[1, 0] = 0
    outcome = run_baseline(name, load_BLE, topology, tile=16)
    np.testing.assert_allclose(outcome.rank_load_BLR.sum(-1), load_BLE.sum(-1))
    assert (outcome.rank_load_BLR >= -1e-9).all()
    assert (outcome.rank_load_BLR[..., ~topology.present_R] == 0).all()
    assert (outcome.tile_load_BLR >= outcome.rank_load_BLR - 1e-6).all()
    assert (outcome.tile_load_BLR % 16 == 0).all()
    assert (outcome.copies_BL >= 0).all() and (outcome.arrivals_BL >= 0).all()


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 999),
    num_experts=st.integers(1, 12),
    name=st.sampled_from(list(TOPOLOGIES)),
)
def test_copies_respect_slots_and_nodes(seed, num_experts, name):
    topology = TOPOLOGIES[name]
    load_BE = skewed((2, num_experts), seed)
    home_E = topology.contiguous_home_rank_E(num_experts)
    for method in (threshold, migrate):
        load_BER = method(load_BE, topology).load_BER
        away = load_BER > 0
        away[:, np.arange(num_experts), home_E] = False
        _, expert, rank = np.nonzero(away)
        assert (topology.node_of_R[rank] == topology.node_of_R[home_E[expert]]).all()
        if method is threshold:
            assert (away.sum(1) <= topology.spare_slots_per_rank).all()
        else:
            assert ((load_BER > 0).sum(2) <= 1).all(), "whole experts only"
            slots = topology.slots_per_rank(num_experts)
            assert ((load_BER > 0).sum(1) <= slots).all()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), name=st.sampled_from(list(TOPOLOGIES)))
def test_planned_copies_never_make_it_worse(seed, name):
    topology = TOPOLOGIES[name]
    load_BLE = skewed((2, 1, 9), seed)
    before = run_baseline("none (contiguous)", load_BLE, topology).rank_load_BLR
    for method in ("greedy threshold (UltraEP-like)", "expert migration (FEPLB-like)"):
        after = cost.imbalance(
            run_baseline(method, load_BLE, topology).rank_load_BLR, topology.speed_R
        )
        assert (after >= 1 - 1e-12).all()
        assert (after <= cost.imbalance(before, topology.speed_R) + 1e-9).all()


def test_threshold_meets_its_optimum_where_one_copy_suffices():
    # Rank 0 has 12, rank 1 has 4: half of the surplus moves into the one spare slot.
    served = threshold(np.array([[12.0, 4.0]]), Topology(1, 2, 1))
    np.testing.assert_allclose(served.load_BER[0].sum(0), [8, 8], rtol=2e-3)
    assert served.copies_B.tolist() == [1]


def test_spill_keeps_home_what_fits():
    # Mean 8, so a rank takes 8.8: the surplus of 3.2 leaves; nothing moves below the limit.
    served = spill(np.array([[12.0, 4.0], [8.0, 8.0]]), Topology(1, 2, 0))
    np.testing.assert_allclose(served.load_BER[0], [[8.8, 3.2], [0, 4]])
    np.testing.assert_allclose(served.load_BER[1], [[8, 0], [0, 8]])
    assert served.copies_B.tolist() == [1, 0]


def test_linear_split_is_optimal_on_a_chain():
    # Expert 0 on ranks 0, 1; expert 1 on ranks 1, 2; mean 4 is reachable only by shifting both.
    holds_ER = np.array([[True, True, False], [False, True, True]])
    load_ER = split(np.array([6.0, 6.0]), holds_ER, np.ones(3))
    np.testing.assert_allclose(load_ER.sum(0), 4)
    assert (load_ER[~holds_ER] == 0).all()
    faster = split(np.array([6.0, 6.0]), holds_ER, np.array([1.0, 1.0, 4.0]))
    np.testing.assert_allclose(faster.sum(0) / [1, 1, 4], [3, 3, 1.5])


def test_annealing_separates_two_hot_experts_that_rise_together():
    # Batch sums are equal everywhere; only micro-batches show that 0 and 1 must part.
    load_BE = np.array([[8.0, 8, 0, 0], [0, 0, 8, 8]])
    group_E = anneal(load_BE, np.array([0, 0, 1, 1]), np.ones(2))
    assert group_E[0] != group_E[1] and group_E[2] != group_E[3]
    assert np.bincount(group_E).tolist() == [2, 2]


def test_results_repeat():
    load_BLE = skewed((3, 1, 16))
    for name in BASELINES:
        one, again = (run_baseline(name, load_BLE, Topology(2, 2, 1)) for _ in range(2))
        np.testing.assert_array_equal(one.rank_load_BLR, again.rank_load_BLR)


def test_bad_calls_are_refused():
    with pytest.raises(ValueError, match="name must be one of none"):
        run_baseline("best", np.ones((1, 1, 4)), Topology())
    with pytest.raises(ValueError, match="load_BLE must have three axes, got"):
        run_baseline("none (contiguous)", np.ones((1, 4)), Topology())
    with pytest.raises(ValueError, match="load_BLE must be finite"):
        run_baseline("none (contiguous)", np.full((1, 1, 4), np.nan), Topology())


# Average imbalance at EP8 with one spare slot; ranges hold both packings of the recording.
REAL_RANGES = {
    "none (contiguous)": (1.40, 1.66),
    "EPLB, oracle per batch": (1.20, 1.32),
    "EPLB, oracle per micro-batch": (1.01, 1.05),
    "EPLB oracle + LP split (LPLB-like)": (1.06, 1.16),
    "greedy threshold (UltraEP-like)": (1.03, 1.08),
    "least-loaded spill (LLEP-like)": (1.08, 1.101),
    "annealed order + greedy copies (ReLibra-like)": (1.01, 1.04),
}


@pytest.mark.skipif(not REAL_TRACE.exists(), reason="the recorded trace is not here")
@pytest.mark.parametrize("order", ["shuffled", "domain"])
def test_recorded_routing_gives_the_known_figures(order):
    with np.load(REAL_TRACE) as arrays:
        trace = pack(
            arrays["ids_TLK"][:, ::4],
            arrays["sequence_start"],
            num_experts=32,
            num_ranks=8,
            order=order,
            domain_S=arrays["domain"],
        )
    for name, (low, high) in REAL_RANGES.items():
        outcome = run_baseline(name, trace.loads(), Topology(1, 8, 1))
        assert low <= cost.summarize(outcome.rank_load_BLR).imbalance_avg <= high, name
