"""Knobs of a config, each turned alone: what is the launch made quicker by, and at what price?

All but ``fast_sigmoid`` are to leave the bits as they are. Of one of them, ``half_tails``, only a
GPU can say so: its tensor cores would have to add up a row alike in a product of half the height.
So bits are compared before anything is timed, and the table takes no config that changes them.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import Tensor

import megakernel
from megakernel import KernelConfig
from megakernel.launch.call import Call
from perf.gpu.child import Context
from perf.gpu.recording import GPU, recording, stand_in_problem
from perf.gpu.timing import bounded_config, make_bench, make_case
from perf.problems.cases import SHAPES, Case
from perf.problems.providers import configured_call
from perf.problems.tensors import Problem, make_problem
from perf.suites.tuning import fastest, merge_into_table, time_configs

# Fields of KernelConfig and the values to try; the default's own is timed anyway.
LEVERS: dict[str, tuple[int | bool, ...]] = {
    "column_groups": (1, 2, 4),
    "tile_group": (4, 8, 16),
    "blocks_per_task": (1, 2, 4),
    "look_ahead": (False, True),
    "fast_sigmoid": (False, True),
    "half_tails": (False, True),
    "cache_hints": (False, True),
}
SWEPT = (("Qwen3-30B-A3B", 8192), ("Mixtral-8x7B", 8192))
ROUTES = ("live", "replay")
TABLE = "tuned.json"


def turned(
    config: KernelConfig, levers: Mapping[str, Sequence[int | bool]] = LEVERS
) -> dict[str, KernelConfig]:
    """Return a config and what it becomes with one lever turned, by what is turned.

    Raises:
        ValueError: on a lever that is no field: a misspelt one would go untried.
    """
    known = {field.name for field in fields(KernelConfig)}
    if unknown := sorted(levers.keys() - known):
        raise ValueError(f"levers must be fields of KernelConfig, got {unknown}")
    configs = {"default": config}
    for name, values in levers.items():
        others = [value for value in values if value != getattr(config, name)]
        configs |= {f"{name}={value}": with_lever(config, name, value) for value in others}
    return configs


def with_lever(config: KernelConfig, name: str, value: Any) -> KernelConfig:
    """Return a config with one field changed."""
    return replace(config, **{name: value})


def sweep(context: Context, model: str, num_tokens: str) -> dict:
    """Time every lever on one layer, both routes, and enter the fastest config in a table."""
    case, bench = make_case(context, model, num_tokens), make_bench(context)
    configs = turned(bounded_config(case, context.device))
    problem = make_problem(case, context.device)
    neutral = configs_of_same_bits(problem, configs)
    others = {name: config for name, config in configs.items() if name not in neutral}
    context.say(f"other bits than the default's: {', '.join(others) or 'none'}")
    entry, timing_of = fastest(bench, case, ROUTES, neutral)
    for route in ROUTES:
        timing_of[route] |= time_configs(bench, problem, route, others)
    entry = replace(entry, config=replace(entry.config, max_polls=None))
    merge_into_table(context.folder / TABLE, [entry])
    for note in bench.notes:
        context.say(note)
    us = {name: {route: round(timing_of[route][name].median, 1) for route in ROUTES
                 if name in timing_of[route]} for name in configs}  # fmt: skip
    for name, of_route in us.items():
        context.say(f"{name}: {of_route}")
    best = ", ".join(f"{route} {value:.0f} us" for route, value in entry.median_us.items())
    untuned = ", ".join(f"{route} {value:.0f} us" for route, value in us["default"].items())
    changed = {name: value for name, value in asdict(entry.config).items()
               if value != getattr(configs["default"], name) and name != "max_polls"}  # fmt: skip
    text = f"fastest {changed or 'default'}: {best}; default: {untuned}"
    return {"text": text, "us": us, "other_bits": sorted(others)}


def configs_of_same_bits(
    problem: Problem, configs: dict[str, KernelConfig]
) -> dict[str, KernelConfig]:
    """Return the configs whose output has the bits of the first one's, or that do not run.

    What does not run is left to whoever times it, who says why.
    """
    expected, same = None, {}
    for name, config in configs.items():
        try:
            y_TH = configured_call(problem, ROUTES[0], config)()
            megakernel.check()
        except Exception:
            same[name] = config
            continue
        expected = y_TH if expected is None else expected
        if torch.equal(bits_of(y_TH), bits_of(expected)):
            same[name] = config
    return same


def bits_of(y_TH: Tensor) -> Tensor:
    """Return numbers as integers, so that NaN equals itself and zeros keep their sign."""
    return y_TH.view(torch.int16 if y_TH.element_size() == 2 else torch.int32)


def calls() -> list[Call]:
    """Return the calls of the sweeps."""
    problems = [stand_in_problem(Case(SHAPES[name], num_tokens)) for name, num_tokens in SWEPT]
    with recording() as found:
        for problem in problems:
            configs = turned(bounded_config(problem.case, GPU)).values()
            for config, route in itertools.product(configs, ROUTES):
                configured_call(problem, route, config)()
    return found
