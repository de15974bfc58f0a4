"""The command prints predictions as such, and refuses what it cannot predict."""

import pytest

from megakernel.plan.protocol import NAMES
from perf.__main__ import main
from perf.measuring.measure import Timing
from perf.results import record
from perf.results.record import LABEL, make_row, provenance


def test_the_command_labels_its_figures_and_draws(tmp_path, capsys):
    picture = tmp_path / "t.png"
    argv = ["simulate", "--model", "tiny", "--tokens", "40", "--set", "num_workers=3"]
    assert main([*argv, "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert LABEL in out and "predicted: " in out and "num_workers=3" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_takes_measured_costs(tmp_path, capsys):
    costs = tmp_path / "timeline.csv"
    case = ("timeline", "tiny/recorded", "ours replay", 40, "clock")
    argv = ["simulate", "--model", "tiny", "--tokens", "40", "--route", "replay"]
    predicted_us = []
    for us in (3.0, 300.0):
        cost = Timing.exact(us)
        record.write([make_row(*case, f"{name} cost", "us", cost) for name in NAMES], costs)
        assert main([*argv, "--costs", str(costs)]) == 0
        out = capsys.readouterr().out
        assert f"task times measured on none at {provenance()['commit']}, {costs}" in out
        predicted_us.append(float(out.split("predicted: ")[1].split(" us")[0]))
    # FFN1, FFN2 and combine wait for one another.
    assert predicted_us[1] - predicted_us[0] == pytest.approx(3 * 297, abs=2)


def test_the_command_searches(capsys):
    argv = ["simulate", "--model", "tiny", "--tokens", "40", "--route", "replay"]
    assert main([*argv, "--search", "2"]) == 0
    assert capsys.readouterr().out.count(" us predicted") == 2


def test_costs_of_another_case_are_refused(tmp_path, capsys):
    costs = tmp_path / "timeline.csv"
    case = ("timeline", "tiny/recorded", "ours live", 8, "clock")
    record.write([make_row(*case, "FFN1 cost", "us", Timing.exact(3.0))], costs)
    argv = ["simulate", "--model", "tiny", "--costs", str(costs)]
    assert main([*argv, "--tokens", "40"]) == 2
    assert "--costs must hold the cost of tasks" in capsys.readouterr().err
    assert main([*argv, "--tokens", "8"]) == 2  # one kind of task of six
    assert "us_of_kind must have every kind of task" in capsys.readouterr().err


def test_a_backward_is_predicted_with_what_it_saves_and_how_gradients_are_kept(capsys):
    figures = {}
    for options in (
        [], ["--save", "nothing"], ["--gradients", "added"], ["--gpu", "H100"],
    ):  # fmt: skip
        argv = ["simulate", "--model", "OLMoE", "--tokens", "512", "--pass", "backward", *options]
        assert main(argv) == 0
        text = capsys.readouterr().out
        assert LABEL in text and "live, backward, saves " in text and "dGateUp" in text
        figures[" ".join(options)] = float(text.split("predicted: ")[1].split(" us")[0])
    assert "assumed for one H100" in text
    assert min(figures["--save nothing"], figures["--gradients added"]) > figures[""]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--pass", "backward", "--search", "1"], "--pass backward must be without --search"),
        (["--pass", "backward", "--costs", "x"], "--pass backward must be without --search and"),
        (["--pass", "backward", "--route", "given"], "must be with --route live or replay"),
        (["--save", "nothing"], "--save and --gradients must be with --pass backward"),
        (["--gradients", "added"], "--save and --gradients must be with --pass backward"),
        (["--set", "colour=3"], "--set must be FIELD=N"),
        (["--set", "block_rows=7"], "block_rows must be a power of two"),
        (["--scenario", "trace"], "the trace is of 32 experts"),
        (["--costs", "nowhere.csv"], "nowhere.csv"),
        (["--costs", "x.csv", "--set", "step=32"], "--costs must be without --config and --set"),
        (["--search", "1", "--plot", "x.png"], "--search must be without --costs and --plot"),
        (["--plot", "x.xyz"], "--plot must end in one of"),
    ],
    ids=[
        "search-of-a-backward",
        "measured-backward",
        "backward-of-given-routing",
        "saves-of-a-forward",
        "gradients-of-a-forward",
        "unknown-field",
        "illegal-value",
        "no-such-trace",
        "no-such-file",
        "another-config",
        "search-and-plot",
        "no-picture",
    ],
)
def test_bad_arguments_end_with_a_reason(argv, words, capsys):
    assert main(["simulate", "--model", "tiny", "--tokens", "8", *argv]) == 2
    assert words in capsys.readouterr().err


def test_a_slower_l2_is_predicted_slower(capsys):
    figures = []
    for rate in ("2", "9"):
        assert main(["simulate", "--model", "OLMoE", "--tokens", "4096", "--l2", rate]) == 0
        text = capsys.readouterr().out
        figures.append(float(text.split("predicted: ")[1].split(" us")[0]))
    assert figures[0] > 1.5 * figures[1]
