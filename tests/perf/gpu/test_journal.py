"""What a run prints fits a short reply, and its verdict comes last."""

import json
from pathlib import Path

import pytest

from perf.gpu.journal import MOST_LINES, Journal
from perf.gpu.steps import Outcome


def test_however_much_goes_wrong_few_lines_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(tmp_path, "first")
    for number in range(200):
        journal.add(Outcome(f"step{number}", "failed", 1.0, "\n".join(["x" * 500] * 30)))
    lines = journal.write_verdict()
    journal.print_last([*lines[1:], lines[0]])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) <= MOST_LINES
    assert printed[-1].startswith("FAILED first: 0 steps passed")
    assert max(map(len, printed)) <= 480


def test_the_log_has_all_of_it_at_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "first")
    text = "\n".join(["line"] * 100)
    journal.add(Outcome("one", "hung", 40.0, text, {"figure": 1.5}))
    (line,) = (tmp_path / "first.log").read_text().splitlines()
    kept = json.loads(line)
    assert (kept["step"], kept["verdict"], kept["seconds"]) == ("one", "hung", 40.0)
    assert kept["text"] == text and kept["details"] == {"figure": 1.5}


@pytest.mark.parametrize(
    ("verdicts", "word"),
    [
        (["passed", "passed"], "PASSED"),
        (["passed", "skipped"], "INCOMPLETE"),
        (["passed", "failed", "skipped"], "FAILED"),
        (["died"], "FAILED"),
        (["hung"], "FAILED"),
    ],
)
def test_the_verdict_is_the_worst_that_happened(
    verdicts: list[str], word: str, tmp_path: Path
) -> None:
    journal = Journal(tmp_path, "first")
    for place, verdict in enumerate(verdicts):
        journal.add(Outcome(str(place), verdict))
    assert journal.write_verdict()[0].startswith(f"{word} first")


def test_being_stopped_is_no_success(tmp_path: Path) -> None:
    lines = Journal(tmp_path, "first").write_verdict("SIGTERM")
    assert lines[0].startswith("FAILED") and lines[1] == "stopped: SIGTERM"
