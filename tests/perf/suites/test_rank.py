"""Who computes which rows under each method, and the figures of the planner."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balance import Topology, Trace, make_plan
from balance.formats import Routes, write_npz
from perf.measuring.measure import Protocol
from perf.problems.cases import GPT_OSS_20B, TINY
from perf.suites.bench import Bench
from perf.suites.rank import (
    CONTIGUOUS,
    EPLB,
    EVEN,
    NUM_RANKS,
    OURS,
    cut_evenly,
    make_rank_call,
    makespan,
    planner,
    played,
    predict_rank_us,
    recordings,
    round_rows,
    share_rows,
)

LOADS = st.lists(st.integers(0, 50), min_size=2, max_size=12).map(np.array)


def rehearsal(device="cpu"):
    return Bench(torch.device(device), quick=True, protocol=Protocol(0, 1))


@given(load_E=LOADS, num_ranks=st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_an_even_cut_is_even_and_loses_nothing(load_E, num_ranks):
    rows_ER = cut_evenly(load_E, num_ranks)
    assert (rows_ER.sum(1) == load_E).all()
    assert np.ptp(rows_ER.sum(0)) <= 1


@given(load_E=LOADS, num_ranks=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_rounded_shares_keep_every_load(load_E, num_ranks, seed):
    share_ER = np.random.default_rng(seed).dirichlet(np.ones(num_ranks), len(load_E))
    rows_ER = round_rows(share_ER * load_E[:, None], load_E)
    assert (rows_ER.sum(1) == load_E).all()
    assert (np.abs(rows_ER - share_ER * load_E[:, None]) < 1 + 1e-6).all()


def test_the_recording_of_the_bench_is_played_on_a_model_of_its_sizes():
    ((model, scenario, trace),) = played(rehearsal(), "planner")
    assert (model, scenario) == (GPT_OSS_20B, "trace")
    assert (trace.num_micro_batches, trace.num_layers, trace.num_source_ranks) == (
        24,
        3,
        NUM_RANKS,
    )
    ((_, _, one_layer),) = played(rehearsal(), "makespan")
    assert (one_layer.ids_TLK == trace.ids_TLK[:, :1]).all()


def test_whole_sequences_are_packed_for_the_suite(tmp_path):
    path = tmp_path / "routes.npz"
    ids_TLK = np.random.default_rng(0).permuted(np.tile(np.arange(8), (9000, 1, 1)), axis=2)
    write_npz(path, Routes(ids_TLK[:, :, :2], np.arange(0, 9001, 100), 8, (0,)))
    bench = rehearsal()
    bench.trace = path
    ((model, _, trace),) = played(bench, "planner")
    assert (model.num_experts, model.top_k) == (8, 2)
    assert trace.num_tokens == 9000 and 2 <= trace.num_micro_batches <= 4
    assert trace.num_source_ranks == NUM_RANKS


def test_a_recording_that_no_model_fits_is_noted(tmp_path):
    bench = rehearsal()
    bench.trace = tmp_path / "odd.npz"
    Trace(np.zeros((3, 1, 1), int), np.zeros(3, int), np.zeros(3, int), 7).save(bench.trace)
    assert list(played(bench, "planner")) == []
    assert bench.notes == ["odd.npz: skipped, no model has 7 experts, top-1"]


def test_every_method_serves_the_whole_load():
    _, _, trace = next(recordings(rehearsal(), "makespan"))
    topology = Topology(1, NUM_RANKS, 1)
    rows_of = share_rows(trace, make_plan(trace, topology), topology, 0)
    assert list(rows_of) == [CONTIGUOUS, EPLB, OURS, EVEN]
    for rows_ER in rows_of.values():
        assert (rows_ER.sum(1) == trace.loads()[0, 0]).all()
    slowest = {method: rows_ER.sum(0).max() for method, rows_ER in rows_of.items()}
    assert slowest[EVEN] <= slowest[OURS] < slowest[CONTIGUOUS]


def test_makespan_without_a_gpu_is_predicted_and_says_so():
    bench = rehearsal()
    makespan(bench)
    assert {row.mode for row in bench.rows} == {"predicted"}
    over_ideal = {row.provider: row.median for row in bench.rows if row.metric == "over ideal"}
    assert over_ideal[EVEN] == 1
    assert over_ideal[OURS] < over_ideal[CONTIGUOUS]


def test_a_rank_without_rows_takes_no_time():
    assert predict_rank_us(rehearsal(), TINY, np.zeros(8, np.int64)) == 0


def test_the_planner_suite_has_every_figure_of_ours():
    bench = rehearsal()
    planner(bench)
    figures = {(row.provider, row.metric): row.median for row in bench.rows}
    bound = figures["lower bound of any plan", "imbalance avg"]
    before = figures["none (contiguous)", "imbalance avg"]
    assert bound <= figures["this planner", "imbalance avg"] < before
    assert {"plan time", "weights moved", "gap to bound", "imbalance worst"} <= {
        metric for provider, metric in figures if provider == "this planner"
    }


@pytest.mark.gpu
def test_a_ranks_share_runs_on_the_gpu(device):
    call = make_rank_call(TINY, np.array([0, 5, 0, 9, 1, 0, 0, 30]), device)
    assert call().shape == (45, TINY.hidden)
