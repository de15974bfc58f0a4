"""Another check while the tests run: ``pytest -p tests.helpers.beside --beside mypy``.

What it says stands above pytest's closing line, and its failure fails the run.
"""

import subprocess
import sys

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the modules to run."""
    parser.addoption(
        "--beside",
        action="append",
        default=[],
        metavar="MODULE",
        help="run python -m MODULE while the tests run, and fail with it",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start in the process that reports, not in its workers."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Beside(config.getoption("beside")))


class Beside:
    """The programs, from start to what they said."""

    def __init__(self, modules: list[str]) -> None:
        """Remember what to run."""
        self.modules = modules
        self.running: dict[str, subprocess.Popen[str]] = {}
        self.outputs: dict[str, str] = {}

    def pytest_sessionstart(self) -> None:
        """Start them."""
        for module in self.modules:
            self.running[module] = subprocess.Popen(
                [sys.executable, "-m", module],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Wait for them; good tests beside a bad program are a failed run."""
        for module, program in self.running.items():
            self.outputs[module], _ = program.communicate()
            if program.returncode and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print what they said."""
        for module, output in self.outputs.items():
            failed = "failed" if self.running[module].returncode else "passed"
            terminalreporter.write_line(f"python -m {module} {failed}: {output.strip()}")
