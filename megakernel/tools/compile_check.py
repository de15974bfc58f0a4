"""Compile the shipped configs for sm_90 on any machine, and read what they cost from the cubins.

Every model is compiled as its users call it: with its router, biases, layout and shared expert;
what training launches too, see :data:`megakernel.tools.compile_backward.PURPOSES`.

``python -m megakernel.tools.compile_check [--json | --figures]`` exits with 1 when a config breaks
a rule of :func:`megakernel.tools.compile_report.broken_rules`, and names both.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context

import torch
import triton
from triton.backends.compiler import GPUTarget

from megakernel.device.backward_kernel import backward_kernel
from megakernel.device.kernel import moe_kernel
from megakernel.launch.run import kernel_arguments
from megakernel.launch.workspace import Workspace
from megakernel.plan.spec import KernelSpec
from megakernel.tools.compile_backward import PURPOSES
from megakernel.tools.compile_cases import (
    ROUTES,
    CompileCase,
    compile_cases,
    figure_cases,
    make_call,
)
from megakernel.tools.compile_report import (
    CaseReport,
    Compilation,
    broken_rules,
    count_fences,
    format_figures,
    format_json,
    format_table,
    make_report,
)
from megakernel.tools.cubin import read_cubin
from megakernel.tools.models import MODELS

Key = tuple[KernelSpec, int, str, torch.dtype, str]
NUM_PROCESSES = 2
CONFIGS = sorted({case.name for case in compile_cases()})


def check(
    cases: Sequence[CompileCase], progress: Callable[[str], None] = lambda line: None
) -> list[CaseReport]:
    """Compile every case, equal specs once, and report in the order of the cases.

    Args:
        cases: what to compile.
        progress: called with a line of text whenever a compilation is done.

    Raises:
        RuntimeError: a case does not compile; the message names it.
    """
    keys = [key_of(case) for case in cases]
    distinct: dict[Key, CompileCase] = {}
    for key, case in zip(keys, cases, strict=True):
        distinct.setdefault(key, case)
    compiled: dict[Key, Compilation] = {}
    started = time.monotonic()
    context = get_context("spawn")
    with _interpreter_off(), ProcessPoolExecutor(NUM_PROCESSES, mp_context=context) as pool:
        running = {pool.submit(compile_case, case): key for key, case in distinct.items()}
        for done in as_completed(running):
            key = running[done]
            if error := done.exception():
                pool.shutdown(cancel_futures=True)
                raise RuntimeError(f"{distinct[key]} does not compile: {error}") from error
            compiled[key] = done.result()
            seconds = time.monotonic() - started
            progress(f"{len(compiled)}/{len(distinct)}  {distinct[key]}  ({seconds:.0f} s)")
    return [make_report(case, compiled[key]) for key, case in zip(keys, cases, strict=True)]


def key_of(case: CompileCase) -> Key:
    """Return what the code of a case depends on.

    A spec does not say which biases there are, nor their dtype: kinds of equal specs differ in
    them. Nor does it say what is saved, nor the dtype of gradients.
    """
    return case.spec, case.config.num_warps, case.kind, case.dtype, case.purpose


def compile_case(case: CompileCase) -> Compilation:
    """Compile a case through the path of a real launch, with a driver that only names sm_90.

    For a process of its own: the driver stays, and the process must not interpret kernels.
    """
    triton.runtime.driver.set_active(Sm90())
    workspace = Workspace(torch.device("meta"))
    arguments = kernel_arguments(make_call(case), case.spec, workspace)
    num_workers = max_polls = 1  # runtime values the code does not depend on
    kernel = backward_kernel if case.spec.is_backward else moe_kernel
    compiled = kernel.warmup(
        *arguments, num_workers, max_polls, C=case.spec, num_warps=case.config.num_warps, grid=(1,)
    )
    cubin = read_cubin(compiled.asm["cubin"], compiled.metadata.shared)
    return Compilation(cubin, count_fences(compiled.asm["ptx"]))


class Sm90:
    """As much of a Triton driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def _interpreter_off() -> Iterator[None]:
    """Let processes started inside compile kernels, whatever this one does with them."""
    saved = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if saved is not None:
            os.environ["TRITON_INTERPRET"] = saved


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the shipped configs and return the exit status."""
    parser = argparse.ArgumentParser(prog="megakernel.tools.compile_check", description=__doc__)
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print a JSON list, not a table")
    shown.add_argument(
        "--figures", action="store_true", help="print figures of a few cases as Markdown"
    )
    parser.add_argument("--model", choices=MODELS, help="only this model")
    parser.add_argument("--config", choices=CONFIGS, nargs="+", help="only these configs")
    parser.add_argument("--route", choices=ROUTES, help="only this route")
    parser.add_argument("--purpose", choices=PURPOSES, nargs="+", help="only these launches")
    wanted = parser.parse_args(arguments)
    cases = [
        case
        for case in (figure_cases if wanted.figures else compile_cases)()
        if wanted.model in (None, case.model.name)
        and (wanted.config is None or case.name in wanted.config)
        and wanted.route in (None, case.route)
        and (wanted.purpose is None or case.purpose in wanted.purpose)
    ]
    reports = check(cases, lambda line: print(line, file=sys.stderr, flush=True))
    formats = {"json": format_json, "figures": format_figures}
    chosen = next((name for name in formats if getattr(wanted, name)), None)
    print(formats[chosen](reports) if chosen else format_table(reports))
    failures = [f"FAILED {one}: {rule}" for one in reports for rule in broken_rules(one)]
    print("\n".join(failures), file=sys.stderr, end="\n" if failures else "")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
