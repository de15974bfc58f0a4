"""What a call costs the host, counted for real; and the predicted steps of the speed plan."""

from itertools import pairwise

import torch

from perf.measuring.measure import Protocol
from perf.problems.cases import SHAPES, TINY, Case
from perf.problems.providers import OURS, live_output
from perf.problems.tensors import make_problem
from perf.suites.bench import Bench
from perf.suites.host import check_ours, count_allocations, host, simulate, speed_plan


def rehearsal():
    return Bench(torch.device("cpu"), quick=True, protocol=Protocol(warm_ups=1, rounds=3))


def test_one_launch_and_no_allocation_beyond_the_outputs():
    bench = rehearsal()
    host(bench)
    assert not bench.failures
    figures = {(row.provider, row.metric): row.median for row in bench.rows}
    for provider in OURS:
        assert figures[provider.name, "launches"] == 1
        assert figures[provider.name, "allocations beyond outputs"] == 0
        assert 1 < figures[provider.name, "time"] < 1e5


def test_an_allocation_that_is_not_returned_is_counted():
    call = live_output(make_problem(Case(TINY, 4), torch.device("cpu")))

    def wasteful():
        torch.empty(3)
        return call()

    assert count_allocations(call) == 0
    assert count_allocations(wasteful) == 1


def test_a_second_launch_or_an_allocation_is_a_failure():
    bench = rehearsal()
    check_ours(bench, "ours live", 2, 1)
    assert bench.failures == [
        "ours live: 2 launches, not one",
        "ours live: 1 allocations beyond its outputs",
    ]


def test_predicted_rows_say_so():
    bench = rehearsal()
    simulate(bench)
    assert {row.mode for row in bench.rows} == {"predicted"}
    assert {row.provider for row in bench.rows} == set(
        speed_plan(Case(SHAPES["OLMoE"], 1024, "recorded"))
    )
    assert "not measured" in bench.notes[0]


def test_each_step_of_the_plan_changes_one_thing():
    steps = list(speed_plan(Case(SHAPES["OLMoE"], 8192, "recorded")).values())
    for step, next_step in pairwise(steps):  # config, route, heights
        assert sum(one != other for one, other in zip(step, next_step, strict=True)) == 1
