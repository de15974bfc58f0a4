"""Every baseline: conservation, slot limits, repeatable, and an order of merit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balance.compare.baselines.greedy import threshold
from balance.compare.baselines.reorder import migrate
from balance.compare.baselines.run import BASELINES, run_baseline
from balance.measures.load import imbalance, summarize
from balance.topology import Topology
from tests.balance.recorded_trace import packed_recording

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
        after = imbalance(run_baseline(method, load_BLE, topology).rank_load_BLR, topology.speed_R)
        assert (after >= 1 - 1e-12).all()
        assert (after <= imbalance(before, topology.speed_R) + 1e-9).all()


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


@pytest.mark.parametrize("order", ["shuffled", "domain"])
def test_recorded_routing_gives_the_known_figures(order):
    trace = packed_recording(order, num_ranks=8, every_nth_layer=4)
    for name, (low, high) in REAL_RANGES.items():
        outcome = run_baseline(name, trace.loads(), Topology(1, 8, 1))
        assert low <= summarize(outcome.rank_load_BLR).imbalance_avg <= high, name
