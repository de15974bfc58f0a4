"""Fill Triton's cache on all cores, ahead of the steps that launch: the GPU need not wait.

Each process compiles by the launch itself, up to the point where the driver would be called, so
the kernels are those that a launch will look for.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

from megakernel.launch.call import Call
from megakernel.plan.buffers import Routing
from perf.gpu.child import Context
from perf.gpu.recording import distinct

# What a run will launch: functions that return calls; those of the tests know the tests' bodies.
SOURCES = {
    "first": (
        "tests.gpu.recorded:calls_of_ladder",
        "perf.gpu.timing:calls",
        "perf.gpu.training:calls",
    ),
    "second": (
        "tests.gpu.recorded:calls_of_tests",
        "perf.gpu.suites:calls",
        "perf.gpu.levers:calls",
    ),
}
SPARE_CORES = 2
REHEARSED = 2  # kernels of a rehearsal


def compile_for(context: Context, plan: str) -> dict:
    """Compile all that the steps of a plan will launch.

    Args:
        context: of the step.
        plan: key of SOURCES.

    Raises:
        RuntimeError: naming how many kernels do not compile, and the first of them.
    """
    calls = distinct(list_calls(context, SOURCES[plan]))
    if context.rehearse:
        calls = sorted(calls, key=lambda call: call.rule.config.block_h)[:REHEARSED]
    if context.fault == "compile":
        calls[0] = replace(calls[0], buffers=calls[0].buffers._replace(routing=Routing()))
    context.say(f"{len(calls)} kernels to compile")
    start = time.monotonic()
    failures, notes = compile_all(calls, context.say)
    seconds = time.monotonic() - start
    text = f"{len(calls) - len(failures)} kernels in {seconds:.0f} s"
    if notes:
        text += f"; {len(notes)} without a launcher, first: {notes[0]}"
    if failures:
        first = f"{len(failures)} of {len(calls)} kernels do not compile, first {failures[0]}"
        raise RuntimeError(first)
    return {"text": text, "kernels": len(calls)}


def list_calls(context: Context, sources: Sequence[str]) -> list[Call]:
    """Return the calls that the sources name."""
    calls = []
    for source in sources:
        start = time.monotonic()
        module, _, name = source.partition(":")
        found = getattr(import_module(module), name)()
        context.say(f"{source}: {len(found)} calls, {time.monotonic() - start:.1f} s")
        calls += found
    return calls


def compile_all(calls: Sequence[Call], say: Callable[[str], None]) -> tuple[list[str], list[str]]:
    """Compile calls side by side.

    Args:
        calls: of distinct kernels, the most urgent first.
        say: told of each that is done.

    Returns:
        What does not compile, and for which kernels no launcher could be built, each with why.
    """
    processes = max(len(os.sched_getaffinity(0)) - SPARE_CORES, 2)
    failures, notes = [], []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        running: dict[Future[tuple[str, str]], Call] = {
            pool.submit(compile_or_say, one): one for one in calls
        }
        for done in as_completed(running):
            name = name_of(running[done])
            error, note = done.result()
            failures += [f"{name}: {error}"] * bool(error)
            notes += [f"{name}: {note}"] * bool(note)
            say(f"{'FAILED ' if error else ''}{name}")
    return failures, notes


def name_of(call: Call) -> str:
    """Say which kernel a call needs, in a line."""
    rule, experts = call.rule, call.buffers.experts.down_EHI
    shape = "" if experts is None else "x".join(map(str, experts.shape))
    dtype = str(call.tokens.dtype).removeprefix("torch.")
    config = rule.config
    marks = " timed" if config.record_times else ""
    if call.buffers.saved.z_A2I is not None:
        marks += " z"
    kept = call.buffers.gradients.down_EHI
    if kept is not None and kept.dtype != call.tokens.dtype:
        marks += " to float32"
    return (f"{rule.stages} {rule.route} {rule.split} {dtype} EHI {shape} "
            f"rows{config.block_rows} groups{config.column_groups}{marks}")  # fmt: skip


class Warm:
    """Stands where the kernel is looked up to be launched, and compiles it."""

    def __init__(self, kernel: Any) -> None:
        """Take the kernel over."""
        self.kernel = kernel
        self.compiled: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return what is called instead of the launch."""
        return partial(self.compile, grid)

    def compile(self, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """Compile for the arguments of a launch."""
        self.compiled = self.kernel.warmup(*arguments, grid=grid, **options)


def compile_or_say(call: Call) -> tuple[str, str]:
    """Return why a call's kernel does not compile and why it has no launcher, "" for neither.

    Text, since not every error of a compiler can travel between processes.
    """
    try:
        return "", compile_call(call)
    except Exception as error:
        return f"{type(error).__name__}: {error}", ""


def compile_call(call: Call) -> str:
    """Compile one kernel and its launcher; return why there is no launcher, or nothing.

    For a process of its own, which must not interpret kernels: the driver stays.
    """
    import triton

    from megakernel.launch import run
    from megakernel.tools.compile_check import Sm90

    triton.runtime.driver.set_active(Sm90())
    name = "backward_kernel" if call.rule.stages == "backward" else "moe_kernel"
    warm = Warm(getattr(run, name))
    with patch.object(run, name, warm):
        run.launch(call)
    return why_no_launcher(warm.compiled)


def why_no_launcher(compiled: Any) -> str:
    """Build the C launcher of a compiled kernel, where there is a driver to link with.

    Triton 3.6 would compile it in the first launch, a second each; 3.7 needs none.
    """
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        return ""
    try:
        driver.CudaLauncher(compiled.src, compiled.metadata)
    except Exception as error:  # no compiler or no driver: the first launch will say more
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""
