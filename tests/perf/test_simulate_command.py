"""The command prints predictions as such, and refuses what it cannot predict."""

import json

import pytest

from megakernel.schedule import NAMES
from perf.__main__ import main
from perf.simulate import LABEL


def test_the_command_labels_its_figures_and_draws(tmp_path, capsys):
    picture = tmp_path / "t.png"
    argv = ["simulate", "--model", "tiny", "--tokens", "40", "--set", "num_workers=3"]
    assert main([*argv, "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert LABEL in out and "predicted: " in out and "num_workers=3" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_takes_measured_costs_and_searches(tmp_path, capsys):
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps(dict.fromkeys(NAMES, 3.0)))
    argv = ["simulate", "--model", "tiny", "--tokens", "40", "--mode", "replay"]
    assert main([*argv, "--costs", str(costs)]) == 0
    assert main([*argv, "--search", "2"]) == 0
    assert capsys.readouterr().out.count(" us predicted") == 2


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--set", "colour=3"], "--set must be FIELD=N"),
        (["--set", "block_rows=7"], "block_rows must be a power of two"),
        (["--scenario", "gpt-oss"], "the trace is of 32 experts"),
    ],
    ids=["unknown-field", "illegal-value", "no-such-trace"],
)
def test_bad_arguments_end_with_a_reason(argv, words, capsys):
    assert main(["simulate", "--model", "tiny", "--tokens", "8", *argv]) == 2
    assert words in capsys.readouterr().err


def test_a_slower_l2_is_never_predicted_faster(capsys):
    figures = []
    for rate in ("5.5", "9"):
        assert main(["simulate", "--model", "OLMoE", "--tokens", "256", "--l2", rate]) == 0
        text = capsys.readouterr().out
        figures.append(float(text.split("predicted: ")[1].split(" us")[0]))
    assert figures[0] >= figures[1]
