"""The times a launch keeps, rehearsed in the interpreter, and fed to the simulator."""

import pytest
import torch

from megakernel.plan.protocol import FORWARD_NAMES
from megakernel.tools.timeline import Timeline
from perf.measuring.measure import Protocol, Timing
from perf.problems.cases import TINY, Case, make_loads
from perf.problems.providers import configured_call
from perf.simulator.predict import make_launch, predict
from perf.suites.bench import Bench
from perf.suites.timeline import add_replayed_prediction, timed_cases, timeline

CASE = Case(TINY, 24, "recorded")
SHARED = {"shared FFN1", "shared FFN2"}  # this model has no shared expert


def rehearsal() -> Bench:
    return Bench(torch.device("cpu"), quick=True, protocol=Protocol(warm_ups=0, rounds=1))


def test_a_rehearsal_times_every_kind_of_task_and_keeps_the_timelines():
    bench = rehearsal()
    timeline(bench)
    assert not bench.failures
    assert [case.model for case in timed_cases(bench)] == [TINY]
    for route, without in (("live", SHARED), ("replay", {"prefix", "scatter"} | SHARED)):
        rows = [row for row in bench.rows if row.provider == f"ours {route}"]
        wanted = {f"{name} task" for name in FORWARD_NAMES if name not in without}
        assert wanted | {"claim", "wait"} <= {row.metric for row in rows}
        assert sum(row.median for row in rows if row.unit == "share") == pytest.approx(1)
        assert all(row.median > 0.999 for row in rows if row.unit == "readings")
    assert {row.unit for row in bench.rows} == {"readings", "share"}  # nothing claims to be a time
    assert {row.mode for row in bench.rows} == {"interpreted"}
    assert set(bench.timelines) == {"tiny_24_live", "tiny_24_replay"}
    assert all("interpreted" in saved.unit for saved in bench.timelines.values())


def wrong(problem, route, config):
    call = configured_call(problem, route, config)
    return (lambda: call() + 100.0) if config.record_times else call


def broken(problem, route, config):
    raise RuntimeError("did not compile")


@pytest.mark.parametrize(
    ("call", "message"),
    [(wrong, "live with the clock: "), (broken, "live: RuntimeError: did not compile")],
    ids=["wrong output", "no kernel"],
)
def test_a_timed_launch_that_is_wrong_is_a_failure(monkeypatch, call, message):
    monkeypatch.setattr("perf.suites.timeline.configured_call", call)
    bench = rehearsal()
    timeline(bench)
    assert message in bench.failures[0] and len(bench.failures) == 2
    assert not bench.rows and not bench.timelines


@pytest.mark.parametrize("route", ["live", "replay"])
def test_the_simulator_repeats_a_launch_whose_tasks_cost_alike(route):
    """Fed with the tasks of a launch that it made up itself, it finds that launch's time again."""
    bench, load_E = rehearsal(), make_loads(CASE)
    made_up: Timeline = predict(TINY, 24, load_E, CASE.default_config, route)
    launch = make_launch(TINY, 24, load_E, CASE.default_config, route)
    add_replayed_prediction(bench, CASE, route, made_up, launch, Timing.exact(made_up.launch_us))
    errors = {row.metric: row.median for row in bench.rows}
    assert abs(errors["prediction error, measured tasks"]) < 0.05
