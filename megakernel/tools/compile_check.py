"""Compile the shipped configs for sm_90 on any machine, and read what they cost from the cubins.

Every model is compiled as its users call it: with its router, biases, layout and shared expert.

``python -m megakernel.tools.compile_check [--json]`` exits with 1 when a config breaks a rule of
:func:`broken_rules`, and names both.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context

import torch
import triton
from triton.backends.compiler import GPUTarget

from megakernel.config import SHARED_LIMIT_BYTES, SHIPPED
from megakernel.device.kernel import moe_kernel
from megakernel.launch.run import kernel_arguments
from megakernel.launch.workspace import Workspace
from megakernel.plan.spec import KernelSpec
from megakernel.tools.compile_cases import ROUTES, CompileCase, compile_cases, make_call
from megakernel.tools.models import MODELS
from megakernel.tools.sass import Code, CubinReport, read_cubin, workers_per_sm

WGMMA_ROWS = 64  # the least height that wgmma can serve
NUM_PROCESSES = 2
SHOWN_LINES = 8
COLUMNS = (
    "config", "model", "kind", "route", "split", "timed", "registers", "spill_bytes",
    "shared_bytes",
    "workers_per_sm", "wgmma", "mma", "async_16_byte_loads", "tma_loads", "gemm_loop_local_ops",
)  # fmt: skip


@dataclass(frozen=True)
class LoopReport:
    """One GEMM loop: its place in the kernel, and counts as in :class:`CaseReport`."""

    first_address: int
    last_address: int
    wgmma: int
    mma: int
    async_16_byte_loads: int
    tma_loads: int
    local_ops: tuple[str, ...]


@dataclass(frozen=True)
class CaseReport:
    """What one case costs.

    Attributes:
        config, model, route, kind, split, timed: of the case.
        default_for: phases (decode, prefill) in which the config is the default.
        block_rows, block_tokens: heights of the config's row tile and token tile.
        registers: per thread.
        spill_bytes: local memory per thread.
        shared_bytes: per worker.
        workers_per_sm: workers that fit one multiprocessor.
        wanted_workers_per_sm: workers the config launches for each.
        wgmma, mma: tensor core instructions, of a warp group and of a warp.
        async_16_byte_loads, tma_loads: asynchronous load instructions.
        gemm_loop_local_ops: loads and stores of spilled registers in the GEMM loops.
        gemm_loops: see :func:`megakernel.tools.sass.find_gemm_loops`.
        spills_of_source: for each line of the kernel, how many loads and stores of spilled
            registers it has, most first.
    """

    config: str
    model: str
    route: str
    kind: str
    split: str
    timed: bool
    default_for: list[str]
    block_rows: int
    block_tokens: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    workers_per_sm: int
    wanted_workers_per_sm: int
    wgmma: int
    mma: int
    async_16_byte_loads: int
    tma_loads: int
    gemm_loop_local_ops: int
    gemm_loops: tuple[LoopReport, ...]
    spills_of_source: dict[str, int]


def broken_rules(report: CaseReport) -> list[str]:
    """Name each rule that a config must keep and does not, with the figure it has."""
    rules = []
    if report.gemm_loop_local_ops:
        rules.append(
            "no spill inside a GEMM loop: "
            f"{report.gemm_loop_local_ops} local-memory instructions in them"
        )
    if report.shared_bytes > SHARED_LIMIT_BYTES:
        rules.append(f"at most {SHARED_LIMIT_BYTES} bytes of shared memory: {report.shared_bytes}")
    if report.block_rows >= WGMMA_ROWS and not report.wgmma:
        rules.append(f"wgmma in tiles of {WGMMA_ROWS} rows or more: none in {report.block_rows}")
    elif min(report.block_rows, report.block_tokens) >= WGMMA_ROWS and report.mma:
        rules.append(f"wgmma in tiles of {WGMMA_ROWS} rows or more: {report.mma} mma instead")
    if report.workers_per_sm < report.wanted_workers_per_sm:
        wanted = report.wanted_workers_per_sm
        rules.append(f"{wanted} workers per multiprocessor: {report.workers_per_sm} fit")
    return rules


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
    # A spec does not say which biases there are: kinds of equal specs differ in them.
    keys = [(case.spec, case.config.num_warps, case.kind) for case in cases]
    distinct: dict[tuple[KernelSpec, int, str], CompileCase] = {}
    for key, case in zip(keys, cases, strict=True):
        distinct.setdefault(key, case)
    cubins: dict[tuple[KernelSpec, int, str], CubinReport] = {}
    started = time.monotonic()
    context = get_context("spawn")
    with _interpreter_off(), ProcessPoolExecutor(NUM_PROCESSES, mp_context=context) as pool:
        running = {pool.submit(compile_case, case): key for key, case in distinct.items()}
        for done in as_completed(running):
            key = running[done]
            if error := done.exception():
                pool.shutdown(cancel_futures=True)
                raise RuntimeError(f"{distinct[key]} does not compile: {error}") from error
            cubins[key] = done.result()
            seconds = time.monotonic() - started
            progress(f"{len(cubins)}/{len(distinct)}  {distinct[key]}  ({seconds:.0f} s)")
    return [make_report(case, cubins[key]) for key, case in zip(keys, cases, strict=True)]


def compile_case(case: CompileCase) -> CubinReport:
    """Compile a case through the path of a real launch, with a driver that only names sm_90.

    For a process of its own: the driver stays, and the process must not interpret kernels.
    """
    triton.runtime.driver.set_active(Sm90())
    workspace = Workspace(torch.device("meta"))
    arguments = kernel_arguments(make_call(case), case.spec, workspace)
    num_workers = max_polls = 1  # runtime values the code does not depend on
    compiled = moe_kernel.warmup(
        *arguments, num_workers, max_polls, C=case.spec, num_warps=case.config.num_warps, grid=(1,)
    )
    return read_cubin(compiled.asm["cubin"], compiled.metadata.shared)


class Sm90:
    """As much of a Triton driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def make_report(case: CompileCase, cubin: CubinReport) -> CaseReport:
    """Put the figures of a cubin under the name of a case."""
    num_warps = case.config.num_warps
    return CaseReport(
        config=case.config_name,
        model=case.model.name,
        route=case.route,
        kind=case.kind,
        split=case.split,
        timed=case.timed,
        default_for=case.default_for,
        block_rows=case.config.block_rows,
        block_tokens=case.config.block_tokens,
        registers=cubin.registers,
        spill_bytes=cubin.spill_bytes,
        shared_bytes=cubin.shared_bytes,
        workers_per_sm=workers_per_sm(cubin.registers, cubin.shared_bytes, num_warps),
        wanted_workers_per_sm=case.config.workers_per_sm,
        gemm_loop_local_ops=len(cubin.gemm_loop_local_ops),
        gemm_loops=tuple(map(_loop_report, cubin.gemm_loops)),
        spills_of_source=dict(
            Counter(str(op.source) for op in cubin.code.local_ops).most_common()
        ),
        **_counts(cubin.code),
    )


