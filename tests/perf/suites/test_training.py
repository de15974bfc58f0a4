"""The suites of training, rehearsed on one tiny case: every path but the device's clock."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from perf.measuring.measure import Protocol, Timing
from perf.measuring.roofline import backward_work, useful_work
from perf.problems.cases import SHAPES, TINY, Case
from perf.problems.providers import PLAIN, Provider, eager
from perf.problems.training import OURS_TRAINING
from perf.suites import training
from perf.suites.bench import Bench
from perf.suites.training import (
    PREDICTED,
    TRAINED,
    add_prediction_errors,
    time_steps,
    training_cases,
    why_too_large,
    work_of,
)

CASE = Case(TINY, 16)


def rehearsal(device="cpu"):
    return Bench(torch.device(device), quick=True, protocol=Protocol(warm_ups=0, rounds=1))


@pytest.mark.slow
@pytest.mark.parametrize("suite", [training.backward, training.train], ids=["backward", "train"])
def test_a_suite_times_everyone_who_is_here_and_trains(suite):
    bench = rehearsal()
    suite(bench)
    assert not bench.failures
    timed = {row.provider for row in bench.rows if row.metric == "time"}
    assert timed >= {provider.name for provider in (*OURS_TRAINING, *PLAIN)}
    assert any("needs a GPU" in note for note in bench.notes)


@pytest.fixture(
    scope="module",
    params=[training.backward, pytest.param(training.train, marks=pytest.mark.slow)],
    ids=["back", "train"],
)
def timed(request):
    """A suite and what it found of two of ours and one that is always here."""
    bench = rehearsal()
    bench.providers = ("ours live", "ours added to float32", "grouped_mm")
    request.param(bench)
    return request.param.__name__, bench


def test_a_suite_times_those_who_are_wanted(timed):
    suite, bench = timed
    assert not bench.failures
    times = {row.provider for row in bench.rows if row.metric == "time"}
    assert times == set(bench.providers)
    assert {row.suite for row in bench.rows} == {suite}
    assert {"rate", "traffic", "time over best peer"} <= {row.metric for row in bench.rows}


def test_who_is_timed_trains_and_ours_can_be_predicted():
    assert all(provider.trains for provider in TRAINED)
    assert set(PREDICTED) == {provider.name for provider in OURS_TRAINING}


@pytest.mark.parametrize("suite", ["backward", "train"])
def test_no_number_on_red(suite):
    def wrong(problem):
        x_TH = problem.x_TH.detach() + (problem.x_TH - problem.x_TH.detach()) * 1.2
        return eager(replace(problem, x_TH=x_TH))

    bench = rehearsal()
    ours = Provider("ours live", wrong, is_ours=True, trains=True)
    time_steps(bench, suite, CASE, (ours, *PLAIN))
    assert bench.failures[0].startswith("tiny/uniform T=16 ours live: wrong gradient of x_TH")
    assert {row.provider for row in bench.rows} == {provider.name for provider in PLAIN}


def test_a_broken_case_is_a_failure_and_not_the_end():
    def broken(problem):
        raise RuntimeError("boom")

    bench = rehearsal()
    ours = Provider("ours", broken, is_ours=True, trains=True)
    assert time_steps(bench, "train", CASE, (ours,)) == {}
    assert bench.failures == ["tiny/uniform T=16: RuntimeError: boom"]


def test_a_rate_is_of_useful_work(timed):
    """A backward is twice a forward, a whole step three times; traffic as gradients are kept."""
    suite, bench = timed
    flops = (
        {"backward": 12, "train": 18}[suite] * 16 * TINY.top_k * TINY.hidden * TINY.intermediate
    )
    of_metric = {(row.provider, row.metric): row.median for row in bench.rows}
    moved = {}
    for name in bench.providers:
        time_us = of_metric[name, "time"]
        assert of_metric[name, "rate"] * time_us * 1e6 == pytest.approx(flops)
        moved[name] = of_metric[name, "traffic"] * time_us * 1e3
    weights = 3 * TINY.num_experts * TINY.hidden * TINY.intermediate
    more = moved["ours added to float32"] - moved["ours live"]
    assert more == pytest.approx((8 - 2) * weights, rel=1e-6)


def test_a_step_moves_what_both_passes_move():
    load_E = np.full(8, 4)
    ahead, back = useful_work(TINY, 16, load_E), backward_work(TINY, 16, load_E, "added")
    assert work_of("train", CASE, load_E, "added").bytes == ahead.bytes + back.bytes
    assert work_of("backward", CASE, load_E, "added") == back


def test_cases_fall_and_what_has_no_truth_is_left_out():
    bench = Bench(torch.device("cuda", 0))
    cases = training_cases(bench)
    counts = [case.num_tokens for case in cases if case.model.name == "OLMoE"]
    assert counts == sorted(counts, reverse=True) and 8192 in counts
    reasons = {case.model.name: why_too_large(case) for case in cases}
    assert [name for name, reason in reasons.items() if reason] == ["DeepSeek-V3 routed"]
    quick = training_cases(replace(bench, quick=True))
    assert {case.model.name for case in quick} == {"Qwen3-30B-A3B", "Mixtral-8x7B"}


def test_a_case_without_truth_is_noted():
    bench = rehearsal()
    assert time_steps(bench, "train", Case(SHAPES["DeepSeek-V3 routed"], 8), TRAINED) == {}
    assert "gradients in float64 take 90 GB" in bench.notes[0] and not bench.failures


def test_predictions_are_held_against_what_was_measured():
    bench = rehearsal()
    measured = {("graph", name): Timing.exact(100.0) for name in ("ours live", "ours replay")}
    add_prediction_errors(bench, CASE, np.full(8, 4), measured)
    rows = {row.provider: row for row in bench.rows}
    assert set(rows) == {"ours live", "ours replay"}
    assert rows["ours replay"].median < rows["ours live"].median
    assert {row.metric for row in bench.rows} == {"prediction error"}


@pytest.mark.gpu
@pytest.mark.parametrize("suite", ["backward", "train"])
def test_a_suite_on_the_gpu_has_graphs_of_ours(suite, device):
    bench = rehearsal(device)
    time_steps(bench, suite, Case(TINY, 64), (*OURS_TRAINING, *PLAIN))
    assert not bench.failures
    captured = {row.provider for row in bench.rows if row.mode == "graph"}
    assert captured >= {provider.name for provider in OURS_TRAINING}
