"""Loops are found and measured right, in hand-written SASS."""

from collections.abc import Mapping

import pytest

from megakernel.tools.flow import GemmLoop, build_flow_graph, find_gemm_loops
from megakernel.tools.sass import parse_sass

Tables = Mapping[int, tuple[int, ...]]
NO_TABLES: Tables = {}


def find(*lines: str, tables: Tables = NO_TABLES) -> tuple[GemmLoop, ...]:
    """The GEMM loops of a program; a line ending in a colon is a label."""
    listing = []
    address = 0
    for line in lines:
        listing.append(line if line.endswith(":") else f"  /*{address:04x}*/  {line} ;")
        address += 0 if line.endswith(":") else 16
    return find_gemm_loops(build_flow_graph(*parse_sass("\n".join(listing)), tables))


def gemm_loops(*lines: str, tables: Tables = NO_TABLES) -> list[list[str]]:
    """The texts in each GEMM loop of a program."""
    return [[one.text for one in loop.instructions] for loop in find(*lines, tables=tables)]


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


def test_a_jump_table_closes_the_loops_of_all_its_targets() -> None:
    """Kinds of task: one with products in a loop of its own, one that ends the kernel."""
    program = (
        LOAD, "BRX R2 -0x10", WGMMA, "@P0 BRA 0x20", "BRA 0x0", STORE, "BRA 0x0", "EXIT",
    )  # fmt: skip
    (loop,) = find(*program, tables={0x10: (0x70, 0x50, 0x20)})
    assert [one.text for one in loop.instructions] == [WGMMA, "@P0 BRA 0x20"]
    assert (loop.before, loop.per_step, loop.after) == (2, 2, 2)


def test_a_guarded_jump_may_also_fall_through() -> None:
    program = ("@P1 BRX R2 -0x10", WGMMA, "@P0 BRA 0x10", "EXIT")
    assert gemm_loops(*program, tables={0x0: (0x30,)}) == [[WGMMA, "@P0 BRA 0x10"]]


def test_a_table_that_leads_out_of_the_function_is_refused() -> None:
    with pytest.raises(ValueError, match="out of the function, 0x0000: BRX"):
        gemm_loops("BRX R2 -0x10", "EXIT", tables={0x0: (0x10, 0x20)})


def test_ways_are_the_shortest_ones() -> None:
    """A wait that is skipped, a step that loads nothing, an epilogue with two ends."""
    (loop,) = find(
        "MOV R1, R2", ".L_task:", "@P0 BRA `(.L_ready)", ".L_wait:", LOAD, "@P1 BRA `(.L_wait)",
        ".L_ready:", STORE, ".L_step:", "@P2 BRA `(.L_product)", LOAD, LOAD,
        ".L_product:", STORE, WGMMA, WGMMA, "@P3 BRA `(.L_step)",
        "@P4 BRA `(.L_end)", STORE, STORE, ".L_end:", "@P5 BRA `(.L_task)", "EXIT",
    )  # fmt: skip
    # From .L_task: its branch, STORE, the branch of the step, STORE.
    assert loop.before == 4
    # The branch of the step and the four of the product.
    assert loop.per_step == 5
    # After the second of them: three branches.
    assert loop.after == 3


def test_a_way_that_is_longer_is_not_taken_for_being_tried_first() -> None:
    (loop,) = find(
        ".L_task:", "@P0 BRA `(.L_long)", ".L_step:", WGMMA, "@P1 BRA `(.L_step)",
        "@P2 BRA `(.L_task)", "EXIT", ".L_long:", STORE, STORE, STORE, "BRA `(.L_step)",
    )  # fmt: skip
    assert (loop.before, loop.per_step, loop.after) == (1, 2, 2)


PRODUCT, WAIT = "HGMMA.64x256x16.F32.BF16 R24", "WARPGROUP.DEPBAR.LE gsb0, 0x0"


@pytest.mark.parametrize(
    ("lines", "is_serial"),
    [
        pytest.param([PRODUCT, PRODUCT, WAIT], False, id="one wait a step"),
        pytest.param([PRODUCT, WAIT, PRODUCT, WAIT], True, id="one after each product"),
        pytest.param([PRODUCT, WAIT], False, id="a single product"),
    ],
)
def test_products_that_wait_for_one_another_are_seen(lines: list[str], is_serial: bool) -> None:
    (loop,) = find("MOV R1, R2", ".L_1:", *lines, "@P0 BRA `(.L_1)", "EXIT")
    assert loop.is_serial is is_serial


def test_without_a_task_loop_ways_start_at_the_kernel() -> None:
    (loop,) = find(LOAD, LOAD, ".L_x_0:", WGMMA, STORE, "@P0 BRA `(.L_x_0)", "EXIT")
    assert (loop.before, loop.per_step, loop.after) == (2, 3, None)


def test_a_product_behind_its_loop_has_its_own_ways() -> None:
    loop, peeled = find(
        ".L_x_0:", LOAD, ".L_x_1:", WGMMA, "@P0 BRA `(.L_x_1)", "BAR.SYNC 0x0",
        WGMMA, LOAD, WGMMA, STORE, "@P1 BRA `(.L_x_0)", "EXIT",
    )  # fmt: skip
    assert (loop.before, loop.per_step, loop.after) == (1, 2, 7)
    assert (peeled.before, peeled.per_step, peeled.after) == (4, 3, 2)


FMA, SHARED = ["FFMA R0, R1, R2, R0"], ["LDS R1, [R3]"]


@pytest.mark.parametrize(
    ("lines", "is_product"),
    [
        pytest.param(32 * FMA + SHARED, True, id="a product in float32"),
        pytest.param(31 * FMA + SHARED, False, id="a few multiplications"),
        pytest.param(32 * FMA, False, id="a sum of rows"),
        pytest.param([*(32 * FMA), *SHARED, WGMMA], True, id="of tensor cores too"),
    ],
)
def test_without_tensor_cores_products_are_multiplications(
    lines: list[str], is_product: bool
) -> None:
    loop = [*lines, "@P0 BRA `(.L_x_0)"]
    assert gemm_loops(".L_x_0:", *loop, "EXIT") == ([loop] if is_product else [])


def test_beside_tensor_cores_multiplications_are_no_product() -> None:
    loops = gemm_loops(
        ".L_x_0:", *(32 * FMA), *SHARED, "@P0 BRA `(.L_x_0)",
        ".L_x_1:", WGMMA, "@P0 BRA `(.L_x_1)", "EXIT",
    )  # fmt: skip
    assert loops == [[WGMMA, "@P0 BRA `(.L_x_1)"]]
