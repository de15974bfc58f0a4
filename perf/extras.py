"""Packages that need not be here: what the ``perf`` extra brings, and other people's layers.

The extra's are imported where they are used, and a missing one ends the command with a line.
"""

import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

EXTRA = "moe-megakernel[perf]"


def optional(name: str) -> Any:
    """Import a module of an optional package, so that only the command that needs it ends.

    Args:
        name: dotted name of the module.

    Raises:
        SystemExit: with status 2 if its package is not installed; the line on stderr names the
            extra that brings it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:  # the package is here, and something else is not
            raise
        print(f'{error.name} is missing: pip install "{EXTRA}"', file=sys.stderr)
        raise SystemExit(2) from None


def progress_bar(*given: Any, **options: Any) -> Any:
    """Return a bar of tqdm that leaves no line behind; arguments as tqdm's own."""
    return optional("tqdm").tqdm(*given, leave=False, **options)


class QuietBar:
    """What stands for a bar where tqdm is missing and nothing hangs on seeing one."""

    def __init__(self, wanted: Iterable[Any]) -> None:
        """Take what is gone through."""
        self.wanted = wanted

    def __enter__(self) -> "QuietBar":
        """Show nothing."""
        return self

    def __exit__(self, *error: object) -> None:
        """Hide nothing."""

    def __iter__(self) -> Iterator[Any]:
        """Go through it."""
        return iter(self.wanted)

    def set_description(self, text: str) -> None:
        """Say nothing."""


def progress_bar_if_any(wanted: Iterable[Any], **options: Any) -> Any:
    """Return a bar of tqdm over something, a quiet one where there is no tqdm.

    Measuring needs nothing of the extra: on a rented machine it may be missing.
    """
    return progress_bar(wanted, **options) if find_spec("tqdm") else QuietBar(wanted)


def why_missing(package: str | None, needs_gpu: bool, has_gpu: bool) -> str | None:
    """Return why something cannot run here, or None.

    Args:
        package: what it imports, None for what is always there.
        needs_gpu: whether it cannot run on a CPU.
        has_gpu: whether there is one.
    """
    if needs_gpu and not has_gpu:
        return "needs a GPU"
    if package is not None and find_spec(package) is None:
        return f"{package} is not installed"
    return None
