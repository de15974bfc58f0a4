"""The rungs that a first run on a GPU climbs, each a process of its own: see perf/gpu/plans.py.

Every wait is bounded to 0.7 s, so a broken order is a named stall and not a hang.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import megakernel
from megakernel import KernelConfig, MegakernelStall, MoEOutput, moe_routed, prepare_replay
from megakernel.config import SHIPPED
from megakernel.launch import run as launch
from megakernel.launch.call import Call
from megakernel.launch.workspace import workspace_for
from megakernel.plan.order import INTERPRETED
from megakernel.plan.spec import KernelSpec
from perf.gpu.child import Context
from tests.gpu import smallest as program
from tests.gpu.checks import (
    MOST_ERROR,
    MOST_ROW_ERROR,
    assert_gate_is_right,
    assert_within,
    fail,
    fitting,
    times_eager_error,
)
from tests.gpu.layers import (
    eager_rows,
    make_layer,
    spread_tokens,
    truth_of_tokens,
    worst_row_error,
)
from tests.helpers.cases import SHAPES, Case
from tests.helpers.compare import assert_same_bits, relative_error
from tests.helpers.inputs import SMALL, Inputs, eager, make_inputs, run, truth

MODEL = "Qwen3-30B-A3B"
MAX_POLLS = 1 << 19
SMALL_CASES = ("plain", "one-token", "odd-widths", "many-experts", "empty-experts")
SMALL_DTYPES = (torch.float32, torch.bfloat16)
TRUE_TOKENS = 8
REPEATS, REPEAT_SECONDS, BATCH = 1000, 24.0, 50
FENCE_REPEATS, FENCE_SECONDS = 300, 8.0
REHEARSED_REPEATS, REHEARSED_CASES = 2, 2
# Knobs that are to leave the bits alone, turned away from the shipped config for tall tiles.
NEUTRAL: dict[str, Any] = {
    "blocks_per_task": 1, "look_ahead": False, "cache_hints": True, "column_groups": 4,
    "half_tails": True,
}  # fmt: skip


def bounded(config: KernelConfig) -> KernelConfig:
    """Return a config whose waits give up early, where they wait at all."""
    return config if INTERPRETED else replace(config, max_polls=MAX_POLLS)


def shipped(height: str) -> KernelConfig:
    """Return a shipped config by the height of its tiles."""
    return bounded(fitting(SHIPPED[height]))


def layer(context: Context, num_tokens: int) -> Inputs:
    """Draw the model's layer; in a rehearsal a tiny one."""
    torch.manual_seed(0)
    if not context.rehearse:
        return make_layer(MODEL, num_tokens, context.device)
    tiny = Case("tiny", min(num_tokens, 24), 2, 4, 64, 32, "a rehearsal", torch.bfloat16)
    return make_inputs(tiny, context.device)


def run_checked(context: Context, inputs: Inputs, config: KernelConfig) -> MoEOutput:
    """Run the layer twice, so that the second meets scratch that is all NaN; raise its errors."""
    run(inputs, config=config)
    out = run(inputs, config=config)
    megakernel.check()
    if context.fault == "wrong":
        out.y_TH[-1, -1] += 1
    return out


def smallest(context: Context) -> dict:
    """One token, one layer of four experts, on every route."""
    program.main(context.device, bounded(SMALL))
    return {"text": program.SAID}


def small_cases(context: Context) -> dict:
    """Five shapes that are awkward in different ways, in two dtypes and on three routes."""
    errors = {}
    for name in SMALL_CASES[:REHEARSED_CASES] if context.rehearse else SMALL_CASES:
        shape = next(case for case in SHAPES if case.name == name)
        for dtype in SMALL_DTYPES:
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            errors[label] = check_small(context, replace(shape, dtype=dtype), label)
            context.say(f"{label}: error {errors[label]:.1e}")
    return {"text": f"{len(errors)} layers, error at most {max(errors.values()):.1e}"} | errors


