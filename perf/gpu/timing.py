"""First times: a layer by CUDA graph beside PyTorch's grouped products, and one timed launch."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from megakernel import KernelConfig
from megakernel.launch.call import Call
from megakernel.launch.tuned import default_config
from megakernel.tools.timeline import read_timeline
from perf.gpu.child import Context
from perf.gpu.plans import TIMED
from perf.gpu.recording import GPU, recording, stand_in_problem
from perf.measuring.measure import Protocol, Timing
from perf.measuring.roofline import ASSUMED_H200, Roofs
from perf.problems.cases import SHAPES, TINY, Case
from perf.problems.providers import Provider, configured_call, grouped_mm
from perf.problems.ready import prepare
from perf.problems.tensors import make_problem
from perf.results import record, timelines
from perf.suites.bench import Bench
from perf.suites.layer import time_providers
from perf.suites.timeline import make_saved

ROUNDS = Protocol(warm_ups=3, rounds=20)
REHEARSED_ROUNDS = Protocol(warm_ups=0, rounds=1)
MAX_POLLS = 1 << 19  # a wait gives up after 0.7 s
REHEARSED_TOKENS = 8


def make_case(context: Context, model: str, num_tokens: str) -> Case:
    """Return what is timed; in a rehearsal something tiny."""
    if context.rehearse:
        return Case(TINY, min(int(num_tokens), REHEARSED_TOKENS))
    return Case(SHAPES[model], int(num_tokens))


def make_bench(context: Context) -> Bench:
    """Return where times are taken, with the roofs that an earlier step measured."""
    kept = context.read("roofs")
    return Bench(
        context.device,
        protocol=REHEARSED_ROUNDS if context.rehearse else ROUNDS,
        known_roofs=Roofs(**kept) if kept else ASSUMED_H200,
        say=context.say,
    )


def bounded_config(case: Case, device: torch.device) -> KernelConfig:
    """Return the default config of a case, with waits that give up early on a GPU."""
    config = default_config(case.layer, case.num_tokens, torch.bfloat16, device)
    return replace(config, max_polls=MAX_POLLS) if device.type == "cuda" else config


def ours(config: KernelConfig) -> tuple[Provider, ...]:
    """Return our layer on both routes with a config."""
    return tuple(
        Provider(f"ours {route}", partial(configured_call, route=route, config=config),
                 is_ours=True)
        for route in ("live", "replay")
    )  # fmt: skip


def time_layer(context: Context, model: str, num_tokens: str) -> dict:
    """Check and time live, replay and grouped_mm on one layer.

    Raises:
        AssertionError: if something of ours is wrong, which then has no time.
    """
    case, bench = make_case(context, model, num_tokens), make_bench(context)
    providers = (*ours(bounded_config(case, context.device)), Provider("grouped_mm", grouped_mm))
    timing_of = time_providers(bench, "forward", case, providers)
    return told(context, bench, timing_of, f"forward_{case.model.name}_{num_tokens}")


def told(
    context: Context, bench: Bench, timing_of: dict[tuple[str, str], Timing], name: str
) -> dict:
    """Keep what a step measured as ``name``.csv; return its medians and rates, and both in words.

    Raises:
        AssertionError: if something of ours is wrong, which then has no time.
    """
    record.write(bench.rows, context.folder / f"{name}.csv")
    for note in bench.notes:
        context.say(note)
    if bench.failures:
        raise AssertionError("; ".join(bench.failures))
    mode = "graph" if bench.on_gpu else "eager"
    medians = {who: round(t.median, 1) for (m, who), t in timing_of.items() if m == mode}
    rates = {row.provider: round(row.median) for row in bench.rows
             if row.mode == mode and row.metric == "rate"}  # fmt: skip
    text = ", ".join(f"{who} {us} us ({rates[who]} TFLOP/s)" for who, us in medians.items())
    return {"text": text, "us": medians, "tflops": rates}


def timed_launch(context: Context, model: str, num_tokens: str) -> dict:
    """Keep what every task of one live launch did when.

    Raises:
        AssertionError: if the timed launch is wrong.
    """
    case, bench = make_case(context, model, num_tokens), make_bench(context)
    config = replace(bounded_config(case, context.device), record_times=True)
    ready = prepare(make_problem(case, context.device), ours(config)[:1], context.say)
    if ready.failed:
        raise AssertionError(str(ready.failed))
    ready.calls["ours live"]()
    times = read_timeline(context.device)
    saved = make_saved(bench, case, "live", times)
    timelines.save(saved, context.folder / f"timeline_{case.model.name}_{num_tokens}_live.npz")
    us = {name: round(value, 1) for name, value in times.us_of_kind().items()}
    text = f"{times.launch_us:.0f} us, of them per worker: " + ", ".join(
        f"{name} {value}" for name, value in us.items() if value
    )
    return {"text": text, "us_of_kind": us, "busy_share": times.busy_share}


def calls(timed: Sequence[tuple[str, int]] = TIMED) -> list[Call]:
    """Return the calls of this module's steps."""
    with recording() as found:
        for model, num_tokens in timed:
            case = Case(SHAPES[model], num_tokens)
            problem, config = stand_in_problem(case), bounded_config(case, GPU)
            for provider in ours(config):
                provider.prepare(problem)()
            if (model, num_tokens) == timed[0]:
                configured_call(problem, "live", replace(config, record_times=True))()
    return found
