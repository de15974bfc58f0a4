"""The times a launch keeps, rehearsed in the interpreter, and fed to the simulator."""

import pytest
import torch

from megakernel.schedule import NAMES
from megakernel.timeline import Timeline
from perf.bench import Bench
from perf.cases import TINY, Case, make_loads
from perf.measure import Protocol, Timing
from perf.simulate import make_launch, predict
from perf.suites_timeline import add_replayed_prediction, timed_cases, timeline

CASE = Case(TINY, 24, "recorded")


def rehearsal() -> Bench:
    return Bench(torch.device("cpu"), quick=True, protocol=Protocol(warm_ups=0, rounds=1))


def test_a_rehearsal_times_every_kind_of_task_and_keeps_the_timelines():
    bench = rehearsal()
    timeline(bench)
    assert not bench.failures
    assert [case.model for case in timed_cases(bench)] == [TINY]
    for mode, without in (("live", set()), ("replay", {"prefix", "scatter"})):
        metrics = {row.metric for row in bench.rows if row.mode == mode}
        assert {f"{name} task" for name in NAMES if name not in without} <= metrics
        shares = [row.median for row in bench.rows
                  if row.mode == mode and row.unit == "share"]  # fmt: skip
        assert 0.5 < sum(shares) <= 1
    assert {row.unit for row in bench.rows} == {"readings", "share"}  # nothing claims to be a time
    assert set(bench.timelines) == {"tiny_24_live", "tiny_24_replay"}
    assert all("not us" in saved.title for saved in bench.timelines.values())


@pytest.mark.parametrize("mode", ["live", "replay"])
def test_the_simulator_repeats_a_launch_whose_tasks_cost_alike(mode):
    """Fed with the tasks of a launch that it made up itself, it finds that launch's time again."""
    bench, load_E = rehearsal(), make_loads(CASE)
    made_up: Timeline = predict(TINY, 24, load_E, CASE.default_config, mode)
    launch = make_launch(TINY, 24, load_E, CASE.default_config, mode)
    add_replayed_prediction(bench, CASE, mode, made_up, launch, Timing.exact(made_up.launch_us))
    errors = {row.metric: row.median for row in bench.rows}
    assert abs(errors["prediction error, measured tasks"]) < 0.05
