"""The README is short and narrow, begins with commands, and shows what its planner answers."""

from pathlib import Path

from tests.helpers.sources import ROOT
from tests.test_docs import blocks, commands, run_python

README = (ROOT / "README.md").read_text()


def test_it_is_short_and_narrow() -> None:
    lines = README.splitlines()
    assert len(lines) <= 110
    assert [line for line in lines if len(line) > 100] == []


def test_what_is_missing_and_a_command_come_first() -> None:
    top = "\n".join(README.splitlines()[:15])
    assert commands(top)[:2] == ["make demo", "make test"]
    assert "Not there yet" in top.partition("```")[0]


def test_the_planner_answers_what_is_shown(tmp_path: Path) -> None:
    (snippet,) = (block for _, block in blocks("python", README) if "make_plan" in block)
    shown = [
        line[2:].split("  #")[0].rstrip() for line in snippet.splitlines() if line.startswith("# ")
    ]
    done = run_python([(0, snippet)], tmp_path)
    assert done.stdout.splitlines() == shown, done.stderr
