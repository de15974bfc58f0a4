"""The list of kernels that the GPU's tests and the ladder will launch, and that it is complete."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megakernel import moe
from megakernel.config import FLOAT32, ROWS128
from megakernel.launch.call import make_spec
from perf.gpu.plans import BACKWARD_LADDER, LADDER
from perf.gpu.recording import distinct, key_of, recording, stand_in_problem, untouched
from perf.gpu.testing import DESELECTED
from perf.problems.cases import SHAPES, Case
from perf.problems.providers import OURS
from perf.problems.training import OURS_TRAINING, make_step
from tests.helpers.sources import ROOT

RECORD = """
import json, sys
from pathlib import Path
from perf.gpu.compiling import name_of
from perf.gpu.recording import distinct
from tests.gpu.recorded import record_ladder, record_tests

paths = [Path(name) for name in sys.argv[2:]]
found = record_ladder() if sys.argv[1] == "ladder" else record_tests(paths)
kernels = [name_of(call) for call in distinct(found.calls)]
print(json.dumps([found.bodies, found.errors, kernels]))
"""
Recorded = tuple[int, dict[str, str], list[str]]


@pytest.fixture(scope="module")
def record() -> Callable[..., Recorded]:
    """Record in a process that does not interpret kernels, as a run on a GPU does."""

    def call(*arguments: str) -> Recorded:
        environment = {key: text for key, text in os.environ.items() if key != "TRITON_INTERPRET"}
        command = [sys.executable, "-c", RECORD, *arguments]
        out = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
        bodies, errors, kernels = ast.literal_eval(out)
        return bodies, errors, kernels

    return call


@pytest.fixture(scope="module")
def of_tests(record: Callable[..., Recorded]) -> Recorded:
    """What all GPU tests launch."""
    return record("tests")


def selected_tests() -> list[str]:
    """Return the ids of the tests that the run on a GPU selects."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-m", "gpu and not slow"]
    out = subprocess.check_output([*command, "tests/gpu"], cwd=ROOT, text=True)
    found = [line for line in out.splitlines() if "::" in line]
    return [line for line in found if not any(name in line for name in DESELECTED)]


def test_every_selected_test_was_heard_to_its_end(of_tests: Recorded) -> None:
    bodies, errors, _ = of_tests
    assert errors == {}
    assert bodies == len(selected_tests()) > 60


def test_the_list_of_the_tests_holds_what_they_are_known_to_compile(of_tests: Recorded) -> None:
    kernels = set(of_tests[2])
    assert {
        "layer live one bfloat16 EHI 256x7168x2048 rows128 groups2",
        "layer live one bfloat16 EHI 256x7168x2048 rows16 groups8",
        "layer live one float32 EHI 128x2048x768 rows32 groups2",
        "layer replay one bfloat16 EHI 128x2048x768 rows64 groups4",
        "layer given slot bfloat16 EHI 128x2048x768 rows64 groups4",
        "layer live one bfloat16 EHI 128x2048x768 rows16 groups8 timed",
        "layer given one float32 EHI 4x64x32 rows16 groups2",
        "layer live one bfloat16 EHI 7x96x48 rows16 groups2",
        "layer live one float16 EHI 7x96x48 rows16 groups2",
        "backward given one bfloat16 EHI 128x2048x768 rows64 groups4 z",
        "backward given one bfloat16 EHI 4x64x32 rows16 groups2 z to float32",
    } <= kernels
    assert len(of_tests[2]) >= 35


NEW_TEST = """
from dataclasses import replace
from megakernel.config import ROWS16
from tests.gpu.layers import make_layer
from tests.helpers.inputs import run

def launch(device, groups):
    return run(make_layer("OLMoE", 64, device), config=replace(ROWS16, column_groups=groups))

def test_to_its_end(device):
    assert float(launch(device, 4).y_TH.sum()) == 5
    assert device is None
    assert launch(device, 2) == 7

def test_broken(device):
    launch(device, 1)
    raise OSError("x")
"""


@pytest.mark.slow
def test_a_new_test_brings_its_kernels_and_one_that_breaks_is_named(
    record: Callable[..., Recorded], tmp_path: Path
) -> None:
    path = tmp_path / "test_gpu_new.py"
    path.write_text(NEW_TEST)
    bodies, errors, kernels = record("tests", str(path))
    assert bodies == 2 and errors == {"test_broken 0": "OSError: x"}
    groups = [kernel.partition(" groups")[2] for kernel in kernels]
    assert groups == ["4", "2", "1"]


