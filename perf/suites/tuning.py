"""Configs against one another on one layer, and the table that keeps the fastest."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, replace
from functools import partial
from pathlib import Path

from megakernel.config import KernelConfig, shipped_config
from megakernel.launch.tuned import Tuned, read_table
from perf.measuring.measure import Timing
from perf.problems.cases import Case
from perf.problems.providers import Provider, configured_call
from perf.problems.ready import prepare
from perf.problems.tensors import Problem, make_problem
from perf.results.record import provenance
from perf.suites.bench import Bench


def fastest(
    bench: Bench, case: Case, routes: Sequence[str], tried: dict[str, KernelConfig]
) -> tuple[Tuned, dict[str, dict[str, Timing]]]:
    """Check and time configs, and keep the one with the least sum of times.

    Args:
        bench: where, and how often each is timed.
        case: layer, tokens and routing.
        routes: live, replay or both; one config serves them all, since equal configs give equal
            bits.
        tried: configs by what describes them.

    Returns:
        The entry for the table, and timing_of[route][name].

    Raises:
        RuntimeError: if no config compiled and agreed with the reference on all routes.
    """
    problem = make_problem(case, bench.device)
    timing_of = {route: time_configs(bench, problem, route, tried) for route in routes}
    ran = [name for name in tried if all(name in timing_of[route] for route in routes)]
    if not ran:
        raise RuntimeError(f"no config ran for {case.name} T={case.num_tokens}")
    median_us = {name: {route: timing_of[route][name].median for route in routes} for name in ran}
    best = min(ran, key=lambda name: sum(median_us[name].values()))
    shipped = shipped_config(case.num_assignments, case.model.num_experts)
    untuned = next((name for name in ran if replace(tried[name], max_polls=None) == shipped), "")
    where = provenance()
    entry = Tuned(
        gpu=where["gpu"],
        layer=case.layer,
        num_tokens=case.num_tokens,
        config=tried[best],
        median_us=median_us[best],
        shipped_us=median_us.get(untuned, {}),
        torch=where["torch"],
        triton=where["triton"],
        commit=where["commit"],
        date=where["date"],
    )
    return entry, timing_of


def time_configs(
    bench: Bench, problem: Problem, route: str, configs: dict[str, KernelConfig]
) -> dict[str, Timing]:
    """Check and time configs on one problem; those that do not compile or are wrong drop out."""
    providers = [
        Provider(name, partial(configured_call, route=route, config=config))
        for name, config in configs.items()
    ]
    ready = prepare(problem, providers, bench.say)
    bench.notes += [f"{name}: {reason}" for name, reason in ready.skipped.items()]
    return bench.time(ready.calls)["graph" if bench.on_gpu else "eager"]


def merge_into_table(path: Path, entries: Iterable[Tuned]) -> None:
    """Write entries into a table, in place of those with the same key."""
    table = {entry.key: entry for entry in (*read_table(path), *entries)}
    in_order = sorted(
        table.values(), key=lambda entry: (entry.gpu, astuple(entry.layer), entry.num_tokens)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".new")
    written.write_text(json.dumps([asdict(entry) for entry in in_order], indent=1) + "\n")
    written.replace(path)  # at once: an interrupted write must not break the import