def check_small(context: Context, case: Case, label: str) -> float:
    """Check one small layer against float64, and its other routes against the live one."""
    inputs, config = make_inputs(case, context.device), bounded(SMALL)
    live = run_checked(context, inputs, config)
    assert_gate_is_right(inputs, live)
    true_TH = truth(inputs, live.expert_of_TK)
    eager_TH = eager(inputs, live.expert_of_TK.long())
    eager_error = relative_error(actual=eager_TH, expected=true_TH)
    eps = torch.finfo(case.dtype).eps
    most = min(
        times_eager_error(case.dtype, context.device) * eager_error + eps, MOST_ERROR[case.dtype]
    )
    error = assert_within(label, live.y_TH, true_TH, most)
    for route, y_TH in other_routes(inputs, live, config).items():
        same_as_live(f"{label} {route}", y_TH, live.y_TH)
    return error


def other_routes(inputs: Inputs, live: MoEOutput, config: KernelConfig) -> dict[str, Tensor]:
    """Return what the routes that are given the ids of the live one compute."""
    replay = prepare_replay(live.expert_of_TK, inputs.case.E, config=config)
    replayed_TH = run(inputs, replay=replay, config=config).y_TH
    routing = live.expert_of_TK, live.gate_TK
    given_TH = moe_routed(inputs.x_TH, *routing, inputs.experts, config=config)
    megakernel.check()
    return {"replay": replayed_TH, "given": given_TH}


def same_as_live(label: str, actual: Tensor, expected: Tensor) -> None:
    """Fail, naming the layer and the route, unless the bits are those of the live route."""
    try:
        assert_same_bits(actual=actual, expected=expected)
    except AssertionError as error:
        fail(f"{label} differs from live: {error}")


def one_layer(context: Context, height: str, num_tokens: str) -> dict:
    """The model's layer at one tile height, against eager PyTorch and float64."""
    inputs = layer(context, int(num_tokens))
    out = run_checked(context, inputs, shipped(height))
    assert_gate_is_right(inputs, out)
    eager_TH = eager_rows(inputs, out)
    tokens = spread_tokens(len(out.y_TH), TRUE_TOKENS, context.device)
    true_TH = truth_of_tokens(inputs, out, tokens)
    eager_error = relative_error(actual=eager_TH[tokens], expected=true_TH)
    most = min(eager_error + 1e-3, MOST_ERROR[torch.bfloat16])
    error = assert_within(f"{height}, {len(tokens)} tokens", out.y_TH[tokens], true_TH, most)
    row_error = worst_row_error(actual=out.y_TH, expected=eager_TH)
    if not row_error < MOST_ROW_ERROR:
        assert_within(f"{height} against eager, worst row {row_error:.1e}", out.y_TH, eager_TH, 0)
    return {"text": f"error {error:.1e}, eager's {eager_error:.1e}", "row_error": row_error}


def same_bits(context: Context) -> dict:
    """The three routes of the model's layer, at the lowest and the highest tile."""
    for height, num_tokens in (("rows16", 64), ("rows128", 4096)):
        inputs, config = layer(context, num_tokens), shipped(height)
        live = run_checked(context, inputs, config)
        for route, y_TH in other_routes(inputs, live, config).items():
            same_as_live(f"{height} {route}", y_TH, live.y_TH)
    return {"text": "live = replay = given at rows16 and rows128"}


def repeats(context: Context, height: str, num_tokens: str) -> dict:
    """The same layer again and again, scratch poisoned before each: the bits must not move."""
    inputs, config = layer(context, int(num_tokens)), shipped(height)
    most = REHEARSED_REPEATS if context.rehearse else REPEATS
    text, done, bad = repeat(context, inputs, config, most, REPEAT_SECONDS)
    if bad and config.block_rows >= 64:
        text += (
            "; rows16 held, so the first suspect is the proxy fence between cp.async and wgmma, "
            "which Triton before 3.7.1 leaves out"
        )
    if bad:
        fail(text)
    return {"text": text, "runs": done}


def repeat(
    context: Context, inputs: Inputs, config: KernelConfig, most: int, seconds: float
) -> tuple[str, int, int]:
    """Repeat a launch until one differs, the count is full or the time is up.

    Returns:
        What was seen, how many runs there were, and how many of the last batch differ.
    """
    first = run_checked(replace(context, fault=""), inputs, config)
    start, done = time.monotonic(), 0
    while done < most and time.monotonic() - start < seconds:
        outs = [run(inputs, config=config) for _ in range(min(BATCH, most - done))]
        megakernel.check()
        if context.fault == "wrong":
            outs[-1].y_TH[-1, -1] += 1
        differing = torch.stack([count_different(out, first) for out in outs]).tolist()
        done += len(outs)
        context.say(f"{done} runs")
        if bad := [place for place, count in enumerate(differing) if count]:
            run_number = done - len(outs) + bad[0]
            seen = first_difference(outs[bad[0]], first)
            text = f"{len(bad)} of {len(outs)} runs differ, first run {run_number}: {seen}"
            return text, done, len(bad)
    return f"{done} runs with equal bits", done, 0


