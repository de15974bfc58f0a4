"""One command line: every command is there, explained, and refuses what it does not know."""

import subprocess
import sys
from importlib import import_module

import pytest

from perf.__main__ import MODULE_OF_COMMAND, main
from perf.sources import first_line, parse
from tests.helpers.sources import ROOT

COMMANDS = {"demo", "list", "run", "compare", "report", "tune", "simulate"}
HEAVY = {"torch", "numpy", "triton", "matplotlib", "tqdm", "megakernel", "balance", "reference"}


def test_the_commands_are_the_agreed_ones():
    assert set(MODULE_OF_COMMAND) >= COMMANDS


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    assert len(capsys.readouterr().out) > 100


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_lines_are_those_of_the_modules(command, capsys):
    module = import_module(MODULE_OF_COMMAND[command])
    line = first_line(parse(MODULE_OF_COMMAND[command]))
    assert line and module.__doc__.startswith(line)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert line[:40] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "argv",
    [["run"], ["run", "--suite", "sunny"], ["compare"], ["simulate", "--model", "none"]],
    ids=["no-suite", "unknown-suite", "nothing-to-compare", "unknown-model"],
)
def test_unknown_arguments_are_refused(argv):
    with pytest.raises(SystemExit) as refusal:
        main(argv)
    assert refusal.value.code == 2


LOADED = """
import sys
from perf.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print("LOADED", *sys.modules)
"""


@pytest.mark.parametrize(
    "argv", [["--help"], ["list"], ["nonsense"]], ids=["help", "list", "unknown-command"]
)
def test_help_and_list_load_nothing_heavy(argv):
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *argv], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split("LOADED")[1].split())
    assert "argparse" in loaded
    assert not loaded & HEAVY
