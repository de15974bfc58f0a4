"""A step's process ends in time, with all that it started, and what it knew is kept."""

import os
import time
from pathlib import Path

import pytest

from perf.gpu.process import TAIL_LINES, Child, Setting, tail
from perf.gpu.steps import Outcome, Step

STEPS = "tests.perf.gpu.steps_for_tests"


def run(tmp_path: Path, function: str, *arguments: str, **options: object) -> Outcome:
    """Run one step to its end."""
    step = Step("one", f"{STEPS}:{function}", arguments, **options)
    child = Child(step, Setting(tmp_path, tmp_path / "cache"))
    child.go()
    return child.wait(time.monotonic() + 60)


def ends_soon(pid: int) -> bool:
    """Whether a process that was killed is gone, or waits to be buried, within seconds."""
    state = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_what_a_step_returns_is_its_outcome(tmp_path: Path) -> None:
    outcome = run(tmp_path, "passes", "a", "b")
    assert (outcome.verdict, outcome.text, outcome.details) == (
        "passed",
        "seen a b",
        {"figure": 3},
    )
    assert (tmp_path / "steps" / "one" / "log").read_text() == "a word\n"


@pytest.mark.parametrize(
    ("function", "text"),
    [("fails", "7 of 9 values differ"), ("breaks", "KeyError: 'no such thing'")],
)
def test_what_a_step_raises_is_its_outcome(function: str, text: str, tmp_path: Path) -> None:
    outcome = run(tmp_path, function)
    assert (outcome.verdict, outcome.text) == ("failed", text)


def test_a_crash_is_told_with_its_last_words(tmp_path: Path) -> None:
    outcome = run(tmp_path, "dies")
    assert outcome.verdict == "died"
    assert outcome.text.splitlines() == [
        "exit status -9: test 3 failed",  # what it noted says more than where it ended
        "test 3 failed",
        "the last line",
        "test 3 failed",
    ]


def test_a_step_that_does_not_import_is_told(tmp_path: Path) -> None:
    child = Child(Step("one", "no_such_module:run"), Setting(tmp_path, tmp_path))
    child.process.wait(30)
    child.go()
    outcome = child.wait(time.monotonic() + 30)
    assert outcome.verdict == "died"
    assert outcome.text.startswith("exit status 1: ModuleNotFoundError: No module named 'no_")


def test_a_step_that_hears_nothing_is_killed_at_its_limit(tmp_path: Path) -> None:
    start = time.monotonic()
    outcome = run(tmp_path, "hangs_deaf", limit_s=1.0)
    assert outcome.verdict == "hung" and outcome.text.startswith("not done after 1 s: begun")
    assert time.monotonic() - start < 15


def test_a_hang_is_told_with_its_stack_and_takes_its_children_along(tmp_path: Path) -> None:
    outcome = run(tmp_path, "hangs_with_a_child", limit_s=3.0)
    assert outcome.verdict == "hung" and "in hangs_with_a_child" in outcome.text
    first = outcome.text.splitlines()[0]
    assert first.startswith("not done after 3 s: File ") and "subprocess.py" in first
    pid = int((tmp_path / "steps" / "one" / "child").read_text())
    assert ends_soon(pid)


def test_silence_is_a_hang_and_talk_is_none(tmp_path: Path) -> None:
    silent = run(tmp_path / "a", "hangs_deaf", limit_s=60.0, silence_s=0.5)
    assert silent.verdict == "hung" and silent.text.startswith("silent for 0 s")
    talking = run(tmp_path / "b", "talks", "1.5", limit_s=60.0, silence_s=1.2)
    assert talking.verdict == "passed"


def test_time_counts_from_the_word_to_go(tmp_path: Path) -> None:
    child = Child(Step("one", f"{STEPS}:passes", limit_s=1.0), Setting(tmp_path, tmp_path))
    time.sleep(1.5)
    assert child.process.poll() is None and not child.has_begun
    child.go()
    assert child.wait(time.monotonic() + 60).verdict == "passed"


def test_a_process_that_nobody_lets_go_ends_with_its_supervisor(tmp_path: Path) -> None:
    child = Child(Step("one", f"{STEPS}:passes"), Setting(tmp_path, tmp_path))
    child.stdin.close()
    assert child.process.wait(30) == 1
    assert not (child.folder / "report.json").exists()


def test_only_a_rehearsal_interprets_and_not_where_kernels_are_compiled(tmp_path: Path) -> None:
    step, compiling = Step("one", "a:b"), Step("two", "a:b", interprets=False)
    real, rehearsal = Setting(tmp_path, tmp_path), Setting(tmp_path, tmp_path, rehearse=True)
    interpreted = [
        setting.environment(one).get("TRITON_INTERPRET")
        for setting in (real, rehearsal)
        for one in (step, compiling)
    ]
    assert interpreted == [None, None, "1", None]
    environment = real.environment(step)
    assert environment["TRITON_CACHE_DIR"] == str(tmp_path)
    assert environment["PYTHONUNBUFFERED"] == environment["TQDM_DISABLE"] == "1"
    assert environment["HOME"] == os.environ["HOME"]


def test_the_end_of_a_long_log_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(f"{n} {'x' * 1000}" for n in range(100)))
    lines = tail(log)
    assert len(lines) == TAIL_LINES and lines[-1].startswith("99 ")
    assert max(map(len, lines)) <= 200