def count_different(out: MoEOutput, first: MoEOutput) -> Tensor:
    """Count the values whose bits differ, on the device."""
    pairs = zip(out[:3], first[:3], strict=True)
    return torch.stack([(bits(got) != bits(want)).sum() for got, want in pairs]).sum()


def bits(values: Tensor) -> Tensor:
    """Return values as integers."""
    return values.view(torch.int16 if values.element_size() == 2 else torch.int32)


def first_difference(out: MoEOutput, first: MoEOutput) -> str:
    """Say which output differs, where and by how much."""
    for name, got, want in zip(("y", "ids", "weights"), out, first, strict=False):
        try:
            assert_same_bits(actual=got, expected=want)
        except AssertionError as error:
            return f"{name}: {error}"
    return "no difference is left"


def fences(context: Context) -> dict:
    """The repeats of the highest tile with the proxy fence and without: does it make the change?

    Raises:
        RuntimeError: if kernels have no such fence to leave out.
    """
    if "fenced" not in {field.name for field in fields(KernelSpec)}:
        raise RuntimeError("a kernel's spec has no field fenced: there is nothing to switch")
    inputs, config = layer(context, 4096), shipped("rows128")
    most = REHEARSED_REPEATS if context.rehearse else FENCE_REPEATS
    seen = {}
    for fenced in (True, False):
        with fences_set(fenced):
            seen[str(fenced)] = repeat(context, inputs, config, most, FENCE_SECONDS)[0]
    return {"text": f"with fences {seen['True']}; without {seen['False']}"}


@contextmanager
def fences_set(fenced: bool) -> Iterator[None]:
    """Launch kernels with the fence, or without, whatever the version asks for."""
    make_spec = launch.make_spec

    def make(call: Call) -> KernelSpec:
        return replace(make_spec(call), **{"fenced": fenced})

    with patch.object(launch, "make_spec", make):
        yield


def levers(context: Context) -> dict:
    """The highest tile with each knob turned that is to leave the bits as they are.

    Of ``half_tails`` only a GPU can say it: tensor cores would have to add up a row alike in
    products of 64 rows by 128 columns and of 64 by 256.
    """
    inputs, config = layer(context, 4096), shipped("rows128")
    expected = run_checked(replace(context, fault=""), inputs, config).y_TH
    told = []
    for name, value in NEUTRAL.items():
        actual = run_checked(context, inputs, replace(config, **{name: value})).y_TH
        try:
            assert_same_bits(actual=actual, expected=expected)
        except AssertionError as error:
            told.append(f"{name}={value}: {error}")
        context.say(f"{name}={value}: {told[-1] if told else 'equal bits'}")
    if told:
        fail("; ".join(told))
    return {"text": f"equal bits with {', '.join(NEUTRAL)} turned"}


def stall(context: Context) -> dict:
    """A signal that is lost on purpose must be told by name, and the next call must work."""
    inputs = make_inputs(SHAPES[0], context.device)
    impatient = replace(SMALL, max_polls=2 if context.rehearse else 20_000)
    expected = run_checked(context, inputs, impatient)
    counters = workspace_for(context.device).control.counters
    counters[KernelSpec.FIRST_COLUMN_GROUP * KernelSpec.COUNTER_STRIDE] = -100
    text = ""
    try:
        run(inputs, config=impatient)
        megakernel.check()
    except MegakernelStall as error:
        text = str(error)
    if "combine" not in text or "FFN2 of column group 0" not in text:
        fail(f"a lost signal of FFN2 must stall the combine by name, got {text or 'nothing'!r}")
    same_as_live("after a stall", run_checked(context, inputs, impatient).y_TH, expected.y_TH)
    if int(counters.count_nonzero()):
        fail(f"counters must be zero after a stall, got {counters.nonzero().tolist()}")
    return {"text": text}
