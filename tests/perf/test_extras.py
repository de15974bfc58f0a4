"""A package of the extra that is missing ends a command with one line, never with a traceback."""

import subprocess
import sys

import pytest

from perf import extras
from tests.helpers.sources import ROOT

LINE = 'is missing: pip install "moe-megakernel[perf]"'
WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] == sys.argv[1]
        return None if hidden else self.finder.find_spec(name, path, target)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
from perf.__main__ import main
sys.exit(main(sys.argv[2:]))
"""
TINY = ["--model", "tiny", "--tokens", "8"]


@pytest.mark.parametrize(
    ("package", "argv"),
    [
        pytest.param("matplotlib", ["report", *TINY], id="report"),
        *(
            pytest.param(package, argv, id=name, marks=pytest.mark.slow)
            for name, package, argv in (
                ("plot", "matplotlib", ["simulate", *TINY, "--plot", "x.png"]),
                ("search", "tqdm", ["simulate", *TINY, "--search", "1"]),
                ("demo without tqdm", "tqdm", ["demo"]),
                ("demo without safetensors", "safetensors", ["demo"]),
            )
        ),
    ],
)
def test_a_missing_package_is_one_line(package, argv, tmp_path):
    if argv[0] == "report":
        argv = [*argv, "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, package, *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"{package} {LINE}"]


def test_what_needs_no_extra_runs_without_them():
    argv = ["simulate", *TINY]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, "matplotlib", *argv], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0


def test_measuring_needs_no_bar(monkeypatch):
    """A rented machine may have no tqdm, and what is measured there is worth more than a bar."""
    monkeypatch.setattr("perf.extras.find_spec", lambda name: None)
    with extras.progress_bar_if_any([1, 2], unit="case") as bar:
        for number in bar:
            bar.set_description(str(number))
    assert list(bar) == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("package", ["matplotlib", "tqdm"])
def test_measuring_and_reading_results_need_nothing_of_the_extra(package, tmp_path):
    rows = tmp_path / "planner.csv"
    for argv, status in (
        (["run", "--suite", "planner", "--quick", "--out", str(tmp_path)], 0),
        (["compare", str(rows), str(rows)], 0),
    ):
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT, package, *argv],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
    assert rows.exists()


def test_an_error_inside_a_package_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import no_such_module_of_anyone\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_of_anyone"):
        extras.optional("broken_package")


@pytest.mark.parametrize(
    ("package", "needs_gpu", "has_gpu", "reason"),
    [
        (None, False, False, None),
        (None, True, True, None),
        (None, True, False, "needs a GPU"),
        ("no_such_package", False, True, "no_such_package is not installed"),
        ("ast", True, True, None),
    ],
)
def test_reasons_why_something_cannot_run(package, needs_gpu, has_gpu, reason):
    assert extras.why_missing(package, needs_gpu, has_gpu) == reason
