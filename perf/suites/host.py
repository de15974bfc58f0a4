"""What a call costs the host, and what the simulator predicts: both without a GPU."""

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megakernel.launch.run
from megakernel.config import KernelConfig
from megakernel.tools.models import MODELS
from perf.measuring.launches import count_launches
from perf.measuring.measure import Timing, time_host
from perf.measuring.roofline import useful_work
from perf.problems.cases import TINY, Case, make_loads
from perf.problems.peers import ALL_PROVIDERS
from perf.problems.providers import OURS, live_output, ours_given, replay_output
from perf.problems.ready import prepare
from perf.problems.tensors import Problem, make_problem
from perf.results.record import LABEL
from perf.simulator.predict import predict
from perf.suites.bench import Bench

ALLOCATING = ("empty", "zeros", "ones", "full", "clone", "arange", "randn")
SIMULATED_TOKENS = (64, 1024, 8192)
FULL_CALL_OF: dict[str, Callable[[Problem], Callable[[], torch.Tensor | tuple]]] = {
    "ours live": live_output,
    "ours replay": replay_output,
    "ours given": ours_given,
}


def host(bench: Bench) -> None:
    """Launches, host microseconds and allocations per call.

    On a GPU of every provider. Without one of ours alone, with the launch itself left out of the
    microseconds: they are our Python, not Triton's.
    """
    case = Case(MODELS["Qwen3-30B-A3B"], 1024) if bench.on_gpu else Case(TINY, 16)
    providers = bench.keep_providers(ALL_PROVIDERS if bench.on_gpu else OURS)
    problem = make_problem(case, bench.device)
    ready = prepare(problem, providers)
    bench.notes += [f"{name}: skipped, {reason}" for name, reason in ready.skipped.items()]
    bench.failures += [f"{name}: {reason}" for name, reason in ready.failed.items()]
    for name, call in ready.calls.items():
        with count_launches(bench.on_gpu) as launched:
            call()
        bench.add(
            "host", case, name, "counted", "launches", "launches", Timing.exact(len(launched))
        )
        if name in FULL_CALL_OF:
            beyond = count_allocations(FULL_CALL_OF[name](problem))
            metric = "allocations beyond outputs"
            bench.add("host", case, name, "counted", metric, "tensors", Timing.exact(beyond))
            check_ours(bench, name, len(launched), beyond)
    for name, timing in time_calls(bench, ready.calls).items():
        bench.add("host", case, name, "host", "time", "us", timing)


def check_ours(bench: Bench, name: str, launches: int, beyond: int) -> None:
    """A second launch, or memory that a warm call takes, is a failure."""
    if launches != 1:
        bench.failures.append(f"{name}: {launches} launches, not one")
    if beyond:
        bench.failures.append(f"{name}: {beyond} allocations beyond its outputs")


def time_calls(bench: Bench, calls: dict[str, Callable[[], torch.Tensor]]) -> dict[str, Timing]:
    """Host time of each call; without a GPU the kernel does nothing."""
    if not bench.on_gpu:
        with patch.object(megakernel.launch.run, "moe_kernel", NoKernel()):
            return time_host(calls, bench.protocol)

    timings = {}
    for name, call in calls.items():
        torch.cuda.synchronize(bench.device)  # so that no call waits for room in the queue
        timings.update(time_host({name: call}, bench.protocol))
    torch.cuda.synchronize(bench.device)
    return timings


class NoKernel:
    """Stands in for the kernel: takes any grid and any arguments, launches nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: None


class Allocations(TorchDispatchMode):
    """Remembers the tensors that PyTorch creates."""

    def __init__(self) -> None:
        super().__init__()
        self.created: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.removeprefix("new_")
        if name.startswith(ALLOCATING):
            self.created.append(made)
        return made


def count_allocations(call: Callable[[], torch.Tensor | tuple]) -> int:
    """Return how many tensors a warm call creates and does not return."""
    call()
    no_kernel = patch.object(megakernel.launch.run, "moe_kernel", NoKernel())
    with Allocations() as allocations, no_kernel:
        output = call()
    outputs = [output] if isinstance(output, torch.Tensor) else list(output)
    returned = {tensor.data_ptr() for tensor in outputs}
    return sum(tensor.data_ptr() not in returned for tensor in allocations.created)


def simulate(bench: Bench) -> None:
    """Predicted times of the default config, and of the speed plan's steps."""
    bench.notes.append(LABEL)
    for case in bench.each(simulated_cases(bench)):
        load_E = make_loads(case)
        work = useful_work(case.model, case.num_tokens, load_E)
        for step, (config, route, heights, choices) in speed_plan(case).items():
            prediction = predict(
                case.model, case.num_tokens, load_E, config, route, bench.machine, heights, choices
            )
            predicted = Timing.exact(prediction.launch_us)
            bench.add("simulate", case, step, "predicted", "time", "us", predicted)
            bench.add("simulate", case, step, "predicted", "rate", "TFLOP/s",
                      predicted.inverse(work.flops * 1e-6))  # fmt: skip


def simulated_cases(bench: Bench) -> list[Case]:
    """Every model at three sizes; quick: one model at one."""
    if bench.quick:
        return [Case(MODELS["Qwen3-30B-A3B"], 1024, "recorded")]
    return [Case(model, T, "recorded") for model in MODELS.values() for T in SIMULATED_TOKENS]


def speed_plan(case: Case) -> dict[str, tuple[KernelConfig, str, tuple[int, ...], int | None]]:
    """Config, route, tile heights and choices in flight after each step of the plan.

    Each step comes on top of the one before; the kernel does all but the last. None is what the
    kernel does.
    """
    shipped = case.default_config
    narrow = replace(
        shipped, block_i=64, block_h=128, num_warps=4, num_stages=3, block_experts=64,
        select_tokens=16, column_groups=1, workers_per_sm=1,
    )  # fmt: skip
    two_workers = replace(narrow, workers_per_sm=2)
    one_group = replace(shipped, column_groups=1)
    short = tuple(h for h in (16, 32, 64, 128) if h <= shipped.block_rows)
    return {
        "0 narrow tiles, one worker per SM": (narrow, "live", (), 1),
        "1 two workers per SM": (two_workers, "live", (), 1),
        "2 combine loads all choices at once": (two_workers, "live", (), None),
        "3 the shipped tiles and router": (one_group, "live", (), None),
        "4 the shipped column groups": (shipped, "live", (), None),
        "5 replay": (shipped, "replay", (), None),
        "6 tail tiles of fitting height": (shipped, "replay", short, None),
    }
