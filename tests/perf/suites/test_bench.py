"""The bench keeps to its budget and its models."""

import time

import torch

from perf.measuring.measure import Protocol, Timing
from perf.problems.cases import SHAPES, TINY, Case
from perf.problems.providers import OURS, PLAIN
from perf.simulator.costs import H200
from perf.suites.bench import Bench

CASES = [Case(TINY, 4), Case(SHAPES["OLMoE"], 8), Case(TINY, 8)]


def bench(**fields):
    return Bench(torch.device("cpu"), protocol=Protocol(0, 2), **fields)


def test_no_case_starts_after_the_deadline():
    late = bench(deadline=time.monotonic() - 1)
    assert list(late.each(CASES)) == []
    assert late.notes == ["3 cases left out: time is up"]


def test_only_the_wanted_models_run():
    assert list(bench(models=("OLMoE",)).each(CASES)) == [CASES[1]]


def test_only_the_wanted_providers_are_kept():
    kept = bench(providers=("grouped_mm",)).keep_providers((*OURS, *PLAIN))
    assert [provider.name for provider in kept] == ["grouped_mm"]
    assert bench().keep_providers(OURS) == list(OURS)


def test_without_a_gpu_there_are_no_device_times_and_no_measured_roofs():
    timed = bench().time({"one": lambda: None})
    assert list(timed) == ["eager"]
    assert bench().roofs.source.startswith("assumed")
    assert bench().machine == H200


def test_figures_become_rows():
    kept = bench()
    kept.add("forward", CASES[0], "ours live", "eager", "time", "us", Timing.exact(3.0))
    kept.add_roofs("forward")
    assert kept.rows[0].key == ("forward", "tiny/uniform", "ours live", 4, "eager", "time")
    assert [row.metric for row in kept.rows[1:]] == ["dense product", "copy", "L2 read"]
