"""Cubins are read right: real kernels, each with one thing to find.

Run as a program it compiles the real kernels, without a GPU and without the interpreter, whatever
the test run is set to: ``python -m tests.megakernel.tools.test_cubin DIRECTORY``.
"""

import json
import os
import struct
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import triton
import triton.language as tl

from megakernel.tools import cubin
from megakernel.tools.cubin import CubinReport, find_tool, read_cubin, workers_per_sm
from megakernel.tools.jumps import read_jump_tables

# name: block rows, block columns, warps, stages. The accumulator of "spilling" alone would take
# all 255 registers of every thread; "low" is too low a tile for wgmma.
GEMMS = {"clean": (128, 128, 4, 3), "spilling": (128, 256, 4, 3), "low": (16, 64, 4, 2)}
STEP = 64


@triton.jit
def gemm(
    a_ptr, b_ptr, c_ptr, num_tiles, depth, counter_ptr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One row of tiles of C = A Bᵀ, claimed one by one: the loops of a persistent kernel."""
    rows = tl.arange(0, ROWS)
    steps = tl.arange(0, STEP)
    tile = tl.atomic_add(counter_ptr, 1)
    while tile < num_tiles:
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        a_ptrs = a_ptr + rows[:, None] * depth + steps[None, :]
        b_ptrs = b_ptr + columns[None, :] * depth + steps[:, None]
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for _ in range(0, depth, STEP):
            sums = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), sums)
            a_ptrs += STEP
            b_ptrs += STEP
        c_ptrs = c_ptr + rows[:, None] * num_tiles * COLUMNS + columns[None, :]
        tl.store(c_ptrs, sums.to(tl.bfloat16))
        tile = tl.atomic_add(counter_ptr, 1)


@triton.jit
def weight_sum(weights, out_ptr, num_tiles):
    """Sum tiles that TMA brings."""
    sums = tl.zeros((64, 64), tl.float32)
    for tile in range(num_tiles):
        sums += weights.load([tile * 64, 0])
    offsets = tl.arange(0, 64)
    tl.store(out_ptr + offsets[:, None] * 64 + offsets[None, :], sums)


@triton.jit
def run_tasks(kind_ptr, num_tasks, b_ptr):
    """A chain of kinds, one of them a matrix product: a persistent kernel with a jump table."""
    place = tl.arange(0, 64)
    for task in range(num_tasks):
        kind = tl.load(kind_ptr + task)
        sums = tl.load(b_ptr + place).to(tl.float32)
        if kind == 0:
            sums = tl.exp(sums)
        elif kind == 1:
            sums = tl.sqrt(sums) + place
        elif kind == 2:
            sums = tl.log(sums) * 3
        elif kind == 3:
            a = tl.load(b_ptr + place[:, None] * 64 + place[None, :])
            for _ in range(num_tasks):
                sums += tl.sum(tl.dot(a, a), 0)
        elif kind == 4:
            sums = sums * sums
        elif kind == 5:
            sums = tl.cumsum(sums)
        tl.store(b_ptr + place, sums.to(tl.bfloat16))


NUM_KINDS = 6


@triton.jit
def float32_product(a_ptr, b_ptr, c_ptr, depth):
    """C = A B in true float32, which no tensor core has."""
    place = tl.arange(0, 32)
    sums = tl.zeros((32, 32), tl.float32)
    for step in range(0, depth, 32):
        a = tl.load(a_ptr + place[:, None] * depth + (step + place)[None, :])
        b = tl.load(b_ptr + (step + place)[:, None] * 32 + place[None, :])
        sums = tl.dot(a, b, sums, input_precision="ieee")
    tl.store(c_ptr + place[:, None] * 32 + place[None, :], sums)


@triton.jit
def weighted_sum(a_ptr, b_ptr, c_ptr, depth):
    """As many multiplications as a product has, and nothing in shared memory."""
    place = tl.arange(0, 8192)
    sums = tl.zeros((8192,), tl.float32)
    for step in range(depth):
        sums += tl.load(a_ptr + step) * tl.load(b_ptr + step * 8192 + place)
    tl.store(c_ptr + place, sums)


def write_cubins(directory: Path) -> None:
    """Compile the kernels above for sm_90 and note the dynamic shared memory they ask for."""
    pointers = {name: "*bf16" for name in ("a_ptr", "b_ptr", "c_ptr")}
    sizes = {"num_tiles": "i32", "depth": "i32", "counter_ptr": "*i32"}
    constants = dict.fromkeys(("ROWS", "COLUMNS", "STEP"), "constexpr")
    shared_bytes = {}
    for name, (rows, columns, num_warps, num_stages) in GEMMS.items():
        source = triton.compiler.ASTSource(
            gemm,
            pointers | sizes | constants,
            {"ROWS": rows, "COLUMNS": columns, "STEP": STEP},
            {(index,): [["tt.divisibility", 16]] for index in range(5)},
        )
        options = {"num_warps": num_warps, "num_stages": num_stages}
        shared_bytes[name] = _write_cubin(directory / name, source, options)
    signature = {"weights": "tensordesc<fp32[64, 64]>", "out_ptr": "*fp32", "num_tiles": "i32"}
    source = triton.compiler.ASTSource(weight_sum, signature, {})
    shared_bytes["tma"] = _write_cubin(directory / "tma", source, {})
    signature = {"kind_ptr": "*i32", "num_tasks": "i32", "b_ptr": "*bf16"}
    source = triton.compiler.ASTSource(run_tasks, signature, {})
    shared_bytes["jumping"] = _write_cubin(directory / "jumping", source, {})
    signature = dict.fromkeys(("a_ptr", "b_ptr", "c_ptr"), "*fp32") | {"depth": "i32"}
    for kernel in (float32_product, weighted_sum):
        source = triton.compiler.ASTSource(kernel, signature, {})
        name = kernel.__name__
        shared_bytes[name] = _write_cubin(directory / name, source, {})
    (directory / "shared_bytes.json").write_text(json.dumps(shared_bytes))


def _write_cubin(path: Path, source: triton.compiler.ASTSource, options: dict[str, int]) -> int:
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options=options)
    path.with_suffix(".cubin").write_bytes(compiled.asm["cubin"])
    return compiled.metadata.shared


@pytest.fixture(scope="session")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, int]]:
    """Each kernel's cubin and its dynamic shared memory."""
    directory = tmp_path_factory.mktemp("cubins")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, "-m", "tests.megakernel.tools.test_cubin", str(directory)],
        cwd=Path(__file__).parents[3],
        env=environment | {"TRITON_CACHE_DIR": str(directory / "cache")},
        check=True,
    )
    shared_bytes = json.loads((directory / "shared_bytes.json").read_text())
    return {
        name: ((directory / f"{name}.cubin").read_bytes(), shared)
        for name, shared in shared_bytes.items()
    }


