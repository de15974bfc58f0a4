"""The GPU's tests in a run: a failure is heard of at once, whatever becomes of pytest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from perf.gpu.testing import DESELECTED, MOST_FAILURES, Reporter, command, why
from tests.helpers.sources import ROOT

RUN = """
import sys
from pathlib import Path
import pytest
from perf.gpu.child import Context
from perf.gpu.testing import Reporter

folder = Path(sys.argv[1])
reporter = Reporter(Context(folder, folder))
pytest.main(["-q", "-p", "no:cacheprovider", str(folder / "test_one.py")], plugins=[reporter])
"""
TESTS = """
import os

def test_good():
    assert True

def test_bad():
    assert 7 * 6 == 41, "the answer"

def test_crash():
    os._exit(3)
"""


def test_failures_are_kept_when_pytest_is_killed(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    (note,) = (tmp_path / "notes.txt").read_text().splitlines()
    assert note.startswith("failed ") and note.endswith("test_bad: AssertionError: the answer")
    assert '{"passed": 1, "failed": 1}' in (tmp_path / "tests.json").read_text()
    assert "assert (7 * 6) == 41" in done.stdout and "passed " in done.stdout


def test_the_line_that_says_what_failed_is_found() -> None:
    assert why(["def test():", ">   f()", "E   ValueError: wrong", "file.py:3"]) == (
        "ValueError: wrong"
    )
    assert why(["nothing marked", "the last"]) == "the last"
    assert why([]) == "no word"


def test_pytest_is_told_what_was_agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perf.gpu.testing.find_spec", lambda name: None)
    without = command(rehearse=False)
    assert {"-v", "--tb=short", f"--maxfail={MOST_FAILURES}", "gpu and not slow"} <= set(without)
    assert not any("timeout" in word for word in without)
    monkeypatch.setattr("perf.gpu.testing.find_spec", lambda name: object())
    assert {"--timeout=35", "--timeout-method=thread"} <= set(command(rehearse=False))


@pytest.mark.slow
def test_what_is_left_out_is_not_selected() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *command(rehearse=False)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "test_real_layers" in done.stdout
    assert not [name for name in DESELECTED if name in done.stdout]


def test_what_is_left_out_exists() -> None:
    for name, module in DESELECTED.items():
        assert f"def {name}(" in (ROOT / "tests" / "gpu" / module).read_text()


def test_a_reporter_counts_what_ran_and_what_broke_around_it(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from perf.gpu.child import Context

    reporter = Reporter(Context(tmp_path, tmp_path))
    for when, outcome in (("setup", "passed"), ("call", "passed"), ("setup", "skipped"),
                          ("teardown", "failed")):  # fmt: skip
        reporter.pytest_runtest_logreport(
            SimpleNamespace(when=when, outcome=outcome, nodeid="t", duration=0.0, longrepr="E   x")
        )
    assert reporter.outcomes == {"passed": 1, "skipped": 1, "failed": 1}
    assert reporter.failures == ["t: x"]
