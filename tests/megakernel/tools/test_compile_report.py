"""The rules on made-up reports, and how reports are shown."""

import json
from dataclasses import replace
from typing import Any

import pytest

from megakernel.launch.fences import FENCE
from megakernel.tools.compile_report import (
    COLUMNS,
    FIGURES,
    CaseReport,
    FenceCounts,
    LoopReport,
    broken_rules,
    count_fences,
    format_figures,
    format_json,
    format_table,
)

CLEAN = CaseReport(
    config="rows128", model="OLMoE", dtype="bfloat16", route="live", kind="plain", split="one",
    stages="layer", purpose="forward", timed=False, default_for=["prefill"],
    block_rows=128, block_tokens=64, registers=255, spill_bytes=0, stack_bytes=0,
    shared_bytes=98_328, workers_per_sm=2,
    wanted_workers_per_sm=2, wgmma=28, mma=0, async_16_byte_loads=64, tma_loads=9, wgmma_loops=1,
    serial_loops=0, gemm_loop_local_ops=0, other_local_ops=0, wgmma_fences=3, proxy_fences=5,
    unfenced=0, spills_of_source={},
    gemm_loops=(LoopReport(0x1E50, 0x2F00, 376, 123, 298, 16, 0, 8, 2, False, ()),),
)  # fmt: skip
SPILL = "0x1f00: LDL R3, [R1+0x8]  [ffn.py:70]"
SPILLING = replace(
    CLEAN,
    spill_bytes=8,
    gemm_loop_local_ops=1,
    gemm_loops=(LoopReport(0x1E50, 0x2F00, 376, 123, None, 16, 0, 8, 2, False, (SPILL,)),),
    spills_of_source={"ffn.py:70": 1, "queue.py:28": 3},
)
REQUIRED = {
    "config", "model", "block_rows", "registers", "spill_bytes", "shared_bytes", "workers_per_sm",
    "wgmma", "gemm_loop_local_ops",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        pytest.param({}, [], id="clean"),
        pytest.param(
            {"spill_bytes": 480}, [], id="spills outside the GEMM loops are reported only"
        ),
        pytest.param(
            {"gemm_loop_local_ops": 3},
            ["no spill inside a GEMM loop: 3 local-memory instructions in them"],
            id="a spill inside one",
        ),
        pytest.param({"shared_bytes": 232_448}, [], id="all the shared memory a block may have"),
        pytest.param(
            {"shared_bytes": 232_449},
            ["at most 232448 bytes of shared memory: 232449"],
            id="one byte more",
        ),
        pytest.param(
            {"block_rows": 64, "wgmma": 0},
            ["wgmma in tiles of 64 rows or more: none in 64"],
            id="no wgmma in 64 rows",
        ),
        pytest.param({"block_rows": 32, "wgmma": 0, "mma": 48}, [], id="wgmma cannot do 32 rows"),
        pytest.param(
            {"mma": 16},
            ["wgmma in tiles of 64 rows or more: 16 mma instead"],
            id="one of the products fell back",
        ),
        pytest.param({"mma": 16, "block_tokens": 16}, [], id="the router has a low tile"),
        pytest.param({"wgmma": 0, "dtype": "float32"}, [], id="float32 has no tensor core"),
        pytest.param({"wgmma": 0, "stages": "combine"}, [], id="the combine has no product"),
        pytest.param(
            {"serial_loops": 2, "wgmma_loops": 3},
            ["wgmma that does not wait for the product before: in 2 of 3 loops each does"],
            id="ptxas had too few registers",
        ),
        pytest.param(
            {"unfenced": 2},
            ["a proxy fence above each of 3 groups of wgmma: 2 have none"],
            id="wgmma may read rows that are still on their way",
        ),
        pytest.param(
            {"workers_per_sm": 1},
            ["2 workers per multiprocessor: 1 fit"],
            id="the second worker would wait for the first to end",
        ),
        pytest.param(
            {"gemm_loop_local_ops": 1, "shared_bytes": 300_000, "wgmma": 0},
            [
                "no spill inside a GEMM loop: 1 local-memory instructions in them",
                "at most 232448 bytes of shared memory: 300000",
                "wgmma in tiles of 64 rows or more: none in 128",
            ],
            id="all at once",
        ),
    ],
)
def test_rules(changes: dict[str, Any], rules: list[str]) -> None:
    assert broken_rules(replace(CLEAN, **changes)) == rules


def test_json_is_a_list_of_objects_that_say_what_they_break() -> None:
    clean, spilling = json.loads(format_json([CLEAN, SPILLING]))
    assert clean.keys() >= REQUIRED
    assert clean["broken_rules"] == []
    assert len(spilling["broken_rules"]) == 1
    assert spilling["gemm_loops"][0]["local_ops"] == [SPILL]


def test_the_table_shows_every_figure_and_where_it_spills() -> None:
    header, *lines = format_table([CLEAN, SPILLING]).splitlines()
    assert header.split() == list(COLUMNS)
    assert lines[0].split() == [str(getattr(CLEAN, name)) for name in COLUMNS]
    assert lines[2:] == [
        "    local-memory instructions at ffn.py:70 (1), queue.py:28 (3)",
        "    1 of them in the GEMM loop at 0x1e50..0x2f00:",
        f"        {SPILL}",
    ]


def test_figures_are_a_table_of_markdown_with_the_ways_of_each_loop() -> None:
    header, rule, clean, spilling = format_figures([CLEAN, SPILLING]).splitlines()
    assert header.count("|") == rule.count("|") == clean.count("|") == len(FIGURES) + 2
    assert clean.startswith("| rows128 | OLMoE | forward | live | 255 |")
    assert clean.endswith("| 5 | 3 | 376 / 123 / 298 |")
    assert spilling.endswith("| 376 / 123 / - |")


def test_fences_are_counted_against_the_groups_of_products() -> None:
    ptx = f"\t{FENCE}\n\tbar.sync 0;\n\twgmma.fence.sync.aligned;\n\tst.shared.b32 [%r1], %r2;\n"
    assert count_fences(ptx) == FenceCounts(1, 1, 0)
    assert count_fences(ptx * 3) == FenceCounts(3, 3, 0)
    assert count_fences(ptx + ptx.replace(FENCE, "")) == FenceCounts(2, 1, 1)
