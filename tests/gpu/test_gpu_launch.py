"""What a call costs besides its one launch: nothing. What it says when something went wrong."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import megakernel
from megakernel import MegakernelStall, Placement, moe, moe_routed, prepare_replay
from megakernel.launch.workspace import workspace_for
from megakernel.plan.spec import KernelSpec
from tests.gpu.smallest import SAID
from tests.helpers.cases import SHAPES
from tests.helpers.compare import assert_same_bits
from tests.helpers.inputs import SMALL, Inputs, make_inputs, run

# The warnings of torch's own machinery are not ours to fix.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parents[2]
PLAIN = SHAPES[0]  # T 40, K 2, E 4, H 64, I 32
# Outputs a call allocates: y, weights, logits, and unless a replay brings them ids and loads.
OUTPUTS_OF_ROUTE = {"live": 5, "live placed": 5, "replay": 3, "given": 1}


def make_calls(inputs: Inputs) -> dict[str, Callable[[], object]]:
    """Return one warm call per route, as a user would write it."""
    live = run(inputs)
    ids_TK = live.expert_of_TK
    placement = Placement(torch.tensor([3, 2, 1, 0, 0], device=ids_TK.device))
    replay = prepare_replay(ids_TK, inputs.case.E, config=SMALL)
    layer = inputs.x_TH, inputs.router_EH, inputs.experts, inputs.router
    calls: dict[str, Callable[[], object]] = {
        "live": lambda: moe(*layer, config=SMALL),
        "live placed": lambda: moe(*layer, placement=placement, config=SMALL),
        "replay": lambda: moe(*layer, replay=replay, config=SMALL),
        "given": lambda: moe_routed(
            inputs.x_TH, ids_TK, live.gate_TK, inputs.experts, config=SMALL
        ),
    }
    for call in calls.values():
        call()
    return calls


def device_work(call: Callable[[], object], trace: Path) -> list[str]:
    """Return the names of the kernels, copies and fills that a call puts on the device."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        call()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    kinds = {"kernel", "gpu_memcpy", "gpu_memset"}
    return [event["name"] for event in events if event.get("cat") in kinds]


@pytest.mark.parametrize("route", OUTPUTS_OF_ROUTE)
def test_a_warm_call_is_exactly_one_kernel(route: str, cuda: torch.device, tmp_path: Path) -> None:
    call = make_calls(make_inputs(PLAIN, cuda))[route]
    counted = torch.zeros(1, device=cuda)
    assert device_work(lambda: counted.add_(1), tmp_path / "warm.json"), (
        "the profiler sees nothing"
    )
    assert device_work(call, tmp_path / "call.json") == ["moe_kernel"]


@pytest.mark.parametrize(("route", "outputs"), OUTPUTS_OF_ROUTE.items())
def test_a_warm_call_allocates_its_outputs_only(
    route: str, outputs: int, cuda: torch.device
) -> None:
    call = make_calls(make_inputs(PLAIN, cuda))[route]
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats(cuda)["allocation.all.allocated"]
    call()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats(cuda)["allocation.all.allocated"] - before == outputs


@pytest.mark.parametrize("route", OUTPUTS_OF_ROUTE)
def test_a_warm_call_never_synchronises(route: str, cuda: torch.device) -> None:
    call = make_calls(make_inputs(PLAIN, cuda))[route]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out is not None


def with_value(values_TK: Tensor, place: tuple[int, int], value: int) -> Tensor:
    """Return a copy with one entry changed."""
    changed_TK = values_TK.clone()
    changed_TK[place] = value
    return changed_TK


BAD_IDS = {
    "too large": (PLAIN.E, r"expert_of_TK\[7, 1\] must be an expert id or -1, got 4"),
    "far below": (-2, r"expert_of_TK\[7, 1\] must be an expert id or -1, got -2"),
    "twice": (None, r"expert_of_TK\[7, 1\] must differ from the token's other ids"),
}


