"""Predict the time of a launch for a config and a routing, or search better configs.

Nothing is measured: the figures come from a model of the queue and of the machine.
"""

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from megakernel.autograd import SAVES
from megakernel.config import SHIPPED, KernelConfig
from megakernel.plan.backward_spec import BackwardSpec
from megakernel.tools.compile_cases import ROUTES
from megakernel.tools.timeline import Timeline
from perf.arguments import TRACE_HELP, count, rate
from perf.measuring.roofline import GRADIENT_BYTES, Work, backward_work, useful_work
from perf.problems.cases import RECORDING, SCENARIOS, SHAPES, Case, make_loads
from perf.results import record
from perf.results.drawing import file_formats
from perf.results.record import LABEL
from perf.results.timelines import PREDICTED, Saved, plot_timeline
from perf.simulator.backward import make_backward_launch
from perf.simulator.backward_costs import BackwardCosts
from perf.simulator.costs import H100, H200, Machine, MeasuredCosts, RooflineCosts
from perf.simulator.predict import (
    Launch,
    TaskCosts,
    describe,
    make_launch,
    search_configs,
    simulate,
)

PASSES = ("forward", "backward")
GPUS = {"H200": H200, "H100": H100}
UNSEEN = ("max_polls", "record_times")  # the simulator does not know them
SETTABLE = tuple(field.name for field in fields(KernelConfig) if field.name not in UNSEEN)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the case, the config, what is assumed of the machine, and what to print."""
    parser.add_argument("--model", choices=SHAPES, default="Qwen3-30B-A3B")
    parser.add_argument("--tokens", type=count, default=8192)
    parser.add_argument("--scenario", choices=SCENARIOS, default="recorded")
    parser.add_argument("--trace", type=Path, default=RECORDING, help=TRACE_HELP)
    parser.add_argument("--route", choices=ROUTES, default="live")
    parser.add_argument("--pass", dest="direction", choices=PASSES, default=PASSES[0])
    parser.add_argument("--save", choices=SAVES, default=SAVES[0], help="of a backward")
    parser.add_argument(
        "--gradients", choices=GRADIENT_BYTES, default="bfloat16",
        help="of expert weights in a backward: their dtype, or float32 that is added to",
    )  # fmt: skip
    parser.add_argument("--gpu", choices=GPUS, default="H200", help="which GPU is assumed")
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
    machine, route = choose_machine(arguments.gpu, arguments.l2), arguments.route
    try:
        check_combination(arguments)
        load_E = make_loads(case)
        config = choose_config(arguments, case)
        launch = choose_launch(arguments, case, load_E, config, machine)
        costs, source = choose_costs(arguments, case, launch, machine)
    except (ValueError, OSError) as error:
        print(f"perf simulate: {error}", file=sys.stderr)
        return 2
    title = f"{case.name}, T = {case.num_tokens}, {route}{describe_pass(arguments)}"
    print(f"{LABEL}\n{title}, {source}")
    if arguments.search:
        ranked = search_configs(config, case.model, case.num_tokens, load_E, route, machine)
        for predicted_us, one in ranked[: arguments.search]:
            print(f"{predicted_us:9.0f} us predicted  {describe(one)}")
        return 0
    prediction = simulate(launch, costs, machine)
    print(f"config: {describe(config)}")
    flops = choose_work(arguments, case, load_E, SAVES[0]).flops
    least_us = machine.roofs.least_us(choose_work(arguments, case, load_E, arguments.save))
    print(format_prediction(prediction, flops, least_us))
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
    if arguments.direction == "backward" and (arguments.search or arguments.costs):
        raise ValueError("--pass backward must be without --search and --costs")
    if arguments.direction == "backward" and arguments.route == "given":
        raise ValueError("--pass backward must be with --route live or replay")
    if arguments.direction == "forward" and (arguments.save, arguments.gradients) != (
        SAVES[0], "bfloat16",
    ):  # fmt: skip
        raise ValueError("--save and --gradients must be with --pass backward")
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


def choose_machine(gpu: str, l2_tbps: float | None) -> Machine:
    """Return an assumed GPU, with another rate of L2 reads if one is given."""
    machine = GPUS[gpu]
    if l2_tbps is None:
        return machine
    return replace(machine, roofs=replace(machine.roofs, l2_bytes_per_s=l2_tbps * 1e12))


def choose_launch(
    arguments: argparse.Namespace,
    case: Case,
    load_E: np.ndarray,
    config: KernelConfig,
    machine: Machine,
) -> Launch:
    """Return the launch of the pass that was asked for."""
    layer = case.model, case.num_tokens, load_E, config, arguments.route
    if arguments.direction == "backward":
        return make_backward_launch(*layer, arguments.save, machine)
    return make_launch(*layer, machine)


def describe_pass(arguments: argparse.Namespace) -> str:
    """Say what is particular to a backward."""
    if arguments.direction == "forward":
        return ""
    return f", backward, saves {arguments.save}, gradients {arguments.gradients}"


def choose_work(arguments: argparse.Namespace, case: Case, load_E: np.ndarray, save: str) -> Work:
    """Return the work of the pass that was asked for; FFN1 run again is no useful part of it."""
    layer = case.model, case.num_tokens, load_E
    if arguments.direction == "backward":
        return backward_work(*layer, arguments.gradients, save)
    return useful_work(*layer)


def choose_costs(
    arguments: argparse.Namespace, case: Case, launch: Launch, machine: Machine
) -> tuple[TaskCosts, str]:
    """Return roofline costs, or what the timeline suite measured for the case; and their source.

    Raises:
        ValueError: if the file lacks it.
    """
    path, spec = arguments.costs, launch.schedule.spec
    if path is None:
        given = launch.schedule.num_tokens, launch.tiles, launch.num_workers, machine
        source = machine.roofs.source
        if isinstance(spec, BackwardSpec):
            return BackwardCosts(spec, *given, gradients=arguments.gradients), source
        return RooflineCosts(spec, *given), source
    wanted = ("timeline", case.name, case.num_tokens, f"ours {arguments.route}", "clock")
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


def format_prediction(prediction: Timeline, flops: float, least_us: float) -> str:
    """Say what is predicted, with the share of each kind of task.

    Args:
        prediction: of the launch.
        flops: that are useful.
        least_us: by the roofline.
    """
    tflops = flops / prediction.launch_us * 1e-6
    lines = [
        f"predicted: {prediction.launch_us:.0f} us, {tflops:.0f} TFLOP/s, "
        f"{least_us / prediction.launch_us:.0%} of the roofline ({least_us:.0f} us)",
        f"predicted worker time in tasks: {prediction.busy_share:.0%}; per worker, in us:",
        "  ".join(f"{name} {us:.0f}" for name, us in prediction.us_of_kind().items() if us),
    ]
    return "\n".join(lines)
