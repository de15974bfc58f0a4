"""The rules on made-up reports, the bookkeeping on made-up compilers, and real compilations."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from megakernel.config import FLOAT32, ROWS64, ROWS128, SHIPPED
from megakernel.device.kernel import moe_kernel
from megakernel.launch import fences
from megakernel.launch.fences import FENCE, fence_compilations, needs_fences
from megakernel.plan.rules import ExpertRule, RouterRule
from megakernel.tools import compile_check
from megakernel.tools.compile_cases import (
    LEVERS,
    CompileCase,
    compile_cases,
    figure_cases,
    lever_cases,
    make_call,
)
from megakernel.tools.compile_check import check, compile_case, main
from megakernel.tools.compile_report import (
    COLUMNS,
    FIGURES,
    CaseReport,
    Compilation,
    FenceCounts,
    LoopReport,
    broken_rules,
    count_fences,
    format_figures,
    format_json,
    format_table,
)
from megakernel.tools.cubin import CubinReport
from megakernel.tools.models import KINDS, MODELS
from megakernel.tools.sass import Code, Instruction

CLEAN = CaseReport(
    config="rows128", model="OLMoE", dtype="bfloat16", route="live", kind="plain", split="one",
    stages="layer", timed=False, default_for=["prefill"], block_rows=128, block_tokens=64,
    registers=255, spill_bytes=0, stack_bytes=0, shared_bytes=98_328, workers_per_sm=2,
    wanted_workers_per_sm=2, wgmma=28, mma=0, async_16_byte_loads=64, tma_loads=9, wgmma_loops=1,
    gemm_loop_local_ops=0, other_local_ops=0, wgmma_fences=3, proxy_fences=5, unfenced=0,
    gemm_loops=(LoopReport(0x1E50, 0x2F00, 376, 123, 298, 16, 0, 8, 2, ()),), spills_of_source={},
)  # fmt: skip
SPILL = "0x1f00: LDL R3, [R1+0x8]  [ffn.py:70]"
SPILLING = replace(
    CLEAN,
    spill_bytes=8,
    gemm_loop_local_ops=1,
    gemm_loops=(LoopReport(0x1E50, 0x2F00, 376, 123, None, 16, 0, 8, 2, (SPILL,)),),
    spills_of_source={"ffn.py:70": 1, "queue.py:28": 3},
)
CASE = CompileCase("rows128", ROWS128, MODELS["OLMoE"], "live")
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
    assert clean.startswith("| rows128 | OLMoE | live | 255 |")
    assert clean.endswith("| 5 | 3 | 376 / 123 / 298 |")
    assert spilling.endswith("| 376 / 123 / - |")


LAYERS = [
    case
    for case in compile_cases()
    if (case.split, case.stages) == ("one", "layer") and case.config in SHIPPED.values()
]


def test_every_shipped_config_is_compiled_for_every_model_and_route() -> None:
    cases = {(case.name, case.model.name, case.route) for case in LAYERS}
    routes = ("live", "given", "replay")
    assert cases == {(c, name, route) for c in SHIPPED for name in MODELS for route in routes}
    assert all(case.config == SHIPPED[case.name] for case in LAYERS)


def test_every_shipped_config_is_compiled_with_a_placement_and_with_named_slots() -> None:
    cases = {(case.name, case.split) for case in compile_cases() if case.split != "one"}
    assert cases == {(name, split) for name in SHIPPED for split in ("even", "slot")}


def test_every_shipped_config_is_compiled_with_its_clock() -> None:
    """The interpreter counts readings, so only a compiler sees the clock itself."""
    assert {case.name for case in compile_cases() if case.config.record_times} == set(SHIPPED)
    assert all(case.spec.timed == case.config.record_times for case in compile_cases())


def test_every_shipped_config_is_compiled_in_stages() -> None:
    cases = {(case.name, case.stages) for case in compile_cases() if case.stages != "layer"}
    assert cases == {(name, stages) for name in SHIPPED for stages in ("rows", "combine")}
    assert all(case.spec.stages == case.stages for case in compile_cases())


def test_every_lever_is_moved_alone_in_every_shipped_config() -> None:
    moved = {(case.name.split()[0], case.config) for case in lever_cases()}
    wanted = {
        (name, replace(config, **{lever: value}))
        for name, config in SHIPPED.items()
        for lever, values in LEVERS
        for value in values
    }
    assert moved == wanted - set(SHIPPED.items())


def test_a_new_lever_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megakernel.tools.compile_cases.LEVERS", (("record_times", (True,)),))
    assert [case.name for case in lever_cases()] == [f"{c} record_times=True" for c in SHIPPED]
    assert all(case.spec.timed for case in lever_cases())


def test_float32_is_compiled_in_every_route_for_every_kind_and_at_a_replays_height() -> None:
    cases = [case for case in compile_cases() if case.dtype == torch.float32]
    tall = replace(FLOAT32, block_rows=128)
    assert {case.config for case in cases} == {FLOAT32, tall}
    assert [case.route for case in cases if case.config == tall] == ["replay"]
    assert {case.route for case in cases} == {"live", "given", "replay"}
    assert {case.kind for case in cases} == set(KINDS)
    for case in cases:
        call = make_call(case)
        weights = [call.buffers.experts.down_EHI, call.buffers.experts.gate_up_bias_E2I]
        assert {w.dtype for w in [call.tokens, *weights] if w is not None} == {torch.float32}


def test_no_two_cases_are_the_same() -> None:
    assert len(set(compile_cases())) == len(compile_cases())


def cases_of(name: str) -> list[CompileCase]:
    return [case for case in compile_cases() if case.model.name == name]


@pytest.mark.parametrize("case", cases_of("gpt-oss-120b"), ids=str)
def test_gpt_oss_is_compiled_with_its_experts_and_biases(case: CompileCase) -> None:
    b, spec = make_call(case).buffers, case.spec
    assert spec.expert == ExpertRule("clamped_swiglu", 7.0, True, True)
    assert b.experts.gate_up_bias_E2I is not None and b.experts.down_bias_EH is not None
    assert (b.router.bias_E is None) == (case.route == "given")
    assert all(weight.tma and weight.transposed for weight in (spec.gate_up, spec.down))


@pytest.mark.parametrize("case", cases_of("DeepSeek-V3 routed"), ids=str)
def test_deepseek_v3_is_compiled_with_its_router_and_shared_expert(case: CompileCase) -> None:
    has_router = case.route != "given"
    rule = RouterRule("sigmoid", True, 2.5, 8, 4) if has_router else RouterRule()
    assert case.spec.router == rule
    assert (make_call(case).buffers.router.correction_bias_E is not None) == has_router
    assert case.spec.shared_width == 2048


@pytest.mark.parametrize(("split", "route"), [("even", "live"), ("slot", "given")])
def test_a_placement_has_more_slots_than_experts(split: str, route: str) -> None:
    case = replace(CASE, split=split, route=route)
    routing = make_call(case).buffers.routing
    assert case.spec.split == split
    assert case.spec.num_slots > case.spec.num_experts and case.spec.max_copies > 1
    assert (routing.slot_of_TK is not None) == (split == "slot")


def test_only_a_live_launch_counts_choices() -> None:
    load_of = {
        route: make_call(replace(CASE, route=route)).buffers.routing.load_E
        for route in ("live", "given", "replay")
    }
    counting = [route for route, load_E in load_of.items() if load_E is not None]
    assert counting == ["live"]


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("name", MODELS)
def test_each_phase_of_each_model_has_a_compiled_default(name: str, phase: str) -> None:
    assert any(phase in case.default_for for case in compile_cases() if case.model.name == name)


def fake_compile(case: CompileCase) -> Compilation:
    """As many registers as the model has experts; refuses to run in an interpreting process."""
    assert "TRITON_INTERPRET" not in os.environ
    wgmma = Instruction(0, "HGMMA.64x128x16.F32.BF16 R88, gdesc[UR4], R88")
    code, registers = Code((wgmma,)), case.model.num_experts - 1
    return Compilation(CubinReport(registers, 0, 0, 1000, code, ()), FenceCounts(1, 1, 0))


def failing_compile(case: CompileCase) -> Compilation:
    raise ValueError("too many words")


def test_reports_keep_the_order_of_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_check, "compile_case", fake_compile)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    models = [MODELS[name] for name in ("OLMoE", "JoyAI-LLM Flash", "Mixtral-8x7B")]
    reports = check([replace(CASE, model=model) for model in models])
    assert [(one.model, one.registers) for one in reports] == [
        ("OLMoE", 63), ("JoyAI-LLM Flash", 255), ("Mixtral-8x7B", 7),
    ]  # fmt: skip
    assert os.environ["TRITON_INTERPRET"] == "1", "left as it was"


def test_equal_specs_of_one_kind_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_check, "compile_case", fake_compile)
    monkeypatch.setitem(KINDS, "other", KINDS["plain"])
    twin = replace(CASE, model=replace(CASE.model, name="twin"))
    other = replace(CASE, kind="other")  # as far as a spec tells, its biases may be others
    half = replace(CASE, dtype=torch.float16)
    assert CASE.spec == twin.spec == other.spec == half.spec
    done: list[str] = []
    reports = check([CASE, twin, other, half], done.append)
    assert [(one.model, one.kind, one.dtype) for one in reports] == [
        ("OLMoE", "plain", "bfloat16"), ("twin", "plain", "bfloat16"),
        ("OLMoE", "other", "bfloat16"), ("OLMoE", "plain", "float16"),
    ]  # fmt: skip
    assert len(done) == 3
    assert done[0].startswith("1/3  rows128 for OLMoE, live")


def test_a_case_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_check, "compile_case", failing_compile)
    message = "rows128 for OLMoE, live, split one does not compile: too many words"
    with pytest.raises(RuntimeError, match=message):
        check([CASE])


@pytest.mark.parametrize(
    ("report", "status", "complaint"),
    [
        (CLEAN, 0, ""),
        (SPILLING, 1, "FAILED rows128 for OLMoE, live, split one: no spill inside a GEMM loop"),
    ],
    ids=["clean", "spilling"],
)
def test_the_exit_status_tells(
    report: CaseReport, status: int, complaint: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(compile_check, "check", lambda cases, progress: [report] * len(cases))
    assert main(["--json", "--model", "OLMoE", "--route", "live", "--config", *SHIPPED]) == status
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)) == len(SHIPPED)
    assert printed.err.count("FAILED") == status * len(SHIPPED)
    assert printed.err.startswith(complaint)


def test_figures_are_of_one_model_and_the_wanted_configs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[CompileCase] = []
    monkeypatch.setattr(compile_check, "check", lambda cases, _: [shown.extend(cases), CLEAN][1:])
    assert main(["--figures", "--config", "rows64", "rows64 tile_group=1", "float32"]) == 0
    assert [(case.name, case.route) for case in shown] == [
        ("rows64", "live"), ("rows64", "replay"), ("rows64 tile_group=1", "live"),
        ("float32", "live"), ("float32", "replay"),
    ]  # fmt: skip
    assert capsys.readouterr().out == format_figures([CLEAN]) + "\n"
    names = {case.name for case in figure_cases()}
    assert names >= {*SHIPPED, "float32"} | {case.name for case in lever_cases()}


def test_fences_are_counted_against_the_groups_of_products() -> None:
    ptx = f"\t{FENCE}\n\tbar.sync 0;\n\twgmma.fence.sync.aligned;\n\tst.shared.b32 [%r1], %r2;\n"
    assert count_fences(ptx) == FenceCounts(1, 1, 0)
    assert count_fences(ptx * 3) == FenceCounts(3, 3, 0)
    assert count_fences(ptx + ptx.replace(FENCE, "")) == FenceCounts(2, 1, 1)


def test_the_tall_config_compiles_clean_in_every_route() -> None:
    cases = [replace(CASE, route=route) for route in ("live", "given", "replay")]
    timed = replace(CASE, config=replace(ROWS128, record_times=True))
    for report in check([*cases, timed]):
        assert broken_rules(report) == []
        # FFN1 and FFN2 load rows asynchronously and weights by TMA; the router loads rows only.
        products = [loop for loop in report.gemm_loops if loop.tma_loads]
        assert [loop.tma_loads for loop in products] == [1, 1]  # gate and up come as one
        assert all(loop.wgmma and loop.async_16_byte_loads for loop in products)
        assert len(report.gemm_loops) - len(products) == (report.route != "given")
        # All of them read rows that came by cp.async.
        assert report.wgmma_fences == report.wgmma_loops == len(report.gemm_loops)
        assert report.proxy_fences >= report.wgmma_fences
        assert all(loop.after for loop in report.gemm_loops)


# One stage, so that it compiles fast.
ROWS = replace(CASE, name="rows64", config=ROWS64, route="replay", stages="rows")


def compile_as(case: CompileCase, fenced: bool) -> Compilation:
    """Compile a case whose spec says whether it is fenced, into a cache of its own."""
    spec = replace(case.spec, fenced=fenced)
    with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", cache)
        patch.setattr(CompileCase, "spec", spec)
        return compile_case(case)


def compile_without_fences(case: CompileCase) -> Compilation:
    return compile_as(case, fenced=False)


@pytest.mark.skipif(not needs_fences(triton.__version__), reason="this Triton has the fences")
def test_without_the_fences_the_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_check, "compile_case", compile_without_fences)
    (report,) = check([ROWS])
    assert broken_rules(report) == ["a proxy fence above each of 2 groups of wgmma: 2 have none"]


def compile_through_the_stage(case: CompileCase) -> Compilation:
    """Compile as on a Triton before 3.7.1, its own fences taken out, and count what is added."""
    fence_compilations(moe_kernel, "3.6.0")
    add_fences = fences.add_fences
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fences, "add_fences", lambda ptx: add_fences(ptx.replace(FENCE, "")))
        compiled = compile_as(case, fenced=True)
    assert triton.knobs.runtime.add_stages_inspection_hook is None
    return compiled


def test_fences_are_added_by_any_tritons_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_check, "compile_case", compile_through_the_stage)
    (report,) = check([ROWS])
    assert (report.wgmma_fences, report.proxy_fences, report.unfenced) == (2, 2, 0)
    assert broken_rules(report) == []


def test_the_config_for_float32_launches_no_more_workers_than_fit() -> None:
    case = CompileCase("float32", FLOAT32, MODELS["OLMoE"], "given", dtype=torch.float32)
    (report,) = check([case])
    assert broken_rules(report) == []
    assert len(report.gemm_loops) == 2 and not report.wgmma


@pytest.mark.slow
def test_the_program_passes_for_all_models() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megakernel.tools.compile_check", "--json"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    assert len(reports) == len(compile_cases())
    assert all(report.keys() >= REQUIRED for report in reports)
