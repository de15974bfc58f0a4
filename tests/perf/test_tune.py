"""Tuning: refused without a GPU, rehearsed on a tiny layer."""

from dataclasses import asdict, replace

import pytest
import torch

from megakernel.config import SHIPPED, KernelConfig
from perf.__main__ import main
from perf.bench import Bench
from perf.cases import TINY, Case
from perf.measure import Protocol
from perf.providers import make_problem
from perf.simulate import LABEL
from perf.tune import time_configs, tune

LOW = SHIPPED["low"]


def rehearsal():
    return Bench(torch.device("cpu"), protocol=Protocol(0, 2))


def test_without_a_gpu_it_refuses_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    table = tmp_path / "tuned.json"
    assert main(["tune", "--model", "tiny", "--tokens", "8", "--out", str(table)]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert not table.exists()


def test_a_ranking_is_printed_as_a_prediction(capsys):
    argv = ["tune", "--model", "tiny", "--tokens", "8", "--mode", "replay", "--predict"]
    assert main([*argv, "--tried", "2"]) == 0
    out = capsys.readouterr().out
    assert LABEL in out and out.count("us predicted") == 3


@pytest.mark.parametrize("mode", ["live", "replay"])
def test_configs_are_checked_before_they_are_timed(mode):
    problem = make_problem(Case(TINY, 12), torch.device("cpu"))
    configs = {"low": LOW, "two workers": replace(LOW, num_workers=2)}
    timing_of = time_configs(rehearsal(), problem, mode, configs)
    assert set(timing_of) == set(configs)
    assert all(timing.median > 0 for timing in timing_of.values())


def test_the_fastest_config_enters_the_table(monkeypatch):
    monkeypatch.setattr("perf.tune.SHIPPED", {"low": LOW})
    monkeypatch.setattr("perf.tune.search_configs", lambda *_: [(1.0, LOW)])
    monkeypatch.setattr("perf.tune.default_of", lambda case: LOW)
    entry = tune(rehearsal(), Case(TINY, 8), "live", 1)
    assert (entry.num_experts, entry.num_tokens, entry.mode) == (8, 8, "live")
    assert KernelConfig(**entry.config) == LOW
    assert entry.median_us == entry.default_us > 0
    assert asdict(entry)["gpu"]
