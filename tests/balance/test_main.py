"""How the command line is called: its names, its help, and what they import."""

import subprocess
import sys
from importlib.metadata import version

import pytest

from balance.__main__ import COMMANDS, main


def output_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_module_runs_as_a_command():
    command = [sys.executable, "-m", "balance", "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("usage: python -m balance ")
    assert "python -m balance compare trace.npz" in done.stdout


def test_the_installed_command_calls_itself_by_its_name(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/moe-balance", "--help"])
    text = output_of(capsys, "--help")
    assert text.startswith("usage: moe-balance ")
    assert "moe-balance compare trace.npz" in text and "python -m" not in text


def test_every_command_has_help(capsys):
    for name, purpose in COMMANDS.items():
        assert " ".join(purpose.split()) in " ".join(output_of(capsys, name, "--help").split())


def test_version(capsys):
    assert output_of(capsys, "--version") == f"moe-megakernel {version('moe-megakernel')}\n"


def imported_by(code):
    """Packages that a fresh interpreter has imported after some code."""
    code = f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_imports_nothing_heavy():
    # It answers in a tenth of a second; numpy would take it to a third, torch to two.
    code = """
from balance.__main__ import main
try:
    main(["compare", "--help"])
except SystemExit:
    pass"""
    assert not imported_by(code) & {"numpy", "torch", "scipy", "matplotlib", "tqdm"}


def test_import_is_light():
    code = "import balance.baselines, balance.commands, balance.formats, balance.planner"
    assert not imported_by(code) & {"scipy", "matplotlib", "triton"}
