"""The bookkeeping on made-up compilers, and real compilations."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

from megakernel.config import FLOAT32, ROWS64, ROWS128, SHIPPED
from megakernel.device.kernel import moe_kernel
from megakernel.launch import fences
from megakernel.launch.fences import FENCE, fence_compilations, needs_fences
from megakernel.tools import compile_check
from megakernel.tools.compile_backward import PURPOSES
from megakernel.tools.compile_cases import (
    ROUTES,
    CompileCase,
    compile_cases,
    figure_cases,
    lever_cases,
)
from megakernel.tools.compile_check import check, compile_case, main
from megakernel.tools.compile_report import (
    CaseReport,
    Compilation,
    FenceCounts,
    broken_rules,
    format_figures,
)
from megakernel.tools.cubin import CubinReport
from megakernel.tools.models import KINDS, MODELS
from megakernel.tools.sass import Code, Instruction
from tests.megakernel.tools.test_compile_report import CLEAN, REQUIRED, SPILLING

CASE = CompileCase("rows128", ROWS128, MODELS["OLMoE"], "live")


def fake_compile(case: CompileCase) -> Compilation:
    """As many registers as the model has experts; refuses to run in an interpreting process."""
    assert "TRITON_INTERPRET" not in os.environ
    wgmma = Instruction(0, "HGMMA.64x128x16.F32.BF16 R88, gdesc[UR4], R88")
    code, registers = Code((wgmma,)), case.model.num_experts - 1
    return Compilation(CubinReport(registers, 0, 0, 1000, code, ()), FenceCounts(1, 1, 0))


def failing_compile(case: CompileCase) -> Compilation:
    raise ValueError("too many words")


@pytest.mark.slow
def test_reports_keep_the_order_of_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_check, "compile_case", fake_compile)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    models = [MODELS[name] for name in ("OLMoE", "JoyAI-LLM Flash", "Mixtral-8x7B")]
    reports = check([replace(CASE, model=model) for model in models])
    assert [(one.model, one.registers) for one in reports] == [
        ("OLMoE", 63), ("JoyAI-LLM Flash", 255), ("Mixtral-8x7B", 7),
    ]  # fmt: skip
    assert os.environ["TRITON_INTERPRET"] == "1", "left as it was"


@pytest.mark.slow
def test_equal_specs_of_one_kind_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_check, "compile_case", fake_compile)
    monkeypatch.setitem(KINDS, "other", KINDS["plain"])
    case = replace(CASE, config=replace(CASE.config, fast_sigmoid=False))
    twin = replace(case, model=replace(case.model, name="twin"))
    other = replace(case, kind="other")  # as far as a spec tells, its biases may be others
    half = replace(case, dtype=torch.float16)
    assert case.spec == twin.spec == other.spec == half.spec
    done: list[str] = []
    reports = check([case, twin, other, half], done.append)
    assert [(one.model, one.kind, one.dtype) for one in reports] == [
        ("OLMoE", "plain", "bfloat16"), ("twin", "plain", "bfloat16"),
        ("OLMoE", "other", "bfloat16"), ("OLMoE", "plain", "float16"),
    ]  # fmt: skip
    assert len(done) == 3
    assert done[0].startswith("1/3  rows128 for OLMoE, live")


@pytest.mark.slow
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
    wanted = ["--model", "OLMoE", "--route", "live", "--purpose", "forward"]
    assert main(["--json", *wanted, "--config", *SHIPPED]) == status
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
        *([("rows64", "live"), ("rows64", "replay")] * 2),
        *([("float32", "live"), ("float32", "replay")] * 2),
    ]  # fmt: skip
    assert {case.purpose for case in shown} == {"forward", "saving", "backward"}
    assert capsys.readouterr().out == format_figures([CLEAN]) + "\n"
    names = {case.name for case in figure_cases()}
    assert names >= {*SHIPPED, "float32"} | {case.name for case in lever_cases()}


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


@pytest.mark.slow
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


# Not one test of all: none may last longer than a test is given.
PARTS = {
    "forward": ["--purpose", "forward"],
    **{f"training, {route}": ["--purpose", *PURPOSES[1:], "--route", route] for route in ROUTES},
}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("config", [*SHIPPED, "float32"])
def test_the_program_passes_for_all_models(config: str, part: str) -> None:
    cases = [case for case in compile_cases() if case.name.split()[0] == config]
    names = sorted({case.name for case in cases})
    command = [sys.executable, "-m", "megakernel.tools.compile_check", "--json", *PARTS[part]]
    done = subprocess.run(
        [*command, "--config", *names],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    is_part = {"forward": lambda case: case.purpose == "forward"}.get(
        part, lambda case: case.purpose != "forward" and case.route == part.split()[-1]
    )
    assert len(reports) == sum(map(is_part, cases)) > 0
    assert all(report.keys() >= REQUIRED for report in reports)


@pytest.mark.slow
def test_the_backward_compiles_to_products_that_run_under_the_next_loads() -> None:
    case = CompileCase("rows128", ROWS128, MODELS["Qwen3-30B-A3B"], "given", purpose="backward")
    (report,) = check([case])
    assert broken_rules(report) == []
    # dH and dX read weights by TMA; the gradients of weights gather rows, a lookup ahead.
    assert [loop.tma_loads for loop in report.gemm_loops] == [1, 1, 0, 0]
    assert [loop.async_16_byte_loads for loop in report.gemm_loops] == [4, 4, 12, 12]
    assert all(loop.wgmma == 4 and not loop.serial for loop in report.gemm_loops)
