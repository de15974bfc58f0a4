import shutil

import pytest
import torch

from perf.__main__ import main
from perf.demo.files import CARD, DATA, WEIGHTS
from perf.demo.model import DemoModel, ModelConfig, save_model

SECTIONS = (
    "1. Rollouts", "2. Training side", "3. Recorded load", "4. Training-side forward",
    "5. Training step under replay",
)  # fmt: skip

ALONE = ("--processes", "1")


@pytest.fixture
def untrained(tmp_path):
    """A folder with one small layer of random experts."""
    torch.manual_seed(0)
    sizes = ModelConfig(
        num_layers=1, hidden=16, num_heads=2, num_experts=8, top_k=2, intermediate=16
    )
    save_model(DemoModel(sizes), tmp_path / WEIGHTS)
    shutil.copy(DATA / CARD, tmp_path / CARD)
    return tmp_path


def check_demo(out, picture, launches, trained):
    assert all(section in out for section in SECTIONS)
    assert out.count("the same bits") == 2
    assert out.count(launches) == 3
    assert out.count(f" {trained} | {trained}\n") == 3
    assert "DIFFERENT" not in out and "loss" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_demo_on_an_untrained_model(untrained, capsys):
    picture = untrained / "pictures" / "demo.png"
    arguments = ["--samples", "2", "--new-bytes", "2", "--out", str(picture), *ALONE]
    assert main(["demo", "--model", str(untrained), *arguments]) == 0
    check_demo(capsys.readouterr().out, picture, launches="  1   ", trained="1+1")


@pytest.mark.slow
def test_the_demo_as_make_demo_runs_it(tmp_path, capsys):
    picture = tmp_path / "demo.png"
    assert main(["demo", "--out", str(picture)]) == 0
    check_demo(capsys.readouterr().out, picture, launches="  1 1 1   ", trained="1+1 1+1 1+1")


def test_a_failure_is_the_exit_status(untrained, capsys, monkeypatch):
    monkeypatch.setattr("perf.demo.command.find_failures", lambda forwards: ["the sky fell"])
    monkeypatch.setattr("perf.demo.command.train", lambda *given: ["the earth shook"])
    picture = untrained / "demo.png"
    arguments = ["--samples", "1", "--new-bytes", "1", "--out", str(picture), *ALONE]
    assert main(["demo", "--model", str(untrained), *arguments]) == 1
    failed = capsys.readouterr().err
    assert "FAILED: the sky fell" in failed and "FAILED: the earth shook" in failed


@pytest.mark.parametrize("argv", [[], ["nonsense"]], ids=["no-command", "unknown-command"])
def test_a_missing_or_unknown_command_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as refusal:
        main(argv)
    assert refusal.value.code == 2
    assert "demo" in capsys.readouterr().err
