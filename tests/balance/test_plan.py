"""What a plan offers: maps, look-ups, figures, files."""

import dataclasses

import numpy as np
import pytest

from balance import Plan, PlanOptions, Topology, Trace, make_plan

LOAD_BLE = np.array([[[8, 0, 0, 4]], [[2, 2, 2, 2]]])
TOPOLOGY = Topology(1, 2, spare_slots_per_rank=1)


@pytest.fixture
def plan():
    """Two ranks: experts 0 and 1 on rank 0, 2 and 3 on rank 1."""
    return make_plan(LOAD_BLE, TOPOLOGY, reorder=False)


def test_placement_and_quotas_by_hand(plan):
    # 8 against 4: a copy of expert 0 on rank 1 takes 2; the second micro-batch is level already.
    assert plan.expert_of_P(0, 0).tolist() == [0, 1, -1, 2, 3, 0]
    assert plan.quota_BLP[0, 0].tolist() == [6, 0, 0, 0, 4, 2]
    assert plan.expert_of_P(1, 0).tolist() == [0, 1, -1, 2, 3, -1]
    assert plan.expert_of_P(0, 0).dtype == np.int32


def test_eplb_maps(plan):
    phy2log, log2phy, logcnt = plan.eplb_maps(0)
    assert phy2log.tolist() == [[0, 1, -1, 2, 3, 0]]
    assert log2phy.tolist() == [[[0, 5], [1, -1], [3, -1], [4, -1]]]
    assert logcnt.tolist() == [[2, 1, 1, 1]]
    assert {array.dtype for array in (phy2log, log2phy, logcnt)} == {np.dtype(np.int64)}


def test_quota_prefix_without_sources(plan):
    assert plan.quota_prefix(0, 0)[:, 0].tolist() == [[6, 8]]
    assert not plan.knows_sources


def test_summary_by_hand():
    load_BLE = np.array([[[8, 0, 0, 4]], [[5, 2, 2, 2]]])
    plan = make_plan(load_BLE, TOPOLOGY, reorder=False, copy_bytes=10)
    summary = plan.summary()
    # 12 = 6 + 6; 11 = 6 + 5 is the best in whole tokens.
    assert summary["imbalance_avg"] == pytest.approx((1 + 6 / 5.5) / 2)
    assert summary["lower_bound_avg"] == summary["imbalance_avg"]
    assert summary["gap_worst"] == 0
    assert summary["copies_avg"] == 1.0
    assert summary["moved_bytes"] == 20
    assert summary["plan_seconds"] > 0


def test_moves_and_their_bytes():
    previous = np.array([[0, 1, 0, 1]])
    moved = make_plan(LOAD_BLE, TOPOLOGY, previous=previous, copy_bytes=10, state_bytes=100)
    num_moves = int((moved.home_rank_LE != previous).sum())
    num_copies = int((moved.expert_of_BLP >= 0).sum()) - 8
    assert moved.summary()["moves_avg"] == num_moves
    assert moved.summary()["moved_bytes"] == num_moves * 100 + num_copies * 10


def test_save_and_load(plan, tmp_path):
    path = tmp_path / "plan.npz"
    plan.save(path)
    loaded = Plan.load(path)
    for field in dataclasses.fields(Plan):
        before, after = getattr(plan, field.name), getattr(loaded, field.name)
        same = (before == after).all() if isinstance(before, np.ndarray) else before == after
        assert same, field.name


def test_every_option_and_machine_survives_a_file(tmp_path):
    topology = Topology(2, (2, 1), 1, 4, (1.0, 2.0, 0.5), (1,))
    plan = make_plan(np.ones((1, 1, 3), int), topology, cross_node_copies=1, tile_rows=4)
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.topology == topology
    assert loaded.options == PlanOptions(cross_node_copies=1, tile_rows=4)


def test_a_file_that_is_no_plan(tmp_path):
    np.savez(tmp_path / "other.npz", quota_BLP=np.zeros(1))
    with pytest.raises(ValueError, match="lacks settings, expert_of_BLP"):
        Plan.load(tmp_path / "other.npz")


def test_slots_need_a_trace(plan):
    with pytest.raises(ValueError, match="trace must be given"):
        plan.slot_of_TK(0, 0)
    ids_TLK = np.array([0] * 8 + [3] * 4)[:, None, None]
    trace = Trace(ids_TLK, np.zeros(12, int), np.zeros(12, int), 4)
    slot_of_TK = plan.slot_of_TK(0, 0, trace)
    assert slot_of_TK[:, 0].tolist() == [0] * 6 + [5] * 2 + [4] * 4


def test_a_trace_that_was_not_planned_is_refused(plan):
    for ids_T, num_experts in (([0] * 9, 4), ([0] * 8 + [3] * 3, 4), ([0] * 8 + [7] * 4, 8)):
        ids_TLK, nothing_T = np.array(ids_T)[:, None, None], np.zeros(len(ids_T), int)
        with pytest.raises(ValueError, match="assignments that were planned"):
            plan.slot_of_TK(0, 0, Trace(ids_TLK, nothing_T, nothing_T, num_experts))


def test_tokens_on_other_ranks_are_refused():
    trace = Trace(np.zeros((4, 1, 1), int), np.zeros(4, int), np.arange(4) % 2, 2)
    plan = make_plan(trace, Topology(1, 2))
    for rank in (0, 5):
        with pytest.raises(ValueError, match="assignments that were planned"):
            plan.slot_of_TK(0, 0, dataclasses.replace(trace, source_rank_T=np.full(4, rank)))


@pytest.mark.parametrize(("micro_batch", "layer"), [(2, 0), (-1, 0), (0, 1)])
def test_index_out_of_range(plan, micro_batch, layer):
    with pytest.raises(ValueError, match=r"must lie in \[0, "):
        plan.expert_of_P(micro_batch, layer)


def test_levels_of_a_missing_rank():
    plan = make_plan(LOAD_BLE, Topology(1, 3, missing_ranks=(1,)))
    assert (plan.rank_load_BLR()[:, :, 1] == 0).all()
    assert plan.level_BL().tolist() == [[6.0], [4.0]]
