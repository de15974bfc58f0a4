"""Cubins are read right: hand-written SASS for the loops, real kernels for everything.

Run as a program it compiles the real kernels, without a GPU and without the interpreter, whatever
the test run is set to: ``python -m tests.megakernel.tools.test_sass DIRECTORY``.
"""

import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import triton
import triton.language as tl

from megakernel.tools import sass
from megakernel.tools.sass import (
    CubinReport,
    build_flow_graph,
    find_gemm_loops,
    find_tool,
    parse_sass,
    read_cubin,
    workers_per_sm,
)

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
    (directory / "shared_bytes.json").write_text(json.dumps(shared_bytes))


def _write_cubin(path: Path, source: triton.compiler.ASTSource, options: dict[str, int]) -> int:
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options=options)
    path.with_suffix(".cubin").write_bytes(compiled.asm["cubin"])
    return compiled.metadata.shared


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CubinReport]:
    directory = tmp_path_factory.mktemp("cubins")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, "-m", "tests.megakernel.tools.test_sass", str(directory)],
        cwd=Path(__file__).parents[3],
        env=environment | {"TRITON_CACHE_DIR": str(directory / "cache")},
        check=True,
    )
    shared_bytes = json.loads((directory / "shared_bytes.json").read_text())
    return {
        name: read_cubin((directory / f"{name}.cubin").read_bytes(), shared)
        for name, shared in shared_bytes.items()
    }


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


def gemm_loops(*lines: str) -> list[list[str]]:
    """The texts in each GEMM loop of a program; a line ending in a colon is a label."""
    listing = []
    address = 0
    for line in lines:
        listing.append(line if line.endswith(":") else f"  /*{address:04x}*/  {line} ;")
        address += 0 if line.endswith(":") else 16
    loops = find_gemm_loops(build_flow_graph(*parse_sass("\n".join(listing))))
    return [[one.text for one in loop.instructions] for loop in loops]


WGMMA = "HGMMA.64x128x16.F32.BF16 R88, gdesc[UR4], R88"
LOAD = "LDL R3, [R1+0x8]"
STORE = "STL [R1+0x8], R3"


def test_a_loop_around_the_gemm_loop_is_not_part_of_it() -> None:
    (loop,) = gemm_loops(
        ".L_x_0:", LOAD, ".L_x_1:", WGMMA, "@P0 BRA `(.L_x_1)",
        STORE, "@!P1 BRA `(.L_x_0)", "EXIT",
    )  # fmt: skip
    assert loop == [WGMMA, "@P0 BRA `(.L_x_1)"]


def test_targets_may_be_addresses() -> None:
    (loop,) = gemm_loops(LOAD, WGMMA, STORE, "@P0 BRA 0x10", "EXIT")
    assert loop == [WGMMA, STORE, "@P0 BRA 0x10"]


@pytest.mark.parametrize(
    "branch", ["BRA.U UP0, `(.L_x_0)", "@!P4 BRA !P1, `(.L_x_0)", "BRA.CONV ~URZ, `(.L_x_0)"]
)
def test_other_forms_of_branch_close_a_loop_and_fall_through(branch: str) -> None:
    (loop,) = gemm_loops(".L_x_0:", WGMMA, branch, STORE, "EXIT")
    assert loop == [WGMMA, branch]


def test_code_moved_out_of_line_stays_in_its_loop() -> None:
    (loop,) = gemm_loops(
        ".L_x_0:", WGMMA, "@P0 BRA `(.L_x_2)", ".L_x_1:", "@P1 BRA `(.L_x_0)", STORE, "EXIT",
        ".L_x_2:", LOAD, "BRA `(.L_x_1)",
    )  # fmt: skip
    assert loop == [WGMMA, "@P0 BRA `(.L_x_2)", "@P1 BRA `(.L_x_0)", LOAD, "BRA `(.L_x_1)"]


def test_code_that_only_lies_between_is_not_in_the_loop() -> None:
    (loop,) = gemm_loops(
        ".L_x_0:", WGMMA, "@P0 BRA `(.L_x_1)", STORE, "EXIT", ".L_x_1:", "BRA `(.L_x_0)",
    )  # fmt: skip
    assert STORE not in loop


