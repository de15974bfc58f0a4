"""The command line of the run on a GPU, and what it refuses."""

from pathlib import Path

import pytest

from perf.gpu import __main__ as door
from perf.gpu.__main__ import main
from perf.gpu.plans import FIRST
from tests.helpers.sources import ROOT


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list:
    """What would have been run."""
    found: list = []
    monkeypatch.setattr(door, "run_plan", lambda *given: found.append(given) or 0)
    return found


def test_without_a_verb_it_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "{first,second}" in capsys.readouterr().err


def test_a_plan_runs_in_a_folder_of_its_own(started: list, tmp_path: Path) -> None:
    (tmp_path / "work" / "first").mkdir(parents=True)
    (tmp_path / "work" / "first" / "old").write_text("of a run before")
    assert main(["first", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]) == 0
    plan, setting, out = started[0]
    assert plan is FIRST and out == tmp_path / "out" and out.is_dir()
    assert setting.work == tmp_path / "work" / "first" and not list(setting.work.iterdir())
    assert setting.cache == tmp_path / "work" / "triton-cache"
    assert not setting.rehearse and setting.faults == {}


def test_faults_are_planted_by_step(started: list, tmp_path: Path) -> None:
    argv = ["first", "--out", str(tmp_path), "--work", str(tmp_path / "w"), "--rehearse"]
    assert main([*argv, "--plant", "hang@smallest"]) == 0
    plan, setting, _ = started[0]
    assert setting.rehearse and setting.faults == {"smallest": "hang"}
    assert plan.steps[0].limit_s > FIRST.steps[0].limit_s


@pytest.mark.parametrize("fault", ["hang", "sleep@smallest", "hang@"])
def test_a_fault_that_is_none_is_refused(
    fault: str, started: list, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["first", "--plant", fault])
    assert f"got '{fault}'" in capsys.readouterr().err and not started


def test_a_fault_in_no_step_is_refused(
    started: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["second", "--out", str(tmp_path / "o"), "--work", str(tmp_path / "w")]
    assert main([*argv, "--plant", "hang@smallest"]) == 2
    assert "--plant must name a step of second, got ['smallest']" in capsys.readouterr().err
    assert not started


def test_an_archive_that_is_none_is_refused(
    started: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["second", "--out", str(tmp_path / "o"), "--work", str(tmp_path / "w")]
    assert main([*argv, "--cache", str(tmp_path / "none.tgz")]) == 2
    assert "--cache must be the archive of a run" in capsys.readouterr().err and not started


def test_make_gpu_needs_nothing_that_is_not_there() -> None:
    """A machine with a GPU may have no network: no environment is made for this target."""
    makefile = (ROOT / "Makefile").read_text()
    recipe = makefile.split("\ngpu:")[1].split("\n\n")[0]
    assert recipe.splitlines() == [
        "",
        "\t$(PYTHON) -m perf.gpu first --out out/gpu",
        "\t$(PYTHON) -m perf.gpu second --out out/gpu --cache out/gpu/first.tgz",
    ]


def test_the_supervisor_imports_no_torch() -> None:
    """It must outlive whatever happens to the GPU, and start at once."""
    import subprocess
    import sys

    code = "import sys, perf.gpu.__main__; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert "perf.gpu.run" in loaded
    assert not {"torch", "triton", "numpy", "megakernel"} & set(loaded)
