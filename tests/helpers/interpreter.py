"""Triton's interpreter in half of its time, with the same bits and the same refusals.

- It replaces some 200 members of ``triton.language`` when a launch starts, and again at every call
  of a nested device function, where almost nothing is left to replace. Here a launch keeps a list
  of what is replaced already, and undoes it at its end.
- It computes for every sum, difference and product of integers whether it overflows, and asks only
  then whether anybody wants to know, which is so in debug mode alone. Here it asks first.
- It makes a table of 18 types whenever it looks up one. Here it remembers what it found.
"""

import importlib
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import triton
import triton.language as tl

# What is replaced, as triton 3.6 to 3.9 have it.
NEEDED = ("_patch_lang", "GridExecutor", "interpreter_semantic", "_get_np_dtype")


class NothingPatched:
    """Stands for Triton's record of what a call replaced, when its launch keeps that itself."""

    def restore(self) -> None:
        """Leave the language as it is: the launch goes on."""


class PatchedOnce:
    """Stands in for the interpreter's ``_patch_lang`` and for the call of its ``GridExecutor``.

    Attributes:
        launches: how many launches there were.
        patches: how often the language was replaced; a launch may do it once for each of the
            modules ``triton.language`` and ``triton.language.core`` that its functions see.
    """

    def __init__(self, interpreter: ModuleType) -> None:
        """Remember what the interpreter does by itself."""
        self.interpreter = interpreter
        self.patch: Callable[[FunctionType], Any] = interpreter._patch_lang
        self.execute: Callable[..., None] = interpreter.GridExecutor.__call__
        self.launches = self.patches = 0
        self._in_launch = False
        self._scopes: list[Any] = []
        self._replaced: set[str] = set()
        self._languages: dict[FunctionType, frozenset[str]] = {}

    def install(self) -> None:
        """Take the place of both in the interpreter."""
        self.interpreter._patch_lang = self.patch_once
        # A plain function: as an attribute of the class it must bind its instance.
        self.interpreter.GridExecutor.__call__ = lambda grid, *args, **options: self.launch(
            grid, *args, **options
        )

    def uninstall(self) -> None:
        """Give the interpreter back what it had."""
        self.interpreter._patch_lang = self.patch
        self.interpreter.GridExecutor.__call__ = self.execute

    def launch(self, grid: Any, *arguments: object, **options: object) -> None:
        """Run a launch, and undo all that it replaced, whether it ends well or not."""
        if self._in_launch:
            raise RuntimeError("a launch inside a launch: the outer one would lose its language")
        self.launches += 1
        self._in_launch = True
        try:
            self.execute(grid, *arguments, **options)
        finally:
            self._in_launch = False
            while self._scopes:
                self._scopes.pop().restore()
            self._replaced.clear()

    def patch_once(self, function: FunctionType) -> Any:
        """Replace what a function sees of the language, unless its launch has done so."""
        if not self._in_launch:  # a device function called by itself
            return self.patch(function)
        languages = self.languages_of(function)
        if not languages <= self._replaced:
            self.patches += 1
            self._replaced |= languages
            self._scopes.append(self.patch(function))
        return NothingPatched()

    def languages_of(self, function: FunctionType) -> frozenset[str]:
        """Name the modules of the language among a function's globals: those the patch finds."""
        if function not in self._languages:
            seen = [value for value in function.__globals__.values() if inspect.ismodule(value)]
            names = (module.__name__ for module in seen if module in (tl, tl.core))
            self._languages[function] = frozenset(names)
        return self._languages[function]


def when_debugged(check: Callable[..., None]) -> Callable[..., None]:
    """Return a check that asks first whether its answer is used."""

    def check_when_debugged(semantic: Any, *operands: object) -> None:
        if semantic.builder.options.debug:
            check(semantic, *operands)

    return check_when_debugged


def remembered(look_up: Callable[[tl.dtype], np.dtype]) -> Callable[[tl.dtype], np.dtype]:
    """Return a look-up that asks once per type of element; pointers are all alike to numpy."""
    found: dict[str, np.dtype] = {}

    def look_up_once(ty: tl.dtype) -> np.dtype:
        name = ty.scalar.name
        if name not in found:
            found[name] = look_up(ty)
        return found[name]

    return look_up_once


def make_fast() -> PatchedOnce:
    """Replace the three in this process at the first call; return what counts the patches."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    installed = getattr(interpreter, "_patched_once", None)
    if installed is None:
        check_known(interpreter)
        installed = PatchedOnce(interpreter)
        installed.install()
        semantic = interpreter.interpreter_semantic
        check = when_debugged(type(semantic).binary_op_sanitize_overflow_impl)
        semantic.binary_op_sanitize_overflow_impl = MethodType(check, semantic)
        interpreter._get_np_dtype = remembered(interpreter._get_np_dtype)
        interpreter._patched_once = installed  # type: ignore[attr-defined]
    return installed


def check_known(interpreter: ModuleType) -> None:
    """Refuse an interpreter that has another inside, by name."""
    missing = [name for name in NEEDED if not hasattr(interpreter, name)]
    semantic = getattr(interpreter, "interpreter_semantic", None)
    if not hasattr(semantic, "binary_op_sanitize_overflow_impl"):
        missing.append("binary_op_sanitize_overflow_impl")
    if missing:
        raise RuntimeError(
            f"the interpreter of triton {triton.__version__} has no {', '.join(missing)}: "
            "see what tests/helpers/interpreter.py replaces, and what stands there now"
        )
