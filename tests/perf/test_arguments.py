"""Numbers on the command line: a message instead of a prediction for nothing."""

import pytest

from perf.__main__ import main


@pytest.mark.parametrize(
    ("argv", "rule"),
    [
        (["simulate", "--tokens", "0"], "must be a whole number of at least 1, got '0'"),
        (["simulate", "--tokens", "-5"], "must be a whole number of at least 1, got '-5'"),
        (["simulate", "--search", "0"], "must be a whole number of at least 1, got '0'"),
        (["simulate", "--l2", "0"], "must be a positive number, got '0'"),
        (["simulate", "--l2", "nan"], "must be a positive number, got 'nan'"),
        (["simulate", "--l2", "fast"], "must be a positive number, got 'fast'"),
        (["tune", "--predict", "--tried", "1.5"], "must be a whole number of at least 1, got"),
        (["tune", "--predict", "--tokens", "0"], "must be a whole number of at least 1, got '0'"),
        (["report", "--tokens", "0"], "must be a whole number of at least 1, got '0'"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(argv, rule, capsys):
    with pytest.raises(SystemExit) as refusal:
        main(argv)
    assert refusal.value.code == 2
    assert rule in capsys.readouterr().err
