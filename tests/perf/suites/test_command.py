"""Running suites by name: files, skips, exit status."""

import pytest
import torch

from perf.__main__ import main
from perf.measuring.measure import Timing
from perf.problems.cases import TINY, Case
from perf.results import record
from perf.suites.bench import Bench, device_here
from perf.suites.table import SUITES, Suite

NEED_GPU = [name for name, suite in SUITES.items() if suite.needs_gpu]


def test_the_suites_are_the_agreed_ones():
    assert {"forward", "decode", "replay", "skew", "planner", "makespan", "host"} <= set(SUITES)


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_suites_for_the_gpu_are_skipped_with_the_reason(without_gpu, tmp_path, capsys):
    assert main(["run", "--suite", *NEED_GPU, "--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}: skipped, its figures need a GPU" in out for name in NEED_GPU)
    assert not list(tmp_path.iterdir())


def test_a_suite_writes_its_rows(without_gpu, tmp_path, capsys):
    assert main(["run", "--suite", "planner", "--quick", "--out", str(tmp_path)]) == 0
    rows = record.read([tmp_path / "planner.csv"])
    assert {row.suite for row in rows} == {"planner"}
    assert f"planner: {len(rows)} figures" in capsys.readouterr().out


def test_a_failure_of_ours_sets_the_exit_status(without_gpu, tmp_path, monkeypatch, capsys):
    def fails(bench: Bench) -> None:
        bench.failures.append("case: wrong output")

    monkeypatch.setitem(SUITES, "planner", Suite(fails, "", False))
    assert main(["run", "--suite", "planner", "--out", str(tmp_path)]) == 1
    assert "FAILED planner: case: wrong output" in capsys.readouterr().err


def test_a_suite_that_breaks_keeps_its_rows_and_does_not_end_the_others(
    without_gpu, tmp_path, monkeypatch, capsys
):
    def breaks(bench: Bench) -> None:
        bench.add("planner", Case(TINY, 8), "ours", "counted", "figure", "n", Timing.exact(7.0))
        raise RuntimeError("boom")

    def counts(bench: Bench) -> None:
        bench.add("host", Case(TINY, 8), "ours", "counted", "figure", "n", Timing.exact(8.0))

    monkeypatch.setitem(SUITES, "planner", Suite(breaks, "", False))
    monkeypatch.setitem(SUITES, "host", Suite(counts, "", False))
    assert main(["run", "--suite", "planner", "host", "--out", str(tmp_path)]) == 1
    assert "FAILED planner: RuntimeError: boom" in capsys.readouterr().err
    assert [row.median for row in record.read([tmp_path / "planner.csv"])] == [7.0]
    assert [row.median for row in record.read([tmp_path / "host.csv"])] == [8.0]


def test_the_device_has_an_index_as_tensors_have_it(monkeypatch):
    """Memory of launches is found by device, and cuda is not cuda:0."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    assert device_here() == torch.device("cuda", 1) != torch.device("cuda")


@pytest.mark.parametrize("make", [None, "no zip file"], ids=["missing", "not a recording"])
def test_a_trace_that_is_none_is_refused(make, tmp_path, capsys):
    path = tmp_path / "trace.npz"
    if make:
        path.write_text(make)
    argv = ["run", "--suite", "planner", "--out", str(tmp_path / "out"), "--trace", str(path)]
    assert main(argv) == 2
    assert "perf run: --trace must be a recording: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