@pytest.mark.parametrize("by", ["next call", "check"])
@pytest.mark.parametrize(("value", "message"), BAD_IDS.values(), ids=BAD_IDS)
def test_a_bad_id_is_skipped_and_reported(
    value: int | None, message: str, by: str, cuda: torch.device
) -> None:
    inputs = make_inputs(PLAIN, cuda)
    live = run(inputs)

    def given(ids_TK: Tensor) -> Tensor:
        return moe_routed(inputs.x_TH, ids_TK, live.gate_TK, inputs.experts, config=SMALL)

    good_TK = live.expert_of_TK
    bad = int(good_TK[7, 0]) if value is None else value
    skipped_TH = given(with_value(good_TK, (7, 1), -1))
    bad_TH = given(with_value(good_TK, (7, 1), bad))
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=message + ".*skipped by an earlier launch"):
        megakernel.check() if by == "check" else given(good_TK)
    assert_same_bits(actual=bad_TH, expected=skipped_TH)
    assert_same_bits(actual=given(good_TK), expected=live.y_TH)
    megakernel.check()


def test_a_slot_of_another_expert_is_skipped_and_reported(cuda: torch.device) -> None:
    inputs = make_inputs(PLAIN, cuda)
    live = run(inputs)
    identity_P = torch.arange(PLAIN.E, device=cuda)
    wrong = (int(live.expert_of_TK[11, 0]) + 1) % PLAIN.E
    slots_TK = with_value(live.expert_of_TK, (11, 0), wrong)
    run(inputs, placement=Placement(identity_P, slots_TK))
    with pytest.raises(ValueError, match=rf"slot_of_TK\[11, 0\].*chosen expert, got {wrong}"):
        megakernel.check()
    named = Placement(identity_P, live.expert_of_TK)
    assert_same_bits(actual=run(inputs, placement=named).y_TH, expected=live.y_TH)


STALLS = {
    # Side by side, whoever waits for a task that waits for it may be heard first.
    "route": (
        KernelSpec.ROUTE_DONE,
        r"prefix.*route tasks|prefix tasks|scatter tasks",
    ),
    "scatter": (KernelSpec.SCATTER_DONE, r"row tables\).*scatter tasks"),
    "column group": (
        KernelSpec.FIRST_COLUMN_GROUP,
        r"combine, .*column group 0.*FFN2 of column group 0",
    ),
}


@pytest.mark.parametrize("by", ["next call", "check"])
@pytest.mark.parametrize(("counter", "message"), STALLS.values(), ids=STALLS)
def test_a_broken_dependency_stalls_by_name_and_the_next_call_works(
    counter: int, message: str, by: str, device: torch.device
) -> None:
    if by == "next call" and device.type == "cpu":
        pytest.skip("an interpreted launch reports at once")
    inputs = make_inputs(PLAIN, device)
    impatient = replace(SMALL, max_polls=20_000 if device.type == "cuda" else 2)
    expected = run(inputs, config=impatient)
    counters = workspace_for(device).control.counters
    counters[counter * KernelSpec.COUNTER_STRIDE] = -100

    def stall_and_hear_of_it() -> None:
        run(inputs, config=impatient)
        if device.type == "cuda":
            torch.cuda.synchronize()
        megakernel.check() if by == "check" else run(inputs, config=impatient)

    with pytest.raises(MegakernelStall, match=message):
        stall_and_hear_of_it()
    actual = run(inputs, config=impatient)
    megakernel.check()
    assert_same_bits(actual=actual.y_TH, expected=expected.y_TH)
    assert int(counters.count_nonzero()) == 0


def test_tokens_on_the_cpu_are_refused_by_name(cuda: torch.device) -> None:
    inputs = make_inputs(PLAIN)
    with pytest.raises(ValueError, match=r"x_TH.*TRITON_INTERPRET=1.*reference\.moe"):
        run(inputs)


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer, also where only the toolkit's folder has it."""
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )


def start_sanitizer(program: str, tool: str) -> subprocess.Popen:
    """Start the smallest case under one of the sanitizer's tools."""
    return subprocess.Popen(
        [program, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no",
         sys.executable, "-m", "tests.gpu.smallest"],
        cwd=ROOT,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # a block per tensor: its bounds
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def test_the_sanitizer_finds_nothing(cuda: torch.device) -> None:
    program = find_sanitizer()
    if program is None:
        pytest.skip("needs compute-sanitizer, which comes with the CUDA toolkit")
    running = {tool: start_sanitizer(program, tool) for tool in ("memcheck", "racecheck")}
    output_of = {tool: process.communicate()[0] for tool, process in running.items()}
    if any("Device not supported" in output for output in output_of.values()):
        pytest.skip("compute-sanitizer says: Device not supported")
    for tool, output in output_of.items():
        assert running[tool].returncode == 0, output[-4000:]
        assert SAID in output


def test_the_sanitized_program_runs(device: torch.device) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.smallest"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == f"{SAID}\n", done.stderr
