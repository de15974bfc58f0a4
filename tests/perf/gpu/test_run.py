"""A run stops where it must, ends when it is told to, and leaves its files in every case."""

import os
import signal
import tarfile
import threading
import time
from pathlib import Path

import pytest

from perf.gpu import run as running
from perf.gpu.process import Setting
from perf.gpu.run import run_plan
from perf.gpu.steps import Plan, Step

STEPS = "tests.perf.gpu.steps_for_tests"


def step(name: str, function: str = "passes", *arguments: str, **options: object) -> Step:
    return Step(name, f"{STEPS}:{function}", arguments, **options)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run steps; return exit status, verdict lines and what was printed."""
    monkeypatch.setattr(running, "CLOSING_S", 3.5)
    monkeypatch.setattr(running, "LAST_WORDS_S", 1.0)

    def call(*steps: Step, seconds: float = 60.0) -> tuple[int, list[str], list[str]]:
        setting = Setting(tmp_path / "work", tmp_path / "triton-cache")
        setting.work.mkdir()
        out = tmp_path / "out"
        out.mkdir()
        status = run_plan(Plan("first", seconds, steps), setting, out)
        with tarfile.open(out / "first.tgz") as tar:
            names = tar.getnames()
        assert {"first.log", "first.verdict.txt"} <= set(names)
        assert sorted(path.name for path in out.iterdir()) == [
            "first.log",
            "first.tgz",
            "first.verdict.txt",
        ]
        verdict = (out / "first.verdict.txt").read_text().splitlines()
        return status, verdict, capsys.readouterr().out.splitlines()

    return call


def test_all_is_well(run) -> None:
    status, verdict, printed = run(step("a"), step("b"))
    assert status == 0 and len(verdict) == 1
    assert verdict[0].startswith("PASSED first: 2 steps")
    assert printed[-1] == verdict[0]


def test_nothing_follows_a_step_that_stops(run) -> None:
    status, verdict, printed = run(step("a"), step("b", "fails"), step("c"), step("d"))
    assert status == 1
    assert verdict[0].startswith("FAILED first: 1 steps")
    assert verdict[1:] == ["failed b: 7 of 9 values differ", "skipped: c, d"]
    assert printed[-1] == verdict[0]
    assert any("b went wrong" in line for line in printed)


def test_a_step_that_does_not_stop_lets_the_others_run_and_counts(run) -> None:
    status, verdict, _ = run(step("a", "fails", stops=False), step("b"))
    assert status == 1 and verdict[0].startswith("FAILED first: 1 steps")


def test_a_failure_is_explained_where_a_step_can(run) -> None:
    status, verdict, printed = run(
        step("a", "fails"), step("why", "passes", "this", explains="a"), step("b")
    )
    assert status == 1 and any("seen this" in line for line in printed), printed
    assert verdict[-1] == "skipped: b"


def test_a_step_that_explains_is_silent_where_there_is_nothing_to_explain(run) -> None:
    status, _, printed = run(step("a"), step("why", explains="a"))
    assert status == 0 and not any("why" in line for line in printed)


def test_steps_beside_one_another_are_all_waited_for(run) -> None:
    status, _, printed = run(
        step("slow", "talks", "2", beside=True), step("quick", waits=False), step("after")
    )
    assert status == 0
    order = [line.split()[4].rstrip(",") for line in printed if "] passed" in line]
    assert order == ["quick", "slow", "after"]


def test_a_step_that_stops_the_run_does_not_wait_for_those_beside_it(run) -> None:
    start = time.monotonic()
    status, verdict, _ = run(
        step("slow", "talks", "50", beside=True), step("b", "fails", waits=False), step("c")
    )
    assert status == 1 and time.monotonic() - start < 25
    assert verdict[1:] == ["failed b: 7 of 9 values differ", "skipped: c, slow"]


@pytest.mark.slow
def test_no_step_starts_without_time(run) -> None:
    status, verdict, _ = run(step("a", "talks", "3"), step("b"), seconds=8.0)
    assert status == 1
    assert verdict[0].startswith("INCOMPLETE first: 1 steps") and verdict[1] == "skipped: b"


@pytest.mark.slow
def test_time_is_up_for_a_step_in_the_middle(run) -> None:
    start = time.monotonic()
    status, verdict, _ = run(step("a", "hangs_deaf", limit_s=300), step("b"), seconds=9.0)
    assert status == 1 and "hung a: not done after" in verdict[1]
    assert time.monotonic() - start < 15


@pytest.mark.slow
def test_the_alarm_ends_a_supervisor_that_waits_too_long(run, monkeypatch) -> None:
    monkeypatch.setattr(running, "CLOSING_S", -60.0)  # its own count of time is wrong
    status, verdict, _ = run(step("a", "hangs_deaf", limit_s=300), seconds=5.0)
    assert status == 1 and verdict[1] == "stopped: time is up"
    assert verdict[2].startswith("hung a: stopped: time is up: begun")


@pytest.mark.slow
def test_being_told_to_end_leaves_the_files(run) -> None:
    teller = threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGTERM))
    teller.start()
    status, verdict, _ = run(step("a", "hangs_deaf", limit_s=300), step("b"))
    teller.join()
    assert status == 1 and verdict[1] == "stopped: SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_fault_of_the_supervisor_leaves_the_files(run, monkeypatch) -> None:
    monkeypatch.setattr(running.Runner, "close", lambda self, outcome, step: 1 / 0)
    status, verdict, _ = run(step("a"))
    assert status == 1 and verdict[1] == "stopped: ZeroDivisionError: division by zero"
