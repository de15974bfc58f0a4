"""Figures of the tables at points known by hand."""

import numpy as np
import pytest

from balance.compare import report, text
from balance.compare.baselines.run import BASELINES, Outcome
from balance.planner import make_plan
from balance.recorded.synthetic import SyntheticConfig, make_trace
from balance.topology import Topology
from balance.trace import Trace

SMALL = SyntheticConfig(
    num_experts=16,
    top_k=2,
    num_layers=2,
    num_micro_batches=3,
    tokens_per_micro_batch=400,
    num_ranks=4,
)


def one_choice(experts, num_experts, micro_batches=None):
    """A trace of one layer with one choice per token."""
    ids_TLK = np.array(experts)[:, None, None]
    micro_batch_T = np.zeros(len(experts), int) if micro_batches is None else micro_batches
    return Trace(ids_TLK, micro_batch_T, np.zeros(len(experts), int), num_experts)


def outcome(rank_load, **more):
    rank_load_BLR = np.array(rank_load, float)[None, None]
    nothing_BL = np.zeros((1, 1), int)
    figures = {"tile_load_BLR": rank_load_BLR, "copies_BL": nothing_BL, "arrivals_BL": nothing_BL}
    return Outcome("x", rank_load_BLR, **(figures | more), plan_seconds=0.5)


def test_uniform_routing_is_not_worth_balancing():
    stats = report.trace_stats(one_choice(np.arange(64) % 16, 16), [4, 8, 64])
    assert [at.num_ranks for at in stats.ranks] == [4, 8], "64 ranks cannot share 16 experts"
    assert all(at.imbalance_worst == 1.0 and not at.worth_it for at in stats.ranks)
    assert (stats.gini, stats.max_violation) == (0.0, 0.0)
    assert "gains too little" in text.format_stats(stats)


def test_one_hot_routing_is_worth_balancing():
    stats = report.trace_stats(one_choice([5] * 10, 16), [8])
    assert stats.ranks[0].slowdown == 8.0 and stats.ranks[0].worth_it
    assert stats.gini == pytest.approx(15 / 16) and stats.max_violation == 15.0
    assert "is worth it" in text.format_stats(stats)


def test_micro_batches_that_differ_show_only_in_their_own_slowdown():
    stats = report.trace_stats(one_choice([0, 0, 3, 3], 4, [0, 0, 1, 1]), [2])
    assert stats.ranks[0].slowdown == 2.0
    assert stats.ranks[0].batch_slowdown == 1.0


def test_missing_masked_and_all_zero_are_said():
    ids_TLK = np.array([[[0], [1]], [[0], [-1]], [[0], [2]]])
    mask = np.array([True, True, False])
    trace = Trace(ids_TLK, [0, 0, 0], [0, 0, 0], 4, row_mask_T=mask)
    stats = report.trace_stats(trace, [2])
    assert (stats.num_missing, stats.num_masked_rows, stats.all_zero_layers) == (1, 1, (0,))
    shown = text.format_stats(stats)
    assert "1 masked tokens, 1 missing ids" in shown and "every id is 0 in layers [0]" in shown


@pytest.mark.parametrize("num_experts", [4, 7, 8])
def test_contiguous_rank_load_when_experts_do_not_divide(num_experts):
    load_BLE = np.arange(2 * num_experts).reshape(1, 2, num_experts)
    home_E = Topology(1, 4, 0).contiguous_home_rank_E(num_experts)
    expected = [np.bincount(home_E, weights=load, minlength=4) for load in load_BLE[0]]
    np.testing.assert_array_equal(report.contiguous_rank_load(load_BLE, 4)[0], expected)


def test_row_measures_against_the_bound_in_whole_assignments():
    # 9 assignments on 2 ranks: mean 4.5, bound 5; 6 on the slower rank is 20 % above it.
    topology = Topology(1, 2, 1)
    bound_BL = report.lower_bound(np.array([[[9]]]), topology)
    assert bound_BL == 5
    row = report.make_row(
        outcome([6, 3], tile_load_BLR=np.array([[[8.0, 4.0]]])), bound_BL, topology
    )
    assert row.imbalance_avg == pytest.approx(6 / 4.5)
    assert row.gap == pytest.approx(0.2)
    assert row.tile_imbalance == pytest.approx(8 / 4.5)
    assert row.straggler == pytest.approx(1.5)
    assert row.plan_seconds == 0.5


def test_bound_follows_speeds():
    topology = Topology(1, 2, 1, rank_speed=[2, 1])
    assert report.lower_bound(np.array([[[9]]]), topology) == 3
    assert report.make_row(outcome([6, 3]), np.array([[3.0]]), topology).gap == 0


def test_plan_is_measured_from_its_own_assignment_and_leads_the_table():
    trace, topology = make_trace(SMALL), Topology(1, 4, 1)
    plan = make_plan(trace, topology)
    planned = report.measure_plan(plan, trace, tile=16)
    np.testing.assert_array_equal(planned.rank_load_BLR, plan.rank_load_BLR())
    assert planned.copies_BL.mean() == pytest.approx(plan.summary()["copies_avg"])
    calls = []
    outcomes, rows = report.compare(
        trace.loads(), topology, planned=planned, tile=16, on_layer=lambda: calls.append(1)
    )
    names = [row.name for row in rows]
    assert names == [*BASELINES, report.OURS, "lower bound of any plan"]
    assert len(calls) == len(BASELINES) * 2 and len(outcomes) == len(rows) - 1
    ours, bound = rows[-2], rows[-1]
    assert ours.imbalance_avg == min(row.imbalance_avg for row in rows[:-1])
    assert all(row.imbalance_avg >= bound.imbalance_avg - 1e-12 for row in rows)
    table = text.format_rows(rows)
    assert (
        table.count("\n") == len(rows) + 1
        and len({line.count("|") for line in table.split("\n")}) == 1
    )


def test_static_copies_and_moves_arrive_once():
    trace, topology = make_trace(SMALL), Topology(2, 2, 1)
    plan = make_plan(trace, topology, cross_node_copies=1)
    planned = report.measure_plan(plan, trace, tile=16)
    static = plan.is_static_LP.sum(1)
    moves = (plan.home_rank_LE != plan.previous_home_LE).sum(1)
    np.testing.assert_array_equal(planned.arrivals_BL[0], planned.copies_BL[0] + moves)
    np.testing.assert_array_equal(planned.arrivals_BL[1:], planned.copies_BL[1:] - static)


def test_no_tokens_is_perfect_balance():
    trace = Trace(np.zeros((0, 1, 1), int), [], [], 4)
    stats = report.trace_stats(trace, [2])
    assert stats.ranks[0].imbalance_avg == 1.0 and not stats.ranks[0].worth_it
    _, rows = report.compare(trace.loads(), Topology(1, 2, 1), names=["none (contiguous)"])
    assert [row.imbalance_avg for row in rows] == [1.0, 1.0]
