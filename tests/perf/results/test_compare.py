"""The limit: what fails, what is noise, and what cannot be compared."""

import pytest

from perf.__main__ import main
from perf.measuring.measure import Timing
from perf.results import record
from perf.results.compare import compare, parse_percent
from perf.results.record import make_row


def row(us, provider="ours live", band=0.01, mode="graph", unit="us", T=8, **changes):
    timing = Timing(us, us * (1 - band), us * (1 + band), 9)
    made = make_row("forward", "tiny/uniform", provider, T, mode, "time", unit, timing)
    return record.Row(**{**made.__dict__, **changes})


def test_equal_results_pass():
    found = compare([row(100)], [row(100)], 0.05)
    assert not found.worse and not found.lost and found.changes[0].growth == 0


@pytest.mark.parametrize(
    "after, fails",
    [
        (row(104), False),
        (row(110), True),
        (row(110, band=0.2), False),
        (row(50), False),
    ],
    ids=["within-the-limit", "slower", "slower-within-noise", "faster"],
)
def test_only_a_clear_loss_fails(after, fails):
    assert bool(compare([row(100)], [after], 0.05).worse) is fails


def test_a_slower_peer_is_shown_but_does_not_fail():
    found = compare([row(100, "grouped_mm")], [row(200, "grouped_mm")], 0.05)
    assert found.changes[0].growth == 1 and not found.worse


def test_a_figure_of_ours_that_vanished_fails():
    found = compare([row(100), row(100, T=16)], [row(100)], 0.05)
    assert [lost.T for lost in found.lost] == [16]


def test_a_second_launch_fails():
    before, after = (row(n, band=0, mode="counted", unit="launches") for n in (1, 2))
    assert compare([before], [after], 0.05).worse


def test_an_allocation_where_there_was_none_fails():
    before, after = (row(n, band=0, mode="counted", unit="tensors") for n in (0, 1))
    assert compare([before], [after], 0.05).worse


def test_a_slower_prediction_fails():
    before, after = (row(us, "1 two workers per SM", 0, "predicted") for us in (100, 120))
    assert compare([before], [after], 0.05).worse


def test_different_gpus_are_not_compared():
    with pytest.raises(ValueError, match="must come from one kind of GPU, got"):
        compare([row(100, gpu="H100")], [row(100, gpu="H200")], 0.05)


@pytest.mark.parametrize("text, value", [("5%", 0.05), ("0.1", 0.1), ("0", 0.0)])
def test_limits_are_read(text, value):
    assert parse_percent(text) == pytest.approx(value)


def test_the_command_passes_and_fails(tmp_path, capsys):
    before, same, slower = (tmp_path / name for name in ("a.csv", "b.csv", "c.csv"))
    record.write([row(100)], before)
    record.write([row(100)], same)
    record.write([row(130)], slower)
    assert main(["compare", str(before), str(same), "--fail", "5%"]) == 0
    assert main(["compare", str(before), str(slower), "--fail", "5%"]) == 1
    assert "+30.0%" in capsys.readouterr().err
    assert main(["compare", str(before), str(slower), "--fail", "40%"]) == 0


def test_nothing_to_compare_is_an_error(tmp_path, capsys):
    before, other = tmp_path / "a.csv", tmp_path / "b.csv"
    record.write([row(100)], before)
    record.write([row(100, T=99)], other)
    assert main(["compare", str(before), str(other)]) == 2
    assert main(["compare", str(before), str(tmp_path / "none.csv")]) == 2
    assert "no figure in common" in capsys.readouterr().err
