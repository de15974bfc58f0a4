"""Runs rehearsed on the CPU: every step, and faults that are planted in them."""

import json
import tarfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from perf.gpu.plans import PLANS, rehearsed
from perf.gpu.process import Setting
from perf.gpu.run import run_plan
from perf.gpu.steps import Plan


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal left: its exit status, verdict, log by step, and the archive's files."""

    status: int
    verdict: list[str]
    log: dict[str, dict]
    packed: set[str]
    seconds: float


def rehearse(folder: Path, plan: Plan, faults: dict[str, str] | None = None) -> Rehearsed:
    """Run a plan, or a part of one, as --rehearse does."""
    out, start = folder / "out", time.monotonic()
    for one in (out, folder / "work", folder / "triton-cache"):
        one.mkdir(exist_ok=True)
    setting = Setting(folder / "work", folder / "triton-cache", True, faults or {})
    status = run_plan(plan, setting, out)
    with tarfile.open(out / f"{plan.name}.tgz") as tar:
        packed = set(tar.getnames())
    log = [json.loads(line) for line in (out / f"{plan.name}.log").read_text().splitlines()]
    verdict = (out / f"{plan.name}.verdict.txt").read_text().splitlines()
    seconds = time.monotonic() - start
    return Rehearsed(status, verdict, {line["step"]: line for line in log}, packed, seconds)


def part(*names: str, verb: str = "first") -> Plan:
    """Return a plan with some of its steps."""
    plan = rehearsed(PLANS[verb])
    return replace(plan, steps=tuple(step for step in plan.steps if step.name in names))


@pytest.mark.slow
def test_the_first_rungs(tmp_path: Path) -> None:
    seen = rehearse(tmp_path, part("machine", "smallest", "rows16-T64"))
    assert seen.status == 0 and seen.verdict[0].startswith("PASSED first: 3 steps")
    assert seen.log["smallest"]["text"] == "three routes agree"
    assert "torch" in seen.log["machine"]["text"]
    assert seen.log["rows16-T64"]["text"].startswith("error ")
    assert {"first.log", "first.verdict.txt", "run/steps/smallest/log"} <= seen.packed


@pytest.mark.slow
def test_a_hang_is_killed_and_nothing_follows(tmp_path: Path) -> None:
    plan = part("machine", "smallest")
    short = tuple(replace(step, limit_s=5.0) for step in plan.steps)
    seen = rehearse(tmp_path, replace(plan, steps=short), {"machine": "hang"})
    assert seen.status == 1 and seen.verdict[0].startswith("FAILED first: 0 steps")
    assert seen.verdict[1].startswith("hung machine: not done after 5 s")
    assert seen.verdict[2] == "skipped: smallest"
    assert "in main" in seen.log["machine"]["text"]  # where its stack was
    assert seen.seconds < 60 and "run/steps/machine/log" in seen.packed


def test_one_wrong_element_is_found_and_placed(tmp_path: Path) -> None:
    seen = rehearse(tmp_path, part("rows16-T64", "rows64-T512"), {"rows16-T64": "wrong"})
    assert seen.status == 1 and seen.verdict[2] == "skipped: rows64-T512"
    text = seen.log["rows16-T64"]["text"]
    assert text.startswith("rows16, 8 tokens: error ")
    assert "1 of 512 values are off by over 1 %" in text and "worst at (7, 63)" in text


@pytest.mark.slow
def test_bits_that_move_name_the_fence_and_are_explained(tmp_path: Path) -> None:
    plan = part("repeats-rows128", "fences", "stall")
    seen = rehearse(tmp_path, plan, {"repeats-rows128": "wrong"})
    text = seen.log["repeats-rows128"]["text"]
    assert "1 of 2 runs differ, first run 1: y: 1 of 1536 values differ, first at (23, 63)" in text
    assert "the first suspect is the proxy fence" in text
    assert seen.log["fences"]["verdict"] in ("passed", "failed")
    assert seen.log["stall"]["verdict"] == "skipped"


@pytest.mark.slow
def test_a_kernel_that_does_not_compile_is_a_failure(tmp_path: Path) -> None:
    seen = rehearse(tmp_path, part("compile", "smallest"), {"compile": "compile"})
    assert seen.status == 1 and "1 of 2 kernels do not compile" in seen.verdict[1]
    assert seen.log["smallest"]["verdict"] == "passed"
    assert any(name.startswith("triton-cache/") for name in seen.packed)


@pytest.mark.slow
@pytest.mark.parametrize("verb", PLANS)
def test_every_step_of_a_run(verb: str, tmp_path: Path) -> None:
    plan = rehearsed(PLANS[verb])
    seen = rehearse(tmp_path, plan)
    assert seen.status == 0, seen.verdict
    assert set(seen.log) == {step.name for step in plan.steps if not step.explains}
    assert {line["verdict"] for line in seen.log.values()} == {"passed"}
    suffixes = {Path(name).suffix for name in seen.packed}
    assert {".cubin", ".npz", ".csv"} <= suffixes
    assert len(list((tmp_path / "out").iterdir())) == 3
    if verb == "second":
        assert "run/steps/levers-Qwen/tuned.json" in seen.packed
