"""Each example is one short file that runs by itself and prints what its docstring promises."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.sources import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MOST_LINES = 59
QUICK = {"layer", "plan"}  # of `make test`


def promised(source: str) -> list[str]:
    """Return the lines under "Prints:" in a script's docstring, "..." standing for anything."""
    docstring = ast.get_docstring(ast.parse(source)) or ""
    return docstring.partition("Prints:\n")[2].replace("    ", "").splitlines()


def keeps(promise: list[str], printed: str) -> bool:
    """Whether a script printed what it promises, and nothing else."""
    lines = (".+".join(map(re.escape, line.split("..."))) for line in promise)
    return re.fullmatch("\n".join(lines) + "\n", printed) is not None


def run_example(path: Path) -> subprocess.CompletedProcess[str]:
    """Run a script as a reader would, on a machine without a GPU that has set nothing up."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(path)],
        env=clean | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else pytest.mark.slow)
        for path in EXAMPLES
    ],
)
def test_an_example_prints_what_it_promises(path: Path) -> None:
    promise = promised(path.read_text())
    done = run_example(path)
    assert done.returncode == 0, done.stderr
    assert promise and keeps(promise, done.stdout), done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_fits_on_a_screen(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_no_example_hides_a_package() -> None:
    """A script's folder is looked through first when it imports."""
    hidden = {path.stem for path in EXAMPLES} & {"torch", "transformers", "triton", "numpy"}
    assert hidden == set()


@pytest.mark.parametrize(
    ("printed", "kept"),
    [("a 1 b\nc\n", True), ("a b\nc\n", False), ("a 1 b\n", False), ("a 1 b\nc\nd\n", False)],
)
def test_a_promise_can_be_broken(printed: str, kept: bool) -> None:
    assert keeps(["a ... b", "c"], printed) is kept
