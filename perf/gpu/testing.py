"""The GPU's tests, in this process, with each failure printed when it happens."""

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from perf.gpu.child import Context
from perf.sources import ROOT

# Under the sanitizer the smallest case takes minutes, and Inductor compiles for half of one.
DESELECTED = {
    "test_the_sanitizer_finds_nothing": "test_gpu_launch.py",
    "test_inductor_compiles_the_whole_layer": "test_gpu_graphs.py",
    "test_torch_compile_takes_forward_and_backward": "test_gpu_training.py",
}
# Less than what the supervisor bears in silence: pytest says where a test hangs.
TEST_S = 35
MOST_FAILURES = 8
REHEARSED = "one-token or every_case_of_the_interpreter and plain"
SHOWN_LINES = 20


class Reporter:
    """Counts outcomes, and prints what went wrong at once: a killed run prints no summary."""

    def __init__(self, context: Context) -> None:
        """Begin with nothing."""
        self.context = context
        self.outcomes: dict[str, int] = {}
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Hear of a test's setup, call and teardown."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] = self.outcomes.get(report.outcome, 0) + 1
            self.context.say(f"{report.outcome} {report.nodeid} {report.duration:.1f} s")
            self.context.keep("tests", self.outcomes)
        if report.outcome == "failed":
            lines = str(report.longrepr).splitlines()
            self.failures.append(f"{report.nodeid}: {why(lines)}")
            self.context.say("\n".join(lines[-SHOWN_LINES:]))
            self.context.note(f"failed {self.failures[-1]}")


def why(lines: list[str]) -> str:
    """Return the line of a failure that says what it is."""
    errors = [line[1:].strip() for line in lines if re.match(r"E\s", line)]
    return (errors or lines[-1:] or ["no word"])[0]


def run_tests(context: Context) -> dict:
    """Run them.

    Raises:
        AssertionError: with the first failures.
        RuntimeError: if pytest could not run them.
    """
    import pytest

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    before = set(compiled())
    reporter = Reporter(context)
    status = pytest.main(command(context.rehearse), plugins=[reporter])
    counts = ", ".join(f"{count} {outcome}" for outcome, count in reporter.outcomes.items())
    late = len(set(compiled()) - before)
    text = f"{counts}; {late} kernels were compiled meanwhile"
    if reporter.failures:
        raise AssertionError("\n".join([text, *reporter.failures]))
    if status:
        raise RuntimeError(f"pytest exited with {int(status)}: {text}")
    return {"text": text} | reporter.outcomes


def command(rehearse: bool) -> list[str]:
    """Return pytest's arguments; other packages' plugins and warnings are no concern here."""
    given = ["-v", "--tb=short", f"--maxfail={MOST_FAILURES}", "-p", "no:benchmark",
             "-W", "default", "--rootdir", str(ROOT)]  # fmt: skip
    if find_spec("pytest_timeout"):
        given += ["-p", "pytest_timeout", f"--timeout={TEST_S}", "--timeout-method=thread"]
    for name, module in DESELECTED.items():
        given += ["--deselect", f"tests/gpu/{module}::{name}"]
    if rehearse:
        given += ["--interpret-gpu-tests", "-k", REHEARSED]
    return [*given, "-m", "gpu and not slow", str(ROOT / "tests" / "gpu")]


def compiled() -> Iterator[Path]:
    """Yield the compiled kernels in Triton's cache."""
    folder = os.environ.get("TRITON_CACHE_DIR")
    if folder:
        for kernel in ("moe_kernel", "backward_kernel"):
            yield from Path(folder).glob(f"*/{kernel}.cubin")
