"""Predict the time of a launch for a config and a routing, or search better configs.

Nothing is measured: the figures come from a model of the queue and of the machine.
"""

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from megakernel.config import SHIPPED, KernelConfig
from megakernel.tools.compile_cases import ROUTES
from megakernel.tools.timeline import Timeline
from perf.arguments import TRACE_HELP, count, rate
from perf.measuring.roofline import useful_work
from perf.problems.cases import RECORDING, SCENARIOS, SHAPES, Case, make_loads
from perf.results import record
from perf.results.drawing import file_formats
from perf.results.record import LABEL
from perf.results.timelines import PREDICTED, Saved, plot_timeline
from perf.simulator.costs import H200, Machine, MeasuredCosts, RooflineCosts
from perf.simulator.predict import (
    Launch,
    TaskCosts,
    describe,
    make_launch,
    search_configs,
    simulate,
)

UNSEEN = ("max_polls", "record_times")  # the simulator does not know them
SETTABLE = tuple(field.name for field in fields(KernelConfig) if field.name not in UNSEEN)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the case, the config, what is assumed of the machine, and what to print."""
    parser.add_argument("--model", choices=SHAPES, default="Qwen3-30B-A3B")
    parser.add_argument("--tokens", type=count, default=8192)
    parser.add_argument("--scenario", choices=SCENARIOS, default="recorded")
    parser.add_argument("--trace", type=Path, default=RECORDING, help=TRACE_HELP)
    parser.add_argument("--route", choices=ROUTES, default="live")
    parser.add_argument("--config", choices=SHIPPED, help="default: the one moe() would choose")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=N", help="change the config"
    )
    parser.add_argument("--search", type=count, metavar="N", help="print the best N of a search")
    parser.add_argument("--l2", type=rate, metavar="TB/s", help="assume this rate of L2 reads")
    parser.add_argument("--costs", type=Path, help="timeline.csv of a run: what its tasks cost")
    parser.add_argument("--plot", type=Path, help="draw who does what when")


def run(arguments: argparse.Namespace) -> int:
    """Print a prediction, or a ranking; 2 on what cannot be predicted."""
    case = make_case(arguments)
    machine, route = choose_machine(arguments.l2), arguments.route
    try:
        check_combination(arguments)
        load_E = make_loads(case)
        config = choose_config(arguments, case)
        launch = make_launch(case.model, case.num_tokens, load_E, config, route, machine)
        costs, source = choose_costs(arguments.costs, case, route, launch, machine)
    except (ValueError, OSError) as error:
        print(f"perf simulate: {error}", file=sys.stderr)
        return 2
    title = f"{case.name}, T = {case.num_tokens}, {route}"
    print(f"{LABEL}\n{title}, {source}")
    if arguments.search:
        ranked = search_configs(config, case.model, case.num_tokens, load_E, route, machine)
        for predicted_us, one in ranked[: arguments.search]:
            print(f"{predicted_us:9.0f} us predicted  {describe(one)}")
        return 0
    prediction = simulate(launch, costs, machine)
    print(f"config: {describe(config)}")
    print(format_prediction(prediction, case, load_E, machine))
    if arguments.plot:
        saved = Saved(f"{title}\n{LABEL}", prediction, PREDICTED)
        print(f"wrote {plot_timeline(saved, arguments.plot)}")
    return 0


def make_case(arguments: argparse.Namespace) -> Case:
    """Return the case that was asked for."""
    return Case(
        SHAPES[arguments.model], arguments.tokens, arguments.scenario, trace=arguments.trace
    )


def check_combination(arguments: argparse.Namespace) -> None:
    """Raise ValueError on options that would contradict or ignore one another."""
    if arguments.search and (arguments.costs or arguments.plot):
        raise ValueError("--search must be without --costs and --plot, which are of one config")
    if arguments.costs and (arguments.config or arguments.set):
        raise ValueError(
            "--costs must be without --config and --set: tasks were measured with the default"
        )
    if arguments.plot and arguments.plot.suffix.removeprefix(".") not in file_formats():
        raise ValueError(
            f"--plot must end in one of {sorted(file_formats())}, got {arguments.plot}"
        )


def choose_config(arguments: argparse.Namespace, case: Case) -> KernelConfig:
    """Return the named or default config with the changes of --set."""
    changes: dict[str, Any] = {}
    for change in arguments.set:
        field, _, value = change.partition("=")
        if field not in SETTABLE or not value.isdigit():
            raise ValueError(
                f"--set must be FIELD=N with a field of {', '.join(SETTABLE)}, got {change!r}"
            )
        is_switch = isinstance(getattr(KernelConfig(), field), bool)
        changes[field] = bool(int(value)) if is_switch else int(value)
    chosen = SHIPPED[arguments.config] if arguments.config else case.default_config
    return replace(chosen, **changes)


def choose_machine(l2_tbps: float | None) -> Machine:
    """Return the assumed H200, with another rate of L2 reads if one is given."""
    if l2_tbps is None:
        return H200
    return replace(H200, roofs=replace(H200.roofs, l2_bytes_per_s=l2_tbps * 1e12))


def choose_costs(
    path: Path | None, case: Case, route: str, launch: Launch, machine: Machine
) -> tuple[TaskCosts, str]:
    """Return roofline costs, or what the timeline suite measured for the case; and their source.

    Raises:
        ValueError: if the file lacks it.
    """
    if path is None:
        schedule = launch.schedule
        costs = RooflineCosts(
            schedule.spec, schedule.num_tokens, launch.tiles, launch.num_workers, machine
        )
        return costs, machine.roofs.source
    wanted = ("timeline", case.name, case.num_tokens, f"ours {route}", "clock")
    found = {
        row.metric.removesuffix(" cost"): row
        for row in record.read([path])
        if row.metric.endswith(" cost")
        and (row.suite, row.case, row.T, row.provider, row.mode) == wanted
    }
    if not found:
        raise ValueError(f"--costs must hold the cost of tasks for {wanted}, got none in {path}")
    row = next(iter(found.values()))
    costs_us = {name: row.median for name, row in found.items()}
    return MeasuredCosts(costs_us), f"task times measured on {row.gpu} at {row.commit}, {path}"


def format_prediction(
    prediction: Timeline, case: Case, load_E: np.ndarray, machine: Machine
) -> str:
    """Say what is predicted, with the share of each kind of task."""
    work = useful_work(case.model, case.num_tokens, load_E)
    tflops = work.flops / prediction.launch_us * 1e-6
    bound_us = machine.roofs.least_us(work)
    lines = [
        f"predicted: {prediction.launch_us:.0f} us, {tflops:.0f} TFLOP/s, "
        f"{bound_us / prediction.launch_us:.0%} of the roofline ({bound_us:.0f} us)",
        f"predicted worker time in tasks: {prediction.busy_share:.0%}; per worker, in us:",
        "  ".join(f"{name} {us:.0f}" for name, us in prediction.us_of_kind().items()),
    ]
    return "\n".join(lines)