@pytest.mark.slow
def test_every_rung_of_the_ladder_was_heard_to_its_end(
    record: Callable[..., Recorded],
) -> None:
    bodies, errors, kernels = record("ladder")
    assert errors == {}
    assert bodies == len([step for step in (*LADDER, *BACKWARD_LADDER) if not step.explains])
    assert len(kernels) >= 60
    assert {
        "backward replay one bfloat16 EHI 128x2048x768 rows128 groups2 z",
        "backward given one bfloat16 EHI 128x2048x768 rows128 groups2",
        "backward given one bfloat16 EHI 128x2048x768 rows128 groups2 z to float32",
        "backward given one bfloat16 EHI 128x2048x768 rows16 groups8 z",
        "layer replay one bfloat16 EHI 128x2048x768 rows128 groups2 z",
    } <= set(kernels)
    for height, route in ((16, "replay"), (64, "live"), (128, "given")):
        assert any(f"rows{height} " in one and f" {route} " in one and "2048" in one
                   for one in kernels)  # fmt: skip


def test_nothing_is_launched_and_configs_are_those_of_a_gpu() -> None:
    problem = stand_in_problem(Case(SHAPES["Qwen3-30B-A3B"], 8192))
    with recording() as calls:
        for provider in OURS:
            provider.prepare(problem)()
    assert [call.rule.route for call in calls] == ["live", "replay", "given"]
    for call in calls:
        assert call.rule.config.block_rows == ROWS128.block_rows
        assert call.tokens.device.type == "meta" and call.tokens.shape == (8192, 2048)
        assert call.buffers.experts.gate_up_E2IH.stride() == (2 * 768 * 2048, 2048, 1)
        assert make_spec(call).top_k == 8


def test_float32_takes_its_own_config() -> None:
    case = Case(SHAPES["tiny"], 8)
    problem = stand_in_problem(case)
    as_float = {name: getattr(problem, name).float() for name in
                ("x_TH", "router_EH", "gate_up_E2IH", "down_EHI")}  # fmt: skip
    with recording() as calls:
        OURS[0].prepare(type(problem)(**{**vars(problem), **as_float}))()
    assert calls[0].rule.config.block_i == FLOAT32.block_i


def test_kernels_differ_by_spec_warps_and_types_alone() -> None:
    with recording() as calls:
        for num_tokens in (64, 60):
            OURS[0].prepare(stand_in_problem(Case(SHAPES["OLMoE"], num_tokens)))()
        OURS[1].prepare(stand_in_problem(Case(SHAPES["OLMoE"], 64)))()
    assert key_of(calls[0]) == key_of(calls[1]) != key_of(calls[2])
    assert distinct(calls) == [calls[0], calls[2]]


def test_every_way_to_train_is_heard_forward_and_backward() -> None:
    """Buffers in float32 take no memory while one listens, and are told apart."""
    problem = stand_in_problem(Case(SHAPES["Qwen3-30B-A3B"], 64))
    with recording() as calls:
        for provider in OURS_TRAINING:
            make_step(provider, problem)()
    heard = [(call.rule.stages, call.rule.route, call.is_added) for call in calls]
    assert heard[::2] == [("layer", route, 0) for route in
                          ("live", "replay", "live", "live", "live")]  # fmt: skip
    assert heard[1::2] == [
        ("backward", route, int(added))
        for route, added in (("given", 0), ("replay", 0), ("given", 0), ("given", 0), ("given", 1))
    ]
    kept = [call.buffers.gradients.down_EHI.dtype for call in calls[1::2]]
    assert kept == [torch.bfloat16] * 3 + [torch.float32] * 2
    # Two live forwards of one kernel each save alike; overwritten or added to is one kernel.
    assert len(distinct(calls)) == 7


def test_the_recorder_leaves_everything_as_it_was() -> None:
    with recording():
        pass
    from tests.helpers.cases import SHAPES as SMALL_SHAPES
    from tests.helpers.inputs import make_inputs, run

    inputs = make_inputs(SMALL_SHAPES[0])
    assert run(inputs).y_TH.isfinite().all()
    assert moe.__globals__["default_config"].__name__ == "default_config"


def test_weights_that_nobody_touches_take_no_memory() -> None:
    weight = untouched(256, 4096, 7168)
    assert weight.shape == (256, 4096, 7168) and weight.dtype == torch.bfloat16
    assert float(weight[255, 4095, 7167]) == 0 and weight.data_ptr() % 4096 == 0
