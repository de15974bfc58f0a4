"""Tuning: refused without a GPU, rehearsed on a tiny layer."""

import argparse
from dataclasses import replace

import pytest
import torch

from megakernel.config import SHIPPED, KernelConfig, LayerShape
from megakernel.launch.tuned import TABLE, Tuned, read_table
from perf.__main__ import main
from perf.measuring.measure import Protocol, Timing
from perf.problems.cases import RECORDING, TINY, Case
from perf.problems.tensors import make_problem
from perf.results.record import LABEL
from perf.suites.bench import Bench
from perf.suites.tuning import merge_into_table, time_configs
from perf.tune import run, tune

ROWS16 = SHIPPED["rows16"]


def rehearsal():
    return Bench(torch.device("cpu"), protocol=Protocol(0, 2))


def test_without_a_gpu_it_refuses_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    table = tmp_path / "tuned.json"
    assert main(["tune", "--model", "tiny", "--tokens", "8", "--out", str(table)]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert not table.exists()


def test_a_ranking_is_printed_as_a_prediction(capsys):
    argv = ["tune", "--model", "tiny", "--tokens", "8", "--route", "replay", "--predict"]
    assert main([*argv, "--tried", "2"]) == 0
    out = capsys.readouterr().out
    assert LABEL in out and out.count("us predicted") == 3


def test_a_scenario_that_is_not_there_is_refused(capsys):
    argv = ["tune", "--predict", "--model", "tiny", "--tokens", "8", "--scenario", "trace"]
    assert main(argv) == 2
    assert "the trace is of 32 experts" in capsys.readouterr().err


@pytest.mark.parametrize("route", ["live", "replay"])
def test_configs_are_checked_before_they_are_timed(route):
    problem = make_problem(Case(TINY, 12), torch.device("cpu"))
    configs = {"rows16": ROWS16, "two workers": replace(ROWS16, num_workers=2)}
    timing_of = time_configs(rehearsal(), problem, route, configs)
    assert set(timing_of) == set(configs)
    assert all(timing.median > 0 for timing in timing_of.values())


def test_the_fastest_config_enters_the_table(monkeypatch):
    us_of = {"live": {16: 9.0, 32: 4.0, 64: 5.0, 128: 7.0},
             "replay": {16: 1.0, 32: 4.0, 64: 2.0, 128: 7.0}}  # fmt: skip

    def times(bench, problem, route, configs):
        return {name: Timing.exact(us_of[route][c.block_rows]) for name, c in configs.items()}

    monkeypatch.setattr("perf.suites.tuning.time_configs", times)
    monkeypatch.setattr("perf.tune.search_configs", lambda *_: [])
    entry = tune(rehearsal(), Case(TINY, 8), ("live", "replay"), 1)
    assert entry.key == ("none", LayerShape(8, 2, 64, 32), 8)
    assert entry.config.block_rows == 64  # least sum, though the fastest in neither route
    assert entry.median_us == {"live": 5.0, "replay": 2.0}
    assert entry.shipped_us == {"live": 9.0, "replay": 1.0}


def test_a_config_that_fails_on_one_route_is_not_chosen(monkeypatch):
    def times(bench, problem, route, configs):
        kept = {name: c for name, c in configs.items() if (route, c.block_rows) != ("replay", 16)}
        return {name: Timing.exact(c.block_rows) for name, c in kept.items()}

    monkeypatch.setattr("perf.suites.tuning.time_configs", times)
    monkeypatch.setattr("perf.tune.search_configs", lambda *_: [])
    entry = tune(rehearsal(), Case(TINY, 8), ("live", "replay"), 1)
    assert entry.config.block_rows == 32
    assert entry.shipped_us == {}


def test_measured_entries_reach_the_table(monkeypatch, tmp_path, capsys):
    entry = Tuned("NVIDIA H200", LayerShape(8, 2, 64, 32), 8, ROWS16, {"live": 5.0},
                  {"live": 9.0}, "2", "3", "abc", "2026-01-01")  # fmt: skip
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("perf.tune.tune", lambda *_: entry)
    path = tmp_path / "tuned.json"
    arguments = argparse.Namespace(
        model=["tiny"], tokens=[8], scenario="uniform", trace=RECORDING, route=["live"], tried=1,
        out=path, predict=False,
    )  # fmt: skip
    assert run(arguments) == 0
    assert read_table(path) == (entry,)
    assert "live: 5 us, shipped config 9 us" in capsys.readouterr().out


WHERE = {"torch": "2.11", "triton": "3.6", "commit": "abc", "date": "2026-01-01"}


def make_entry(num_tokens, config=ROWS16):
    layer = LayerShape(128, 8, 2048, 768)
    return Tuned("NVIDIA H200", layer, num_tokens, config, {"live": 9.5}, {"live": 11.0}, **WHERE)


def test_a_table_survives_the_file_and_new_entries_replace_old_ones(tmp_path):
    path = tmp_path / "tuned.json"
    merge_into_table(path, [make_entry(64), make_entry(8192)])
    newer = make_entry(64, KernelConfig(num_workers=7))
    merge_into_table(path, [newer])
    assert read_table(path) == (newer, make_entry(8192))


def is_measured(entry):
    """Whether an entry says what was measured, and where the code of that day is found."""
    times_us = entry.median_us.values()
    return bool(times_us) and all(us > 0 for us in times_us) and "unknown" not in entry.commit


def test_the_shipped_table_holds_measurements_only():
    assert is_measured(make_entry(64))
    assert not is_measured(replace(make_entry(64), median_us={}))
    assert not is_measured(replace(make_entry(64), commit="unknown"))
    assert all(is_measured(entry) for entry in TABLE)