@pytest.fixture(scope="session")
def reports(cubins: dict[str, tuple[bytes, int]]) -> dict[str, CubinReport]:
    return {name: read_cubin(*one) for name, one in cubins.items()}


def test_a_clean_gemm_is_reported_clean(reports: dict[str, CubinReport]) -> None:
    report = reports["clean"]
    assert 128 < report.registers <= 255, "128 of them are the accumulator"
    assert (report.spill_bytes, report.code.local_ops) == (0, ())
    assert report.shared_bytes == 3 * (128 + 128) * STEP * 2, "three stages of two bf16 tiles"
    assert workers_per_sm(report.registers, report.shared_bytes, 4) == 2


def test_a_gemm_has_one_innermost_loop_with_all_its_wgmma(reports: dict[str, CubinReport]) -> None:
    report = reports["clean"]
    (loop,) = report.gemm_loops
    # Four warps: two halves of 64 rows, each a step of 64 in four wgmma of depth 16.
    assert loop.wgmma == report.code.wgmma == 8
    # Per thread and step: two tiles of 128 x 64 x 2 bytes over 128 threads of 16 bytes.
    assert loop.async_16_byte_loads == 16
    assert report.code.async_16_byte_loads == 3 * 16, "two stages are loaded ahead of the loop"
    assert (loop.mma, loop.tma_loads) == (0, 0)


def test_spills_in_the_gemm_loop_are_found_with_their_source(
    reports: dict[str, CubinReport],
) -> None:
    report = reports["spilling"]
    ops = report.gemm_loop_local_ops
    assert report.registers == 255
    assert report.spill_bytes > 0
    assert 0 < len(ops) < len(report.code.local_ops), "some spills are outside the loop"
    assert {op.opcode for op in ops} == {"LDL", "STL"}
    assert all(f"{Path(__file__).name}:" in str(op) for op in ops)


def test_a_tile_below_64_rows_uses_warp_mma(reports: dict[str, CubinReport]) -> None:
    (loop,) = reports["low"].gemm_loops
    assert (loop.wgmma, reports["low"].code.wgmma) == (0, 0)
    assert loop.mma > 0


def test_tma_loads_are_counted_apart(reports: dict[str, CubinReport]) -> None:
    code = reports["tma"].code
    assert code.tma_loads > 0
    assert (code.async_16_byte_loads, reports["tma"].gemm_loops) == (0, ())


