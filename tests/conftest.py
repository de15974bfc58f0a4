"""Where tests run, from which seeds, and on what memory.

Kernels run on the GPU under ``pytest -m gpu``, which selects the tests made for it, and in
Triton's interpreter otherwise. That has to be chosen before anything imports Triton, so a run is
one or the other; tests of balance and reference import it at no time.
"""

import importlib
import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib import metadata

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # a second thread may change the order of a sum

# An example that needs a compilation or a cold cache is slow once, not wrong.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

POISON = 0xFF  # as bytes of a scratch tensor: NaN in every float type, -1 in every integer


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the bodies of the GPU tests run where there is no GPU."""
    parser.addoption(
        "--interpret-gpu-tests",
        action="store_true",
        help="run tests marked gpu in the interpreter, on shrunken shapes, as far as they go",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose the interpreter, unless this run selects the GPU's tests and can run them."""
    selected = config.getoption("markexpr")
    selects_gpu = "gpu" in selected and "not gpu" not in selected
    if not (selects_gpu and torch.cuda.is_available()):
        os.environ.setdefault("TRITON_INTERPRET", "1")


SHOWN = ("torch", "triton", "numpy", "transformers", "hypothesis")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Say which versions run, once, also under ``-q``, which hides pytest's own header."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not hasattr(session.config, "workerinput"):
        versions = ", ".join(f"{name} {version_of(name)}" for name in SHOWN)
        reporter.write_line(f"Python {platform.python_version()}, {versions}")


def version_of(distribution: str) -> str:
    """Return an installed version without importing it, or what is missing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"


def why_no_gpu() -> str | None:
    """Return why kernels can not run on a GPU here, or None."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "kernels are interpreted in this run: select the GPU's tests with -m gpu"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests of the GPU with the reason why they can not run."""
    reason = why_no_gpu()
    if reason is None or config.getoption("--interpret-gpu-tests"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the current GPU, or the CPU when they are interpreted."""
    if why_no_gpu():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The GPU, for what no interpreter has: graphs, streams, profiles, allocation counts."""
    if reason := why_no_gpu():
        pytest.skip(reason)
    return device


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give every test the same random numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fast_interpreter() -> None:
    """Spare Triton's interpreter what it does again and again, as soon as anything imports it."""
    if "triton.runtime.interpreter" in sys.modules:
        importlib.import_module("tests.helpers.interpreter").make_fast()


@pytest.fixture(autouse=True)
def poisoned_scratch() -> Iterator[None]:
    """Fill the kernel's scratch with NaN before each test, and when it grows.

    A launch that reads scratch which it has not written then shows in its output.
    """
    module = sys.modules.get("megakernel.launch.workspace")
    if module is None:  # a test of a package that must not need Triton
        yield
        return
    module.fill_all_scratch(POISON)
    grow = module.Workspace._grow
    module.Workspace._grow = poison_after(grow)
    yield
    module.Workspace._grow = grow


def poison_after(grow: Callable[..., None]) -> Callable[..., None]:
    """Return ``grow`` followed by the poisoning of an arena that it replaced."""

    def grow_poisoned(workspace, arena_bytes: int, counter_words: int) -> None:
        old_arena = workspace.arena
        grow(workspace, arena_bytes, counter_words)
        if workspace.arena is not old_arena:
            workspace.fill_scratch(POISON)

    return grow_poisoned
