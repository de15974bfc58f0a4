"""One command line: every command is there, explained, and refuses what it does not know."""

import pytest

from perf.__main__ import MODULE_OF_COMMAND, main

COMMANDS = {"demo", "list", "run", "compare", "report", "tune", "simulate"}


def test_the_commands_are_the_agreed_ones():
    assert set(MODULE_OF_COMMAND) >= COMMANDS


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    assert len(capsys.readouterr().out) > 100


@pytest.mark.parametrize(
    "argv",
    [["run"], ["run", "--suite", "sunny"], ["compare"], ["simulate", "--model", "none"]],
    ids=["no-suite", "unknown-suite", "nothing-to-compare", "unknown-model"],
)
def test_unknown_arguments_are_refused(argv):
    with pytest.raises(SystemExit) as refusal:
        main(argv)
    assert refusal.value.code == 2
