"""The rules on made-up reports, the bookkeeping on made-up compilers, and real compilations."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megakernel.config import SHIPPED
from megakernel.plan.rules import ExpertRule, RouterRule
from megakernel.tools import compile_check
from megakernel.tools.compile_cases import CompileCase, compile_cases, make_call
from megakernel.tools.compile_check import (
    COLUMNS,
    CaseReport,
    LoopReport,
    broken_rules,
    check,
    format_json,
    format_table,
    main,
)
from megakernel.tools.models import KINDS, MODELS
from megakernel.tools.sass import Code, CubinReport, Instruction

CLEAN = CaseReport(
    config="rows128", model="OLMoE", route="live", kind="plain", split="one", timed=False,
    default_for=["prefill"], block_rows=128, block_tokens=64, registers=255, spill_bytes=0,
    shared_bytes=98_328, workers_per_sm=2, wanted_workers_per_sm=2,
    wgmma=28, mma=0, async_16_byte_loads=64, tma_loads=9,
    gemm_loop_local_ops=0,
    gemm_loops=(LoopReport(0x1E50, 0x2F00, 16, 0, 8, 2, ()),), spills_of_source={},
)  # fmt: skip
SPILL = "0x1f00: LDL R3, [R1+0x8]  [ffn.py:70]"
SPILLING = replace(
    CLEAN,
    spill_bytes=8,
    gemm_loop_local_ops=1,
    gemm_loops=(LoopReport(0x1E50, 0x2F00, 16, 0, 8, 2, (SPILL,)),),
    spills_of_source={"ffn.py:70": 1, "queue.py:28": 3},
)
CASE = CompileCase("rows128", MODELS["OLMoE"], "live")
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
def test_rules(changes: dict[str, int], rules: list[str]) -> None:
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


def test_every_shipped_config_is_compiled_for_every_model_and_route() -> None:
    cases = {
        (case.config_name, case.model.name, case.route)
        for case in compile_cases()
        if case.split == "one"
    }
    routes = ("live", "given", "replay")
    assert cases == {(c, name, route) for c in SHIPPED for name in MODELS for route in routes}


def test_every_shipped_config_is_compiled_with_a_placement_and_with_named_slots() -> None:
    cases = {(case.config_name, case.split) for case in compile_cases() if case.split != "one"}
    assert cases == {(config_name, split) for config_name in SHIPPED for split in ("even", "slot")}


def test_every_shipped_config_is_compiled_with_its_clock() -> None:
    """The interpreter counts readings, so only a compiler sees the clock itself."""
    assert {case.config_name for case in compile_cases() if case.timed} == set(SHIPPED)
    assert all(case.spec.timed == case.timed for case in compile_cases())


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


def fake_compile(case: CompileCase) -> CubinReport:
    """As many registers as the model has experts; refuses to run in an interpreting process."""
    assert "TRITON_INTERPRET" not in os.environ
    wgmma = Instruction(0, "HGMMA.64x128x16.F32.BF16 R88, gdesc[UR4], R88")
    return CubinReport(case.model.num_experts - 1, 0, 1000, Code((wgmma,)), ())


def failing_compile(case: CompileCase) -> CubinReport:
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
    assert CASE.spec == twin.spec == other.spec
    done: list[str] = []
    reports = check([CASE, twin, other], done.append)
    assert [(one.model, one.kind) for one in reports] == [
        ("OLMoE", "plain"), ("twin", "plain"), ("OLMoE", "other"),
    ]  # fmt: skip
    assert len(done) == 2
    assert done[0].startswith("1/2  rows128 for OLMoE, live")


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
    assert main(["--json", "--model", "OLMoE", "--route", "live"]) == status
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)) == len(SHIPPED)
    assert printed.err.count("FAILED") == status * len(SHIPPED)
    assert printed.err.startswith(complaint)


def test_the_tall_config_compiles_clean_in_every_route() -> None:
    cases = [replace(CASE, route=route) for route in ("live", "given", "replay")]
    for report in check([*cases, replace(CASE, timed=True)]):
        assert broken_rules(report) == []
        # FFN1 and FFN2 load rows asynchronously and weights by TMA; the router loads rows only.
        products = [loop for loop in report.gemm_loops if loop.tma_loads]
        assert [loop.tma_loads for loop in products] == [1, 1]  # gate and up come as one
        assert all(loop.wgmma and loop.async_16_byte_loads for loop in products)
        assert len(report.gemm_loops) - len(products) == (report.route != "given")


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
