"""Plans: legal for any machine and loads, at the promised distance from their bound, in time."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balance import Plan, PlanOptions, Topology, Trace, make_plan
from balance.recorded.synthetic import SyntheticConfig, make_counts
from tests.balance.recorded_trace import packed_recording
from tests.helpers.strategies import loads, topologies


def idle_level_BL(load_BLRE, topology):
    """Time of the slowest rank with experts in order and no copies."""
    num_experts = load_BLRE.shape[3]
    load_BLE = load_BLRE.sum(2)
    home_E = topology.contiguous_home_rank_E(num_experts)
    present = np.flatnonzero(topology.present_R)
    time_BLD = [load_BLE[:, :, home_E == r].sum(2) / topology.speed_R[r] for r in present]
    return np.max(time_BLD, axis=0)


@st.composite
def planned(draw):
    """A batch, a machine, and options of every kind."""
    topology = draw(topologies())
    load_BLRE = draw(loads(topology.num_ranks))
    fewest = int(np.bincount(topology.node_of_R[topology.present_R]).min())
    options = PlanOptions(
        reorder=draw(st.booleans()),
        move_budget=draw(st.none() | st.integers(0, 4)),
        cross_node_copies=draw(st.integers(0, min(2, topology.spare_slots_per_rank * fewest))),
        tolerance=draw(st.sampled_from([0.0, 0.02, 0.2])),
        min_tokens_per_replica=draw(st.sampled_from([0, 5, 100])),
        tile_rows=draw(st.sampled_from([1, 1, 8])),
        locality=draw(st.sampled_from([0.0, 0.5])),
    )
    return load_BLRE, topology, options


@given(case=planned())
@settings(max_examples=120, deadline=None)
def test_any_plan_is_legal_and_between_bound_and_doing_nothing(case):
    # Legality, conservation included, is checked by the plan itself; see test_plan.
    load_BLRE, topology, options = case
    plan = make_plan(load_BLRE, topology, options=options)
    level_BL = plan.level_BL()
    assert (level_BL >= plan.bound_BL * (1 - 1e-9)).all()
    if options.tile_rows == 1 and not topology.missing_ranks and not options.locality:
        idle_BL = idle_level_BL(load_BLRE, topology)
        assert (level_BL.sum(0) <= idle_BL.sum(0) * (1 + 1e-6)).all()
        if not (options.reorder or options.cross_node_copies):
            assert (level_BL <= idle_BL * (1 + 1e-6)).all()


@given(case=planned())
@settings(max_examples=60, deadline=None)
def test_small_copies_are_not_made(case):
    load_BLRE, topology, options = case
    plan = make_plan(load_BLRE, topology, options=options)
    is_spare_P = topology.is_spare_P(plan.num_experts)
    is_copy_BLP = (plan.expert_of_BLP >= 0) & is_spare_P & ~plan.is_static_LP
    least = max(1, options.min_tokens_per_replica - options.tile_rows + 1)
    assert (plan.quota_BLP[is_copy_BLP] >= least).all()


@given(case=planned())
@settings(max_examples=40, deadline=None)
def test_prefixes_sum_to_source_loads(case):
    load_BLRE, topology, options = case
    plan = make_plan(load_BLRE, topology, options=options)
    for micro_batch, layer in np.ndindex(*load_BLRE.shape[:2]):
        prefix_REV = plan.quota_prefix(micro_batch, layer)
        assert (prefix_REV[:, :, -1] == load_BLRE[micro_batch, layer]).all()


@given(case=planned())
@settings(max_examples=20, deadline=None)
def test_the_same_input_gives_the_same_plan(case):
    load_BLRE, topology, options = case
    one, two = (make_plan(load_BLRE, topology, options=options) for _ in range(2))
    for name in ("expert_of_BLP", "quota_BLP", "home_slot_LE", "is_static_LP", "bound_BL"):
        assert (getattr(one, name) == getattr(two, name)).all()


@given(load_BLRE=loads(4), spares=st.integers(0, 2), cross=st.integers(0, 1))
@settings(max_examples=60, deadline=None)
def test_more_spare_slots_never_hurt(load_BLRE, spares, cross):
    levels = [
        make_plan(
            load_BLRE,
            Topology(2, 2, spare_slots_per_rank=count),
            reorder=False,
            cross_node_copies=min(cross, 2 * spares),
            tolerance=0.0,
        ).level_BL()
        for count in (spares, spares + 1)
    ]
    if cross:
        assert levels[1].sum() <= levels[0].sum() + levels[0].size
    else:
        assert (levels[1] <= levels[0]).all()


@given(load_BLRE=loads(4), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_renaming_experts_changes_no_level(load_BLRE, seed):
    # Distinct loads, since equal ones are told apart by their number.
    num_experts = load_BLRE.shape[3]
    load_BLRE = load_BLRE * num_experts
    load_BLRE[:, :, 0] += np.arange(1, num_experts + 1)
    order = np.random.default_rng(seed).permutation(num_experts)
    topology = Topology(1, 4, home_slots_per_rank=num_experts)
    home_LE = np.tile(np.arange(num_experts) % 4, (load_BLRE.shape[1], 1))
    plan = make_plan(load_BLRE, topology, previous=home_LE, reorder=False)
    renamed = make_plan(load_BLRE[..., order], topology, previous=home_LE[:, order], reorder=False)
    assert renamed.level_BL() == pytest.approx(plan.level_BL(), rel=1e-3, abs=1)


@pytest.mark.parametrize(
    ("load_BLE", "topology"),
    [
        pytest.param(np.zeros((0, 2, 4), int), Topology(1, 2), id="no micro-batch"),
        pytest.param(np.zeros((2, 1, 4), int), Topology(2, 2), id="no load"),
        pytest.param(np.full((1, 1, 1), 9), Topology(2, 4), id="one expert"),
        pytest.param(np.full((1, 1, 4), 9), Topology(1, 1), id="one rank"),
        pytest.param(np.array([[[1, 0, 0]]]), Topology(2, 3), id="one token"),
        pytest.param(np.array([[[9, 5, 5, 2, 1, 1, 1]]]), Topology(1, 3), id="three ranks"),
        pytest.param(np.arange(20).reshape(1, 1, 20), Topology(2, (6, 3)), id="six and three"),
        pytest.param(np.arange(30).reshape(1, 1, 30), Topology(1, 12), id="twelve in a node"),
    ],
)
@pytest.mark.parametrize("cross_node_copies", [0, 1])
def test_edges(load_BLE, topology, cross_node_copies):
    plan = make_plan(load_BLE, topology, cross_node_copies=cross_node_copies)
    assert plan.quota_BLP.sum() == load_BLE.sum()
    assert plan.summary()["imbalance_worst"] >= 1.0
    assert plan.summary()["gap_worst"] <= 0.2


def test_flashlb_example_is_optimal():
    load_BLE = np.array([[[600, 560, 120, 120, 20, 10, 10, 10]]])
    plan = make_plan(load_BLE, Topology(1, 8, spare_slots_per_rank=1), reorder=False)
    assert plan.level_BL() == 182 and plan.bound_BL == 182  # 181.25 in whole tokens


def test_unequal_speeds_share_the_load():
    load_BLE = np.full((1, 1, 8), 100)
    plan = make_plan(load_BLE, Topology(1, 4, spare_slots_per_rank=2, rank_speed=(1, 1, 2, 4)))
    assert plan.rank_load_BLR()[0, 0] == pytest.approx([100, 100, 200, 400])


def test_tiles_count():
    # 7 experts of 130 tokens on 2 ranks: tokens could be level, tiles of 128 cannot: 7 x 2 = 14.
    load_BLE = np.full((1, 1, 7), 130)
    plan = make_plan(load_BLE, Topology(1, 2), tile_rows=128)
    assert plan.level_BL() == 7 * 128 == plan.bound_BL
    assert plan.quota_BLP.sum() == 910


class TestPrevious:
    """Moves against the homes of before."""

    load_BLE = np.random.default_rng(0).lognormal(5, 1, (8, 2, 16)).astype(int)

    def test_kept_homes_keep_their_slots(self):
        first = make_plan(self.load_BLE, Topology(2, 2))
        second = make_plan(self.load_BLE[:, ::-1], Topology(2, 2), previous=first, move_budget=4)
        stays_LE = first.home_rank_LE == second.home_rank_LE
        assert (~stays_LE).sum(1).max() <= 4
        assert (first.home_slot_LE == second.home_slot_LE)[stays_LE].all()
        assert second.summary()["moves_avg"] == (~stays_LE).sum(1).mean()

    def test_no_reordering_moves_nothing(self):
        first = make_plan(self.load_BLE, Topology(2, 2))
        second = make_plan(self.load_BLE, Topology(2, 2), previous=first, reorder=False)
        assert (first.home_slot_LE == second.home_slot_LE).all()

    def test_a_missing_rank_moves_only_its_experts(self):
        first = make_plan(self.load_BLE, Topology(2, 2))
        broken = Topology(2, 2, missing_ranks=(1,))
        second = make_plan(self.load_BLE, broken, previous=first, reorder=False)
        moved_LE = first.home_rank_LE != second.home_rank_LE
        assert (moved_LE == (first.home_rank_LE == 1)).all()
        assert second.rank_load_BLR()[:, :, 1].sum() == 0

    def test_homes_may_be_given(self):
        home_LE = np.tile(np.arange(16) % 4, (2, 1))
        plan = make_plan(self.load_BLE, Topology(2, 2), previous=home_LE, reorder=False)
        assert (plan.home_rank_LE == home_LE).all()

    @pytest.mark.parametrize(
        ("previous", "message"),
        [
            pytest.param(np.zeros((1, 16), int), r"previous must be .*\[2, 16\]", id="layers"),
            pytest.param(np.zeros((2, 16)), "previous must be .*float", id="floats"),
            pytest.param(np.full((2, 16), 4), "previous must lie in 0..3", id="no such rank"),
            pytest.param(np.zeros((2, 16), int), "previous must fit 4 home slots", id="too full"),
        ],
    )
    def test_messages(self, previous, message):
        with pytest.raises(ValueError, match=message):
            make_plan(self.load_BLE, Topology(2, 2), previous=previous)


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        pytest.param(np.full((1, 1, 4), np.nan), {}, "NaN", id="NaN"),
        pytest.param(np.full((1, 1, 4), 0.5), {}, "whole numbers", id="fractions"),
        pytest.param(np.full((1, 1, 4), -1), {}, ">= 0, got -1", id="negative"),
        pytest.param(np.full((1, 1, 4), 2**40), {}, "int32", id="too large"),
        pytest.param(np.full((1, 1, 4), 2**30), {}, "sum to at most", id="too many"),
        pytest.param(np.full((1, 1, 4), "a"), {}, "integers", id="text"),
        pytest.param(np.zeros((1, 4), int), {}, "load_BLRE or load_BLE", id="two axes"),
        pytest.param(np.zeros((1, 1, 3, 4), int), {}, "2 source ranks, got 3", id="sources"),
        pytest.param(np.zeros((1, 1, 4), int), {"cross_node_copies": 3}, "got 3", id="no slot"),
        pytest.param(np.zeros((1, 1, 4), int), {"tile_rows": 0}, "tile_rows", id="no tile"),
        pytest.param(np.zeros((1, 1, 4), int), {"tolerance": np.nan}, "tolerance", id="NaN goal"),
        pytest.param(np.zeros((1, 1, 4), int), {"move_budget": -1}, "move_budget", id="budget"),
        pytest.param(
            np.zeros((1, 1, 4), int), {"move_budget": 1.5}, "move_budget", id="half a move"
        ),
        pytest.param(np.zeros((1, 1, 4), int), {"tile_rows": 2.5}, "tile_rows", id="half a row"),
        pytest.param(np.zeros((1, 1, 4), int), {"cross_node_copies": None}, "cross_", id="None"),
        pytest.param(np.zeros((1, 1, 4), int), {"reorder": "no"}, "reorder", id="text as a flag"),
        pytest.param(
            np.zeros((1, 1, 4), int), {"locality": "a"}, "locality", id="text, not weight"
        ),
    ],
)
def test_errors_name_the_argument(counts, options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(counts, Topology(1, 2), **options)


def small_trace(seed=0, num_tokens=400, num_ranks=4):
    rng = np.random.default_rng(seed)
    ids_TLK = np.argsort(rng.gumbel(size=(num_tokens, 2, 12)) + np.linspace(0, 3, 12))[..., -3:]
    ids_TLK[rng.random(ids_TLK.shape) < 0.1] = -1
    return Trace(
        ids_TLK, rng.integers(0, 3, num_tokens), rng.integers(0, num_ranks, num_tokens), 12
    )


def test_locality_saves_travel():
    rng = np.random.default_rng(0)
    # Rank r's tokens choose experts r, r + 4, r + 8, which contiguous homes put elsewhere.
    source_T = rng.integers(0, 4, 600)
    ids_TLK = (source_T[:, None] + np.array([0, 4, 8]))[:, None, :]
    trace = Trace(ids_TLK, rng.integers(0, 2, 600), source_T, 12)
    topology = Topology(2, 2, spare_slots_per_rank=0)
    near, far = (make_plan(trace, topology, locality=weight) for weight in (1.0, 0.0))
    assert near.traffic().cross_rank == 0 < far.traffic().cross_rank
    assert near.traffic().cross_node == 0


class TestRecorded:
    """gpt-oss-20b: half of the batch is history, half is planned; one spare slot per rank."""

    @staticmethod
    def counts(order, num_ranks):
        load_BLRE = packed_recording(order, num_ranks).counts(num_ranks)
        return load_BLRE[len(load_BLRE) // 2 :]

    @pytest.mark.parametrize("order", ["shuffled", "domain"])
    @pytest.mark.parametrize(
        ("num_nodes", "cross_node_copies", "most"),
        [
            pytest.param(1, 0, 1.01, id="EP8"),
            pytest.param(2, 0, 1.03, id="EP16 inside nodes"),
            pytest.param(2, 2, 1.01, id="EP16 with cross-node copies"),
        ],
    )
    def test_imbalance(self, order, num_nodes, cross_node_copies, most):
        plan = make_plan(
            self.counts(order, 8 * num_nodes),
            Topology(num_nodes, 8),
            cross_node_copies=cross_node_copies,
        )
        summary = plan.summary()
        assert summary["imbalance_avg"] <= most
        assert summary["gap_avg"] <= 1e-3 and summary["gap_p99"] <= 5e-3

    def test_few_moves_do_most_of_it(self):
        counts = self.counts("domain", 16)
        summary = make_plan(counts, Topology(2, 8), move_budget=4).summary()
        assert summary["moves_avg"] <= 4 and summary["imbalance_avg"] <= 1.03


@pytest.mark.parametrize(("cross_node_copies", "most"), [(0, 1.05), (2, 1.01)])
def test_synthetic_eight_nodes(cross_node_copies, most):
    config = SyntheticConfig(num_layers=2, num_micro_batches=16, tokens_per_micro_batch=131072)
    plan = make_plan(make_counts(config), Topology(8, 8), cross_node_copies=cross_node_copies)
    assert plan.summary()["imbalance_avg"] <= most


@pytest.mark.slow
def test_a_batch_is_planned_within_a_second():
    load_BLRE = make_counts(SyntheticConfig(num_layers=48, num_ranks=8))
    used_seconds = []
    for _ in range(3):
        started = time.process_time()
        plan = make_plan(load_BLRE, Topology(1, 8))
        used_seconds.append(time.process_time() - started)
    # Processor time, the best of three: a busy machine says nothing about the planner.
    assert min(used_seconds) <= 1.0
    assert plan.plan_seconds > 0
    assert plan.summary()["gap_avg"] <= 1e-3 and plan.summary()["gap_p99"] <= 5e-3


def test_plan_of_a_trace_looks_up_slots():
    trace = small_trace()
    plan = make_plan(trace, Topology(2, 2))
    for micro_batch, layer in np.ndindex(plan.num_micro_batches, plan.num_layers):
        ids_TK = trace.ids_of(micro_batch)[:, layer]
        slot_of_TK = plan.slot_of_TK(micro_batch, layer)
        expert_of_P = plan.expert_of_P(micro_batch, layer)
        assert (expert_of_P[slot_of_TK[ids_TK >= 0]] == ids_TK[ids_TK >= 0]).all()
        served_P = np.bincount(slot_of_TK[ids_TK >= 0], minlength=len(expert_of_P))
        assert (served_P == plan.quota_BLP[micro_batch, layer]).all()
    assert isinstance(plan, Plan)


@pytest.mark.parametrize("total", [2**31 - 1, 2**31 - 2], ids=["largest", "one less"])
def test_loads_up_to_the_largest_quota(total):
    load_BLE = np.array([[[total - 20, 5, 5, 5, 5, 0]]])
    plan = make_plan(load_BLE, Topology(1, 3))
    assert plan.quota_BLP.sum(dtype=np.int64) == total
    assert plan.gap_BL().max() <= 5e-4


def test_almost_all_load_in_one_expert():
    load_BLE = np.full((2, 2, 16), 10)
    load_BLE[:, :, 3] = 19 * 150
    plan = make_plan(load_BLE, Topology(2, 8), cross_node_copies=1)
    assert plan.summary()["imbalance_avg"] <= 1.01


def test_all_experts_chosen_by_every_token():
    ids_TLK = np.tile(np.arange(6), (20, 1, 1))
    plan = make_plan(Trace(ids_TLK, np.zeros(20, int), np.arange(20) % 3, 6), Topology(1, 3))
    assert (plan.rank_load_BLR() == 40).all()
    assert (np.sort(plan.slot_of_TK(0, 0), axis=1)[:, 0] >= 0).all()


SAME_PLAN = """
import sys, zlib, numpy as np, torch
torch.set_num_threads(int(sys.argv[1]))
from balance import Topology, make_plan
load_BLE = np.random.default_rng(0).lognormal(4, 1.5, (4, 2, 32)).astype(int)
plan = make_plan(load_BLE, Topology(2, 4), cross_node_copies=2)
print(zlib.crc32(plan.expert_of_BLP.tobytes() + plan.quota_BLP.tobytes()))
"""


def test_every_process_makes_the_same_plan():
    checksums = [
        subprocess.check_output(
            [sys.executable, "-c", SAME_PLAN, threads],
            env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads},
            text=True,
        )
        for seed, threads in (("0", "1"), ("7", "3"))
    ]
    assert checksums[0] == checksums[1]
