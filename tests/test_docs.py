"""The README keeps its word: its commands exist, its snippets run, its files are there."""

import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.sources import FOLDERS, ROOT

README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Programs that are not ours to check.
OUTSIDE = {"cd", "export", "git", "nvidia-smi", "pip", "source"}


def blocks(language: str, text: str = README) -> Iterator[tuple[int, str]]:
    """Yield (lines above, content) of each fenced block in a language."""
    for match in FENCE.finditer(text):
        if match[1] == language:
            yield text[: match.start(2)].count("\n"), match[2]


def commands(text: str = README) -> list[str]:
    """Return each command of the sh blocks, and of the code spans that hold one, once."""
    lines = [line for _, block in blocks("sh", text) for line in joined_lines(block)]
    spans = re.findall(r"`((?:make|python -m) [^`\n]+)`", FENCE.sub("", text))
    bare = [shlex.join(words_of(line)) for line in [*lines, *spans]]
    return list(dict.fromkeys(filter(None, bare)))


def joined_lines(block: str) -> list[str]:
    """Return the lines of a block, continued ones as one, without a prompt."""
    return [line.removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines()]


def words_of(command: str) -> list[str]:
    """Split a command, without its comment and the variables set for it."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    return words


def make_targets() -> set[str]:
    """Return the targets of the Makefile."""
    return set(re.findall(r"^([\w-]+):(?!=)", MAKEFILE, re.MULTILINE))


def test_demo_and_test_stand_at_the_top() -> None:
    top = "\n".join(README.splitlines()[:40])
    assert {"make demo", "make test"} <= set(commands(top))


def test_nothing_is_left_to_fill_in() -> None:
    assert re.findall(r"@@\w*|TODO|TBD|FIXME|XXX", README) == []


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning:runpy")
@pytest.mark.parametrize("command", commands())
def test_a_command_is_understood(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *arguments = shlex.split(command)
    if program == "make":
        assert {word for word in arguments if "=" not in word} <= make_targets()
    elif re.fullmatch(r"(.*/)?python3?", program) and arguments[:1] == ["-m"]:
        assert importlib.util.find_spec(arguments[1])
        if arguments[1].split(".")[0] in FOLDERS:
            assert_parses(arguments[1], arguments[2:], capsys, monkeypatch)
    else:
        assert program in OUTSIDE, f"{program} is neither ours nor among {sorted(OUTSIDE)}"


def assert_parses(
    module: str,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ask for help after the arguments: their values are checked first, their names are in it."""
    monkeypatch.setattr(sys, "argv", [module, *arguments, "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    printed = capsys.readouterr()
    assert left.value.code == 0, printed.err
    options = {word.split("=")[0] for word in arguments if word.startswith("--")}
    assert {option for option in options if option not in printed.out} == set()


MAKE_TARGETS = (
    "demo", "test", "test-all", "test-newest", "test-oldest", "check", "lint", "metrics", "gpu",
    "bench",
)  # fmt: skip


@pytest.mark.parametrize("target", MAKE_TARGETS)
def test_make_runs_programs_that_exist(target: str) -> None:
    assert target in make_targets()
    recipe = re.search(rf"^{target}:[^\n]*\n((?:\t[^\n]*\n)+)", MAKEFILE, re.MULTILINE)
    modules = re.findall(
        r"(?:\$\((?:RUN|PYTHON)\)|/python) -m ([\w.]+)", recipe[1] if recipe else ""
    )
    assert modules
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


RUN_BLOCKS = """
import json, sys
for lines_above, source in json.load(sys.stdin):
    exec(compile("\\n" * lines_above + source, "README.md", "exec"), globals())
"""


def run_python(sources: list[tuple[int, str]], folder: Path) -> subprocess.CompletedProcess:
    """Run blocks one after another, later ones with what earlier ones defined, and no GPU."""
    interpreted = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", RUN_BLOCKS],
        input=json.dumps(sources),
        cwd=folder,
        env=os.environ | interpreted,
        capture_output=True,
        text=True,
    )


def test_the_snippets_run(tmp_path: Path) -> None:
    done = run_python(list(blocks("python")), tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_snippet_that_fails_is_named_by_its_line(tmp_path: Path) -> None:
    text = "one\n```python\nvalue = 1\n```\ntwo\n```python\nvalue += 1\nassert value == 1\n```\n"
    done = run_python(list(blocks("python", text)), tmp_path)
    assert done.returncode == 1
    assert 'File "README.md", line 8' in done.stderr


def test_commands_are_found_in_blocks_and_in_spans() -> None:
    text = (
        "Call `make demo` or `make_plan(x)`.\n"
        "```sh\n# a comment\n$ A=1 make test  # all\npython -m perf run \\\n  --quick\n```\n"
    )
    assert commands(text) == ["make test", "python -m perf run --quick", "make demo"]


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    linked = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)
    named = re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|md|toml|txt|json|csv|npz|png))`", text)
    assert [name for name in [*linked, *named] if not (ROOT / name).exists()] == []
