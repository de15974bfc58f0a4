"""What a compiled case costs, which rules it breaks, and how that is shown."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from megakernel.config import SHARED_LIMIT_BYTES
from megakernel.launch.fences import FENCE, PRODUCT, find_unfenced
from megakernel.tools.compile_cases import CompileCase
from megakernel.tools.cubin import CubinReport, workers_per_sm
from megakernel.tools.flow import GemmLoop
from megakernel.tools.sass import Code

WGMMA_ROWS = 64  # the least height that wgmma can serve
SHOWN_LINES = 8
COLUMNS = (
    "config", "model", "dtype", "kind", "purpose", "route", "split", "stages", "timed",
    "registers", "spill_bytes", "stack_bytes", "shared_bytes", "workers_per_sm", "wgmma", "mma",
    "async_16_byte_loads", "tma_loads", "wgmma_loops", "gemm_loop_local_ops", "other_local_ops",
    "serial_loops", "wgmma_fences", "proxy_fences",
)  # fmt: skip
FIGURES = {
    "config": "config",
    "model": "model",
    "purpose": "purpose",
    "route": "route",
    "registers": "registers",
    "stack_bytes": "stack, bytes",
    "gemm_loop_local_ops": "spills in GEMM loops",
    "other_local_ops": "spills elsewhere",
    "shared_bytes": "shared, bytes",
    "workers_per_sm": "workers that fit",
    "wgmma_loops": "loops with wgmma",
    "serial_loops": "of those, serial",
    "proxy_fences": "proxy fences",
    "wgmma_fences": "wgmma fences",
}
WAYS = "instructions before the first product / a step / after the last, by loop"


class FenceCounts(NamedTuple):
    """Fences in the PTX of a kernel.

    Attributes:
        wgmma_fences: that open a group of products.
        proxy_fences: from the generic proxy to the async one, whatever for.
        unfenced: groups of products without a proxy fence above.
    """

    wgmma_fences: int
    proxy_fences: int
    unfenced: int


class Compilation(NamedTuple):
    """What compiling a case gave."""

    cubin: CubinReport
    fences: FenceCounts


@dataclass(frozen=True)
class LoopReport:
    """One GEMM loop: place, counts as in :class:`CaseReport`, the rest as in :class:`GemmLoop`."""

    first_address: int
    last_address: int
    before: int
    per_step: int
    after: int | None
    wgmma: int
    mma: int
    async_16_byte_loads: int
    tma_loads: int
    serial: bool
    local_ops: tuple[str, ...]


@dataclass(frozen=True)
class CaseReport:
    """What one case costs.

    Attributes:
        config, model, dtype, route, kind, split, stages, purpose, timed: of the case.
        default_for: phases (decode, prefill) in which the config is the default.
        block_rows, block_tokens: heights of the config's row tile and token tile.
        registers: per thread.
        spill_bytes, stack_bytes: local memory per thread, and the part that is the stack.
        shared_bytes: per worker.
        workers_per_sm: workers that fit one multiprocessor.
        wanted_workers_per_sm: workers the config launches for each.
        wgmma, mma: tensor core instructions, of a warp group and of a warp.
        async_16_byte_loads, tma_loads: asynchronous load instructions.
        wgmma_loops: GEMM loops with wgmma.
        serial_loops: those of them in which each product waits for the one before.
        gemm_loop_local_ops: loads and stores of spilled registers in the GEMM loops.
        other_local_ops: those elsewhere.
        wgmma_fences, proxy_fences, unfenced: see FenceCounts.
        gemm_loops: see :func:`megakernel.tools.flow.find_gemm_loops`.
        spills_of_source: for each line of the kernel, how many loads and stores of spilled
            registers it has, most first.
    """

    config: str
    model: str
    dtype: str
    route: str
    kind: str
    split: str
    stages: str
    purpose: str
    timed: bool
    default_for: list[str]
    block_rows: int
    block_tokens: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    workers_per_sm: int
    wanted_workers_per_sm: int
    wgmma: int
    mma: int
    async_16_byte_loads: int
    tma_loads: int
    wgmma_loops: int
    serial_loops: int
    gemm_loop_local_ops: int
    other_local_ops: int
    wgmma_fences: int
    proxy_fences: int
    unfenced: int
    gemm_loops: tuple[LoopReport, ...]
    spills_of_source: dict[str, int]

    def __str__(self) -> str:
        timed = ", timed" if self.timed else ""
        stages = "" if self.stages == "layer" else f", stage {self.stages}"
        stages += "" if self.purpose == "forward" else f", {self.purpose}"
        return f"{self.config} for {self.model}, {self.route}, split {self.split}{stages}{timed}"


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
    rules += _broken_products(report)
    if report.workers_per_sm < report.wanted_workers_per_sm:
        wanted = report.wanted_workers_per_sm
        rules.append(f"{wanted} workers per multiprocessor: {report.workers_per_sm} fit")
    return rules


def _broken_products(report: CaseReport) -> Iterator[str]:
    has_tensor_cores = report.dtype != "float32" and report.stages != "combine"
    if has_tensor_cores and report.block_rows >= WGMMA_ROWS and not report.wgmma:
        yield f"wgmma in tiles of {WGMMA_ROWS} rows or more: none in {report.block_rows}"
    elif min(report.block_rows, report.block_tokens) >= WGMMA_ROWS and report.mma:
        yield f"wgmma in tiles of {WGMMA_ROWS} rows or more: {report.mma} mma instead"
    if report.serial_loops:
        yield (
            "wgmma that does not wait for the product before: "
            f"in {report.serial_loops} of {report.wgmma_loops} loops each does"
        )
    if report.unfenced:
        yield (
            f"a proxy fence above each of {report.wgmma_fences} groups of wgmma: "
            f"{report.unfenced} have none"
        )


def count_fences(ptx: str) -> FenceCounts:
    """Count the fences in the PTX of a kernel."""
    lines = [line.strip() for line in ptx.splitlines()]
    products = sum(line.startswith(PRODUCT) for line in lines)
    return FenceCounts(products, lines.count(FENCE), len(find_unfenced(ptx)))


def make_report(case: CompileCase, compiled: Compilation) -> CaseReport:
    """Put the figures of a compilation under the name of a case."""
    cubin, config = compiled.cubin, case.config
    in_loops = len(cubin.gemm_loop_local_ops)
    return CaseReport(
        config=case.name,
        model=case.model.name,
        dtype=str(case.dtype).removeprefix("torch."),
        route=case.route,
        kind=case.kind,
        split=case.split,
        stages=case.stages,
        purpose=case.purpose,
        timed=config.record_times,
        default_for=case.default_for,
        block_rows=config.block_rows,
        block_tokens=config.block_tokens,
        registers=cubin.registers,
        spill_bytes=cubin.spill_bytes,
        stack_bytes=cubin.stack_bytes,
        shared_bytes=cubin.shared_bytes,
        workers_per_sm=workers_per_sm(cubin.registers, cubin.shared_bytes, config.num_warps),
        wanted_workers_per_sm=config.workers_per_sm,
        wgmma_loops=sum(loop.wgmma > 0 for loop in cubin.gemm_loops),
        serial_loops=sum(loop.is_serial for loop in cubin.gemm_loops),
        gemm_loop_local_ops=in_loops,
        other_local_ops=len(cubin.code.local_ops) - in_loops,
        gemm_loops=tuple(map(_loop_report, cubin.gemm_loops)),
        spills_of_source=dict(
            Counter(str(op.source) for op in cubin.code.local_ops).most_common()
        ),
        **compiled.fences._asdict(),
        **_counts(cubin.code),
    )


def _loop_report(loop: GemmLoop) -> LoopReport:
    return LoopReport(
        first_address=loop.instructions[0].address,
        last_address=loop.instructions[-1].address,
        before=loop.before,
        per_step=loop.per_step,
        after=loop.after,
        serial=loop.is_serial,
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


def format_figures(reports: Sequence[CaseReport]) -> str:
    """Return the figures of the reports as a table of Markdown."""
    rows = [[*FIGURES.values(), WAYS], ["---"] * (len(FIGURES) + 1)]
    rows += [
        [*(str(getattr(report, name)) for name in FIGURES), _ways(report)] for report in reports
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _ways(report: CaseReport) -> str:
    return ", ".join(
        f"{loop.before} / {loop.per_step} / {'-' if loop.after is None else loop.after}"
        for loop in report.gemm_loops
    )


def _spill_lines(report: CaseReport) -> Iterator[str]:
    places = [f"{source} ({count})" for source, count in report.spills_of_source.items()]
    if places:
        yield f"    local-memory instructions at {', '.join(places[:SHOWN_LINES])}"
    for loop in report.gemm_loops:
        if loop.local_ops:
            place = f"{loop.first_address:#06x}..{loop.last_address:#06x}"
            yield f"    {len(loop.local_ops)} of them in the GEMM loop at {place}:"
            yield from (f"        {line}" for line in loop.local_ops[:SHOWN_LINES])
