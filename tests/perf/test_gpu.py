"""``make gpu``: its budgets add up, and without a GPU it says so."""

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

from megakernel.tools.compile_cases import layer_cases
from perf import gpu
from perf.measuring.measure import QUICK
from perf.suites.table import SUITES


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no GPU here" in capsys.readouterr().err


def test_the_budgets_stay_under_nine_minutes():
    assert set(gpu.SECONDS_OF_SUITE) == set(SUITES)
    whole = gpu.TEST_SECONDS + sum(gpu.SECONDS_OF_SUITE.values()) + gpu.REPORT_SECONDS
    assert whole <= gpu.TOTAL_SECONDS < 9 * 60


def test_a_part_never_gets_more_than_what_is_left():
    clock = gpu.Clock(time.monotonic() + 50)
    assert clock.budget(1000) < 50 - gpu.REPORT_SECONDS + 0.1
    assert clock.budget(5) == 5
    assert gpu.Clock(time.monotonic()).budget(5) == 0


def test_a_suite_that_breaks_does_not_stop_the_others(monkeypatch, tmp_path):
    started = []

    def run_suite(name, bench, out):
        started.append(name)
        if name == "decode":
            raise RuntimeError("boom")
        return ["replay: slow"] if name == "replay" else []

    monkeypatch.setattr(gpu, "run_suite", run_suite)
    monkeypatch.setattr(gpu, "Bench", lambda *args, **fields: SimpleNamespace(roofs=None))
    failures = gpu.run_suites(gpu.Clock(time.monotonic() + 1000), tmp_path, QUICK)
    assert started == list(gpu.SECONDS_OF_SUITE)
    assert failures == ["decode: RuntimeError: boom", "replay: slow"]


def test_red_tests_are_a_failure(monkeypatch):
    statuses = iter([0, 5, 1])
    monkeypatch.setattr(
        gpu.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=next(statuses))
    )
    clock = gpu.Clock(time.monotonic() + 1000)
    assert gpu.run_tests(clock) == []
    assert gpu.run_tests(clock) == ["tests: pytest exited with 5"]  # no test ran
    assert gpu.run_tests(clock) == ["tests: pytest exited with 1"]


def test_tests_that_take_too_long_are_a_failure(monkeypatch):
    def too_long(*args, timeout, **options):
        raise subprocess.TimeoutExpired("pytest", timeout)

    monkeypatch.setattr(gpu.subprocess, "run", too_long)
    assert "not done after" in gpu.run_tests(gpu.Clock(time.monotonic() + 1000))[0]


def test_configs_compile_beside_the_tests_and_failures_are_told(monkeypatch, capsys):
    good, bad = layer_cases()[:2]

    def compile_one(case):
        if case == replace(bad, kind="plain"):
            raise RuntimeError("out of registers")

    monkeypatch.setattr(gpu, "ProcessPoolExecutor", lambda n, mp_context: ThreadPoolExecutor(n))
    monkeypatch.setattr(gpu, "layer_cases", lambda: [good, bad])
    monkeypatch.setattr(gpu, "compile_case", compile_one)
    with gpu.precompile():
        pass
    assert "1 of 2 configs did not compile, first: out of registers" in capsys.readouterr().out


def test_the_whole_run_ends_with_its_failures(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(gpu, "provenance", lambda: {"date": "2026-01-01", "gpu": "NVIDIA H200"})
    monkeypatch.setattr(gpu, "layer_cases", lambda: [])
    monkeypatch.setattr(gpu, "run_tests", lambda clock: ["tests: pytest exited with 1"])
    wanted = []
    monkeypatch.setattr(gpu, "run_suites", lambda *given: wanted.append(given[-1]) or [])
    assert gpu.main(["--out", str(tmp_path), "--no-peers"]) == 1
    assert (tmp_path / "2026-01-01-NVIDIA-H200").is_dir()
    assert "eager loop" in wanted[0] and "Liger Triton" not in wanted[0]
    assert "FAILED tests: pytest exited with 1" in capsys.readouterr().err
