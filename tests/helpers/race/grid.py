"""Stand in for the interpreter's loop over programs, and see the kernel's arguments."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from unittest import mock

from triton.runtime import interpreter

from tests.helpers.interpreter import make_fast

builder = interpreter.interpreter_builder


class Runner(Protocol):
    """What is asked to run the programs of a launch."""

    def prepare(self, arguments: dict[str, Any]) -> None:
        """See the kernel's arguments, by name, before any program runs."""

    def run(self, program: Callable[[], None]) -> None:
        """Run the program that ``builder.grid_idx`` names; called once for each, in order."""


class Kernel:
    """The kernel as the interpreter's loop sees it: each call goes to the runner."""

    def __init__(self, function: Callable[..., None], runner: Runner) -> None:
        """Look like ``function`` to everything the interpreter asks of it."""
        self.function, self.runner = function, runner
        self.__name__ = function.__name__
        self.__globals__ = function.__globals__
        self.__annotations__ = function.__annotations__
        self.__signature__ = inspect.signature(function)

    def __call__(self, **arguments: Any) -> None:
        """Hand one program to the runner."""
        self.runner.run(lambda: self.function(**arguments))


@contextmanager
def programs_run_by(runner: Runner) -> Iterator[None]:
    """Let ``runner`` run the programs of the one launch made inside.

    The tensors of a launch on the CPU are the interpreter's own, so nothing is copied to it or
    back: copying back would undo what another process has stored meanwhile.
    """
    launches = []

    class Executor(interpreter.GridExecutor):
        def __init__(self, function: Callable[..., None], *rest: Any) -> None:
            super().__init__(Kernel(function, runner), *rest)
            launches.append(function.__name__)
            assert len(launches) == 1, f"expected one launch, got {launches}"

        def _init_args_hst(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
            runner.prepare(dict(zip(self.arg_names, args, strict=False)) | kwargs)
            return args, kwargs

        def _restore_args_dev(self, *_: Any) -> None:
            pass

    make_fast()
    with mock.patch.object(interpreter, "GridExecutor", Executor):
        yield
    assert launches, "expected one launch, got none"


@contextmanager
def replaced(hooks: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Put functions in the place of the builder's operations of the same name."""
    for name, hook in hooks.items():
        assert hasattr(type(builder), name), f"the interpreter has no operation {name}"
        setattr(builder, name, hook)
    try:
        yield
    finally:
        for name in hooks:
            delattr(builder, name)
