"""Packages that a plain install lacks: the planner plans without them, pictures need them."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

INSTALL = 'pip install "moe-megakernel[perf]"'


class MissingExtraError(ImportError):
    """A package of the extra ``perf`` is needed and not installed."""


def need(package: str, purpose: str) -> Any:
    """Import a package now, so that nothing is worked out in vain.

    Raises:
        MissingExtraError: it is not installed; the message says how to get it.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{purpose} needs {package}: {INSTALL}") from error


class NoBar:
    """Stands for a progress bar where none is shown."""

    def update(self, steps: int = 1) -> None:
        """Show nothing."""


@contextmanager
def progress_bar(total: int | None, unit: str, *, quiet: bool, note: Any = print) -> Iterator[Any]:
    """A bar with ``update(steps)``; without tqdm none, after one line that says so.

    Args:
        total: steps to come; None when unknown.
        unit: what a step is.
        quiet: show neither bar nor line.
        note: called with the line.
    """
    if quiet:
        yield NoBar()
        return
    try:
        tqdm = need("tqdm", "a progress bar").tqdm
    except MissingExtraError as error:
        note(str(error))
        yield NoBar()
        return
    with tqdm(total=total, unit=f" {unit}", leave=False, disable=None) as bar:
        yield bar
