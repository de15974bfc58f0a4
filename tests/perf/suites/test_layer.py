"""The suites for the GPU, rehearsed on one tiny case: every path but the device's clock."""

import itertools
from dataclasses import replace

import pytest
import torch

from perf.measuring.measure import Protocol, Timing
from perf.problems.cases import TINY, Case
from perf.problems.providers import OURS, PLAIN, Provider
from perf.suites import layer
from perf.suites.bench import Bench
from perf.suites.layer import SIZES, add_peer_ratios, cases_of, time_providers

CASE = Case(TINY, 16, "uniform")


def rehearsal(device="cpu"):
    return Bench(torch.device(device), quick=True, protocol=Protocol(warm_ups=0, rounds=2))


@pytest.mark.parametrize("suite", [layer.forward, layer.decode], ids=lambda suite: suite.__name__)
def test_a_suite_times_everyone_who_is_here(suite):
    bench = rehearsal()
    suite(bench)
    assert not bench.failures
    timed = {row.provider for row in bench.rows if row.metric == "time"}
    assert timed >= {provider.name for provider in (*OURS, *PLAIN)}
    assert any("needs a GPU" in note for note in bench.notes)
    assert {"rate", "traffic", "time over best peer"} <= {row.metric for row in bench.rows}


def test_replay_is_timed_against_ours_alone():
    bench = rehearsal()
    layer.replay(bench)
    assert {row.provider for row in bench.rows} == {provider.name for provider in OURS}


def test_skew_relates_every_scenario_to_balanced(monkeypatch):
    monkeypatch.setattr("perf.suites.layer.ALL_PROVIDERS", PLAIN)
    bench = rehearsal()
    layer.skew(bench)
    ratios = [row for row in bench.rows if row.metric == "time over balanced"]
    assert {row.case for row in ratios} == {
        f"tiny/{name}"
        for name in ("balanced", "uniform", "zipf", "recorded", "synthetic", "one takes all")
    }
    assert all(row.median == pytest.approx(1) for row in ratios if row.case == "tiny/balanced")
    assert any("the trace is of 32 experts" in note for note in bench.notes)


def test_no_number_on_red():
    wrong = Provider("ours live", lambda problem: lambda: problem.x_TH * 2, is_ours=True)
    bench = rehearsal()
    time_providers(bench, "forward", CASE, (wrong, *PLAIN))
    assert "tiny/uniform T=16 ours live: wrong output" in bench.failures[0]
    assert "ours live" not in {row.provider for row in bench.rows}


def test_a_peer_is_named_with_its_version_and_counts_as_the_best_peer(monkeypatch):
    monkeypatch.setattr("perf.problems.providers.version_of", lambda package: "1.2")
    bench = rehearsal()
    peer = replace(PLAIN[1], name="peer", package="torch")
    time_providers(bench, "forward", CASE, (OURS[0], peer))
    times = {row.provider: row.median for row in bench.rows if row.metric == "time"}
    ratios = [row.median for row in bench.rows if row.metric == "time over best peer"]
    assert ratios == [pytest.approx(times["ours live"] / times["peer 1.2"])]


def test_a_broken_case_is_a_failure_and_not_the_end():
    def broken(problem):
        raise RuntimeError("boom")

    bench = rehearsal()
    assert time_providers(bench, "forward", CASE, (Provider("ours", broken, is_ours=True),)) == {}
    assert bench.failures == ["tiny/uniform T=16: RuntimeError: boom"]


def test_ratios_are_to_the_best_peer_and_only_where_the_router_is_in():
    bench = rehearsal()
    timing_of = {
        ("eager", "ours live"): Timing.exact(30.0),
        ("eager", "ours given"): Timing.exact(20.0),
        ("eager", "eager loop"): Timing.exact(90.0),
        ("eager", "grouped_mm"): Timing.exact(60.0),
    }
    add_peer_ratios(bench, "forward", CASE, (*OURS, *PLAIN), timing_of)
    assert [(row.provider, row.median) for row in bench.rows] == [("ours live", 0.5)]


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("suite", SIZES)
def test_models_come_one_by_one_and_their_largest_call_first(suite, quick):
    """A stream's memory then never grows, and a model's weights are made once."""
    bench = Bench(torch.device("cuda", 0), quick=quick)
    cases = cases_of(suite, bench)
    models = [case.model.name for case in cases]
    assert list(dict.fromkeys(models)) == [name for name, _ in itertools.groupby(models)]
    for _, of_model in itertools.groupby(cases, lambda case: case.model.name):
        tokens = [case.num_tokens for case in of_model]
        assert tokens == sorted(tokens, reverse=True)
    wanted = SIZES[suite].quick_counts if quick else SIZES[suite].counts
    assert {case.num_tokens for case in cases} == set(wanted)
    assert set(SIZES[suite].quick_counts) <= set(SIZES[suite].counts)


def test_without_a_gpu_there_is_one_tiny_case():
    assert cases_of("forward", rehearsal()) == [Case(TINY, 32, "uniform")]


def test_a_peer_that_breaks_while_it_is_timed_is_a_failure_and_not_the_end():
    calls = iter(range(100))

    def prepare(problem):
        good = PLAIN[0].prepare(problem)

        def call():
            if next(calls):
                raise RuntimeError("illegal memory access")
            return good()

        return call

    wrong = Provider("ours live", lambda problem: lambda: problem.x_TH * 2, is_ours=True)
    bench = rehearsal()
    assert time_providers(bench, "forward", CASE, (wrong, Provider("peer", prepare))) == {}
    assert bench.failures[0].startswith("tiny/uniform T=16 ours live: wrong output")
    assert bench.failures[1:] == ["tiny/uniform T=16: RuntimeError: illegal memory access"]


def test_what_is_about_to_happen_is_said():
    said = []
    bench = rehearsal()
    bench.say = said.append
    for case in bench.each([CASE]):
        time_providers(bench, "forward", case, PLAIN)
    names = ", ".join(provider.name for provider in PLAIN)
    each = [provider.name for provider in PLAIN]
    assert said == ["tiny/uniform T=16", *each, f"timing {names}"]


@pytest.mark.gpu
def test_a_suite_on_the_gpu_has_roofs_graphs_and_predictions(device):
    bench = rehearsal(device)
    time_providers(bench, "forward", Case(TINY, 64, "uniform"), (*OURS, *PLAIN))
    bench.add_roofs("forward")
    assert not bench.failures
    assert {row.mode for row in bench.rows} == {"graph", "eager"}
    assert {"prediction error", "of the roofline", "copy"} <= {row.metric for row in bench.rows}