def test_a_loop_entered_at_its_test_is_found() -> None:
    (loop,) = gemm_loops(
        "BRA `(.L_x_1)", ".L_x_0:", WGMMA, LOAD, ".L_x_1:", "@P0 BRA `(.L_x_0)", "EXIT",
    )  # fmt: skip
    assert loop == [WGMMA, LOAD, "@P0 BRA `(.L_x_0)"]


def test_a_loop_without_matmuls_inside_a_gemm_loop_belongs_to_it() -> None:
    (loop,) = gemm_loops(
        ".L_x_0:", WGMMA, ".L_x_1:", LOAD, "@P0 BRA `(.L_x_1)", "@P1 BRA `(.L_x_0)", "EXIT",
    )  # fmt: skip
    assert LOAD in loop


def test_two_gemms_in_one_task_loop_are_two_loops() -> None:
    first, second = gemm_loops(
        ".L_x_0:", "@P2 BRA `(.L_x_2)", ".L_x_1:", WGMMA, "@P0 BRA `(.L_x_1)",
        ".L_x_2:", "HMMA.16816.F32.BF16 R4, R8, R10, R4", LOAD, "@P0 BRA `(.L_x_2)",
        STORE, "@P1 BRA `(.L_x_0)", "EXIT",
    )  # fmt: skip
    assert first == [WGMMA, "@P0 BRA `(.L_x_1)"]
    assert second[1] == LOAD


def test_an_unrolled_gemm_is_the_stretch_from_its_first_matmul_to_its_last() -> None:
    loops = gemm_loops(
        STORE, WGMMA, LOAD, WGMMA, STORE, "@P0 BRA `(.L_x_1)", WGMMA, ".L_x_1:", "EXIT"
    )
    assert loops == [[WGMMA, LOAD, WGMMA], [WGMMA]]


def test_matmuls_peeled_off_a_gemm_loop_do_not_widen_it() -> None:
    loop, peeled = gemm_loops(
        ".L_x_0:", LOAD, ".L_x_1:", WGMMA, "@P0 BRA `(.L_x_1)", "BAR.SYNC 0x0",
        WGMMA, STORE, "@P1 BRA `(.L_x_0)", "EXIT",
    )  # fmt: skip
    assert (loop, peeled) == ([WGMMA, "@P0 BRA `(.L_x_1)"], [WGMMA])


def test_code_without_matmuls_has_no_gemm_loop() -> None:
    assert gemm_loops(".L_x_0:", LOAD, "@P0 BRA `(.L_x_0)", "EXIT") == []


@pytest.mark.parametrize(
    ("branch", "rule"),
    [
        ("BRX R2 -0x10", "a computed address"),
        ("BRA `(.L_x_9)", "out of the function"),
        ("BRA 0x1000", "out of the function"),
    ],
)
def test_branches_that_cannot_be_followed_are_refused(branch: str, rule: str) -> None:
    with pytest.raises(ValueError, match=f"{rule}, 0x0000: {branch[:3]}"):
        gemm_loops(branch, "EXIT")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "must hold SASS instructions, got none"),
        ("/*0000*/ EXIT ;\n/*0000*/ EXIT ;", "must hold one function, got several"),
    ],
)
def test_a_listing_must_be_one_function(text: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        parse_sass(text)


def test_encodings_are_not_taken_for_instructions() -> None:
    listing = (
        "        /*0000*/                   EXIT ;      /* 0x000000000000794d */\n"
        "                                               /* 0x000fea0003800000 */\n"
    )
    instructions, _ = parse_sass(listing)
    assert [one.text for one in instructions] == ["EXIT"]


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
    monkeypatch.setattr(sass, "find_spec", lambda _: spec if has_triton else None)
    with pytest.raises(FileNotFoundError, match=message):
        find_tool("nvdisasm")


if __name__ == "__main__":
    write_cubins(Path(sys.argv[1]))
