"""Weaken device functions on purpose, in this process, for the time of a test."""

import importlib
import inspect
import itertools
import linecache
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import triton

_numbers = itertools.count()


@contextmanager
def mutated(place: str, old: str, new: str) -> Iterator[None]:
    """Replace a text in the source of a device function, wherever the function is imported.

    Args:
        place: dotted name of the function.
        old: must occur exactly once, so that a mutant which no longer applies says so.
        new: takes its place.
    """
    module_name, name = place.rsplit(".", 1)
    module = importlib.import_module(module_name)
    original = getattr(module, name)
    source = source_of(original)
    count = source.count(old)
    assert count == 1, f"{place} holds {old!r} {count} times, not once"
    changed = device_function(module, original, source.replace(old, new))
    with ExitStack() as patches:
        for user in users_of(original):
            patches.enter_context(mock.patch.object(user, name, changed))
        yield


def source_of(function: Any) -> str:
    """Return the text of a device function, mutated or not."""
    return inspect.getsource(function.fn)


def device_function(module: ModuleType, original: Any, source: str) -> Any:
    """Compile the text of a device function, with the globals and options of ``original``."""
    file = f"<mutant {next(_numbers)} of {module.__name__}>"
    # The interpreter rewrites functions from their text, which it looks up by the file's name.
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    namespace: dict[str, Any] = {}
    body = source[source.index("def ") :]
    padding = "\n" * source[: source.index("def ")].count("\n")  # keeps the line numbers
    exec(compile(padding + body, file, "exec"), vars(module), namespace)
    function = namespace[original.fn.__name__]
    function.__module__ = module.__name__
    return triton.jit(**original.kwargs)(function)


def users_of(function: Any) -> list[ModuleType]:
    """Return the modules that hold a function under its own name."""
    name = function.fn.__name__
    return [
        module
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType) and vars(module).get(name) is function
    ]