def _loop_report(loop: Code) -> LoopReport:
    return LoopReport(
        first_address=loop.instructions[0].address,
        last_address=loop.instructions[-1].address,
        local_ops=tuple(map(str, loop.local_ops)),
        **_counts(loop),
    )


def _counts(code: Code) -> dict[str, int]:
    names = ("wgmma", "mma", "async_16_byte_loads", "tma_loads")
    return {name: getattr(code, name) for name in names}


def format_json(reports: Sequence[CaseReport]) -> str:
    """Return the reports as a JSON list of objects; ``broken_rules`` is empty when all is well."""
    return json.dumps([asdict(one) | {"broken_rules": broken_rules(one)} for one in reports])


def format_table(reports: Sequence[CaseReport]) -> str:
    """Return a line per report, and below one that spills where it does."""
    rows = [[str(getattr(report, name)) for name in COLUMNS] for report in reports]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, COLUMNS, widths)).rstrip()]
    for report, row in zip(reports, rows, strict=True):
        lines.append("  ".join(map(str.ljust, row, widths)).rstrip())
        lines.extend(_spill_lines(report))
    return "\n".join(lines)


def _spill_lines(report: CaseReport) -> Iterator[str]:
    places = [f"{source} ({count})" for source, count in report.spills_of_source.items()]
    if places:
        yield f"    local-memory instructions at {', '.join(places[:SHOWN_LINES])}"
    for loop in report.gemm_loops:
        if loop.local_ops:
            place = f"{loop.first_address:#06x}..{loop.last_address:#06x}"
            yield f"    {len(loop.local_ops)} of them in the GEMM loop at {place}:"
            yield from (f"        {line}" for line in loop.local_ops[:SHOWN_LINES])


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
    parser.add_argument("--json", action="store_true", help="print a JSON list, not a table")
    parser.add_argument("--model", choices=MODELS, help="only this model")
    parser.add_argument("--config", choices=SHIPPED, help="only this config")
    parser.add_argument("--route", choices=ROUTES, help="only this route")
    wanted = parser.parse_args(arguments)
    cases = [
        case
        for case in compile_cases()
        if wanted.model in (None, case.model.name)
        and wanted.config in (None, case.config_name)
        and wanted.route in (None, case.route)
    ]
    reports = check(cases, lambda line: print(line, file=sys.stderr, flush=True))
    print(format_json(reports) if wanted.json else format_table(reports))
    failures = [
        f"FAILED {one.config} for {one.model}, {one.route}, split {one.split}"
        f"{', timed' if one.timed else ''}: {rule}"
        for one in reports
        for rule in broken_rules(one)
    ]
    print("\n".join(failures), file=sys.stderr, end="\n" if failures else "")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
