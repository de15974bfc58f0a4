"""A suite in a process of its own, its rows on disk after every word it says."""

import time

import torch

from megakernel.launch.call import Call
from megakernel.launch.tuned import default_config
from perf.gpu.child import Context
from perf.gpu.plans import SUITE_SECONDS
from perf.gpu.recording import GPU, recording, stand_in_problem
from perf.gpu.timing import REHEARSED_ROUNDS
from perf.measuring.measure import QUICK
from perf.measuring.roofline import Roofs
from perf.problems.cases import Case
from perf.problems.peers import PEERS
from perf.problems.providers import OURS, PLAIN, Provider
from perf.problems.training import OURS_TRAINING, PASSES, make_step
from perf.results import record
from perf.suites.bench import Bench
from perf.suites.command import run_suite
from perf.suites.layer import QUICK_MODELS, SIZES, cases_of
from perf.suites.timeline import ROUTES, timed_cases, timed_providers
from perf.suites.training import training_cases

CERTAIN = tuple(provider.name for provider in (*OURS, *OURS_TRAINING, *PLAIN))
SHOWN = 6  # figures in the text


def run_one(context: Context, name: str, budget_s: str, who: str = "") -> dict:
    """Run one suite on the two models of a quick run.

    Args:
        context: of the step.
        name: of the suite.
        budget_s: seconds after which no new case starts.
        who: "peers" for every installed layer of other people's beside ours; "" for ours and
            plain PyTorch, whose figures no peer can then take along.

    Raises:
        AssertionError: if something of ours failed; its other figures are kept.
    """
    path = context.folder / f"{name}.csv"

    def say(text: str) -> None:
        context.say(text)
        record.write(bench.rows, path)  # now: a hung peer would take them along

    installed = [one.name for one in PEERS if not one.why_missing(context.device)]
    if who and not installed:
        return {"text": "no peer is installed"}
    roofs = context.read("roofs")
    bench = Bench(
        context.device,
        quick=True,
        protocol=REHEARSED_ROUNDS if context.rehearse else QUICK,
        deadline=time.monotonic() + float(budget_s),
        models=() if context.rehearse else QUICK_MODELS,
        providers=(*CERTAIN, *installed) if who else CERTAIN,
        known_roofs=Roofs(**roofs) if roofs else None,
        say=say,
    )
    failures = run_suite(name, bench, context.folder, anywhere=context.rehearse)
    if failures:
        raise AssertionError("\n".join(failures))
    mode = "graph" if bench.on_gpu else "eager"
    shown = [row for row in bench.rows if row.mode == mode and row.metric == "time"]
    text = ", ".join(f"{row.case} T={row.T} {row.provider} {row.median:.0f} us"
                     for row in shown[:SHOWN])  # fmt: skip
    return {
        "text": f"{len(bench.rows)} figures; {text}",
        "notes": list(dict.fromkeys(bench.notes)),
    }


def calls() -> list[Call]:
    """Return the calls of the suites that a run holds."""
    bench = Bench(GPU, quick=True, models=QUICK_MODELS)
    untimed = [case for name in SUITE_SECONDS if name in SIZES for case in cases_of(name, bench)]
    wanted: list[tuple[Case, tuple[Provider, ...]]] = [(case, OURS) for case in untimed]
    wanted += [(case, timed(case)) for case in timed_cases(bench)]
    trained = training_cases(bench) if set(PASSES) & SUITE_SECONDS.keys() else []
    with recording() as found:
        for case, providers in wanted:
            problem = stand_in_problem(case)
            for provider in providers:
                provider.prepare(problem)()
        for problem in map(stand_in_problem, trained):
            for provider in OURS_TRAINING:
                make_step(provider, problem)()
    return found


def timed(case: Case) -> tuple[Provider, ...]:
    """Return what the suite "timeline" times."""
    config = default_config(case.layer, case.num_tokens, torch.bfloat16, GPU)
    return tuple(one for route in ROUTES for one in timed_providers(config, route))
