"""The rungs of the backward, each a process of its own: see perf/gpu/plans.py.

They come when the forward is right and timed; waits are bounded as in its ladder.
"""

import time
from dataclasses import replace

import torch
from torch import Tensor

import megakernel
from megakernel import KernelConfig, MegakernelStall
from megakernel.launch.workspace import workspace_for
from megakernel.plan.protocol import Protocol
from perf.gpu.child import Context
from tests.gpu.checks import fail
from tests.gpu.gradients import (
    WEIGHTS,
    Trained,
    Way,
    assert_buffers_are_kept,
    assert_right,
    assert_same_gradients,
    train,
)
from tests.gpu.ladder import bits, bounded, layer, shipped
from tests.helpers.cases import SHAPES
from tests.helpers.inputs import SMALL, Inputs, make_inputs

# The first of them in every way; the others, awkward in their shapes, on the live route.
SMALL_CASES = ("plain", "odd-widths", "empty-experts")
SMALL_DTYPES = (torch.float32, torch.bfloat16)
WORKERS = (1, 3, 17)
REPEATS, REPEAT_SECONDS, BATCH = 200, 24.0, 20
REHEARSED_REPEATS = 2


def small_cases(context: Context) -> dict:
    """Awkward shapes in two dtypes: every gradient against float64, every way the same bits."""
    errors = {}
    for name in SMALL_CASES[:1] if context.rehearse else SMALL_CASES:
        shape = next(case for case in SHAPES if case.name == name)
        for dtype in SMALL_DTYPES[:1] if context.rehearse else SMALL_DTYPES:
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            inputs = make_inputs(replace(shape, dtype=dtype), context.device)
            config = bounded(SMALL)
            live = faulted(context, train(inputs, config))
            errors[label] = assert_right(label, inputs, live)
            for workers in WORKERS[:1] if context.rehearse else WORKERS:
                other = train(inputs, replace(config, num_workers=workers))
                assert_same_gradients(f"{label}, {workers} workers", other, live)
            if name == SMALL_CASES[0]:
                check_ways(label, inputs, config, live)
            megakernel.check()
            context.say(f"{label}: error {errors[label]:.1e}")
    return {"text": f"{len(errors)} layers, error at most {max(errors.values()):.1e}"} | errors


def check_ways(label: str, inputs: Inputs, config: KernelConfig, live: Trained) -> None:
    """Check the ways that change no bit, and a given routing, whose weights have a gradient."""
    for way in (Way("replay"), Way(save="nothing")):
        other = train(inputs, config, way, live)
        assert_same_gradients(f"{label}, {way.route}, saves {way.save}", other, live)
    given = train(inputs, config, Way("given"), live)
    assert_same_gradients(f"{label}, given", given, live, WEIGHTS)
    assert_right(f"{label}, given", inputs, given)
    assert_buffers_are_kept(label, inputs, config, live)


def faulted(context: Context, trained: Trained) -> Trained:
    """Return what was trained, with one element wrong where a rehearsal asks for it."""
    if context.fault == "wrong":
        trained.gradients["experts.down_EHI"][-1, -1, -1] += 100
    return trained


def one_layer(context: Context, height: str, num_tokens: str) -> dict:
    """Every gradient of the model's layer at one tile height, against float64."""
    inputs = layer(context, int(num_tokens))
    trained = faulted(context, train(inputs, shipped(height)))
    megakernel.check()
    error = assert_right(height, inputs, trained)
    return {"text": f"error at most {error:.1e}"}


def same_bits(context: Context) -> dict:
    """The model's layer live, replayed, saving nothing, and into float32 buffers."""
    inputs, config = layer(context, 4096), shipped("rows128")
    live = train(inputs, config)
    for way in (Way("replay"), Way(save="nothing")):
        other = faulted(context, train(inputs, config, way, live))
        assert_same_gradients(f"{way.route}, saves {way.save}", other, live)
    assert_buffers_are_kept("rows128", inputs, config, live)
    megakernel.check()
    return {"text": "live = replay = saving nothing; float32 buffers are overwritten and added to"}


def repeats(context: Context) -> dict:
    """The same step again and again, scratch poisoned before each pass: no bit may move."""
    inputs, config = layer(context, 4096), shipped("rows128")
    most = REHEARSED_REPEATS if context.rehearse else REPEATS
    first, start, done = train(inputs, config), time.monotonic(), 0
    while done < most and time.monotonic() - start < REPEAT_SECONDS:
        counts = []
        for _ in range(min(BATCH, most - done)):
            found = faulted(context, train(inputs, config))
            counts.append(count_different(found, first))
        megakernel.check()
        done += len(counts)
        context.say(f"{done} steps")
        differing = torch.stack(counts).tolist()
        if bad := [place for place, of_name in enumerate(differing) if any(of_name)]:
            seen = dict(zip(first.gradients, differing[bad[0]], strict=True))
            number = done - len(counts) + bad[0]
            fail(f"{len(bad)} of {len(counts)} steps differ, first step {number}: values {seen}")
    return {"text": f"{done} steps with equal bits", "steps": done}


def count_different(found: Trained, first: Trained) -> Tensor:
    """Count the values of each gradient whose bits differ, on the device."""
    return torch.stack([
        (bits(found.gradients[name]) != bits(gradient)).sum()
        for name, gradient in first.gradients.items()
    ])  # fmt: skip


def stall(context: Context) -> dict:
    """A signal of dH that is lost on purpose must be told by name, and the next step must work."""
    inputs = make_inputs(SHAPES[0], context.device)
    impatient = replace(SMALL, max_polls=2 if context.rehearse else 20_000)
    expected = train(inputs, impatient)
    megakernel.check()
    counters = workspace_for(context.device).control.counters

    def lose_a_signal() -> None:
        counters[Protocol.DH_DONE * Protocol.COUNTER_STRIDE] = -100

    text = ""
    try:
        train(inputs, impatient, between=lose_a_signal)
        megakernel.check()
    except MegakernelStall as error:
        text = str(error)
    if "dH tasks" not in text:
        fail(f"a lost signal of dH must stall who waits for it by name, got {text or 'nothing'!r}")
    assert_same_gradients("after a stall", train(inputs, impatient), expected)
    if int(counters.count_nonzero()):
        fail(f"counters must be zero after a stall, got {counters.nonzero().tolist()}")
    return {"text": text}