def test_a_jump_table_is_followed_to_each_kind(
    cubins: dict[str, tuple[bytes, int]], reports: dict[str, CubinReport]
) -> None:
    image, report = cubins["jumping"][0], reports["jumping"]
    (jump,) = [one for one in report.code.instructions if one.opcode == "BRX"]
    ((branch, targets),) = read_jump_tables(image).items()
    assert branch == jump.address
    assert len(targets) == NUM_KINDS
    assert set(targets) <= {one.address for one in report.code.instructions}
    assert image.count(struct.pack(f"<{NUM_KINDS}I", *targets)) == 2, "the kernel reads the same"


def test_a_product_behind_a_jump_table_is_found_in_its_task_loop(
    reports: dict[str, CubinReport],
) -> None:
    (loop,) = reports["jumping"].gemm_loops
    assert loop.wgmma or loop.mma
    assert loop.before > 0 and loop.after is not None and loop.after > 0


def test_cubins_without_a_jump_table_have_none(cubins: dict[str, tuple[bytes, int]]) -> None:
    tables = {name: read_jump_tables(image) for name, (image, _) in cubins.items()}
    assert [name for name, found in tables.items() if found] == ["jumping"]


def test_a_product_in_float32_is_a_loop_of_multiplications(
    reports: dict[str, CubinReport],
) -> None:
    (loop,) = reports["float32_product"].gemm_loops
    assert (loop.wgmma, loop.mma) == (0, 0)
    # Per thread: 32 x 32 sums of 32 products, over 128 threads.
    assert loop.count({"FFMA"}) == 256
    assert reports["weighted_sum"].code.count({"FFMA"}) >= 32
    assert reports["weighted_sum"].gemm_loops == ()


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "num_warps", "workers"),
    [
        pytest.param(255, 98_328, 4, 2, id="128x128 tile, both limits at two"),
        pytest.param(255, 147_000, 8, 1, id="128x256 tile, shared memory"),
        pytest.param(255, 98_320, 8, 1, id="shared memory fits twice, registers do not"),
        pytest.param(154, 98_328, 8, 1, id="160 registers a warp lane after rounding"),
        pytest.param(128, 98_328, 8, 2, id="the same capped to 128 registers"),
        pytest.param(255, 81_936, 4, 2, id="64x256 tile, two stages"),
        pytest.param(255, 122_904, 4, 1, id="64x256 tile, three stages"),
        pytest.param(32, 0, 1, 32, id="blocks per multiprocessor"),
        pytest.param(16, 0, 4, 16, id="warps per multiprocessor"),
        pytest.param(200, 0, 1, 8, id="each quarter holds two such warps, not two and a half"),
        pytest.param(64, 115_712, 4, 2, id="half the shared memory less the reserve"),
        pytest.param(64, 115_713, 4, 1, id="one byte more"),
        pytest.param(64, 232_448, 4, 1, id="all a block may have"),
        pytest.param(64, 232_449, 4, 0, id="one byte too much"),
        pytest.param(255, 0, 32, 0, id="more registers than there are"),
    ],
)
def test_workers_per_sm(registers: int, shared_bytes: int, num_warps: int, workers: int) -> None:
    assert workers_per_sm(registers, shared_bytes, num_warps) == workers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 4), r"registers must be in 1\.\.255, got 0"),
        ((256, 0, 4), r"registers must be in 1\.\.255, got 256"),
        ((32, -1, 4), "shared_bytes must not be negative, got -1"),
        ((32, 0, 0), r"num_warps must be in 1\.\.32, got 0"),
        ((32, 0, 33), r"num_warps must be in 1\.\.32, got 33"),
    ],
)
def test_impossible_figures_are_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workers_per_sm(*arguments)


def test_bytes_that_are_no_cubin_are_refused() -> None:
    with pytest.raises(ValueError, match=r"readable by cuobjdump, which said: .+"):
        read_cubin(b"no cubin")


@pytest.mark.parametrize(
    ("has_triton", "message"),
    [(False, "Triton, which is not installed"), (True, "carries no nvdisasm: there is no")],
    ids=["no Triton", "a build without the tools"],
)
def test_a_missing_disassembler_is_named(
    has_triton: bool, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModuleSpec("triton", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(cubin, "find_spec", lambda _: spec if has_triton else None)
    with pytest.raises(FileNotFoundError, match=message):
        find_tool("nvdisasm")


if __name__ == "__main__":
    write_cubins(Path(sys.argv[1]))
