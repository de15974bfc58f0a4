"""Predict a launch: a discrete-event model of the queue, for a config and a routing.

Nothing here is measured. Workers claim ids in order, wait for the tasks a task needs, and run it
(``perf.simulator.queue``) for what it demands (``perf.simulator.costs``); the order and the waits
are the kernel's own (``megakernel.plan.schedule``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megakernel.config import KernelConfig
from megakernel.plan.schedule import Schedule, Task
from megakernel.plan.spec import KernelSpec
from megakernel.tools.compile_cases import CompileCase
from megakernel.tools.models import ModelShape
from megakernel.tools.timeline import Timeline
from perf.extras import progress_bar
from perf.simulator.costs import H200, Demand, Machine, RooflineCosts, Tiles
from perf.simulator.queue import Play

TaskCosts = Callable[[Sequence[Task]], list[Demand]]

# Tile shapes that compile for sm_90 without spills in a queue of this kind: rows, gate and up
# columns of FFN1, columns of FFN2, step, warps, stages, workers per multiprocessor.
TILE_FIELDS = (
    "block_rows", "block_i", "block_h", "step", "num_warps", "num_stages", "workers_per_sm",
)  # fmt: skip
TILE_SHAPES = (
    (256, 64, 128, 64, 8, 4, 1),
    (128, 128, 256, 64, 8, 3, 1),
    (128, 128, 256, 64, 8, 4, 1),
    (128, 64, 128, 64, 4, 3, 2),
    (128, 64, 128, 64, 8, 3, 1),
    (64, 128, 256, 64, 4, 2, 2),
    (64, 128, 256, 64, 4, 3, 1),
    (64, 64, 128, 64, 4, 4, 2),
    (32, 64, 128, 128, 4, 3, 1),
    (16, 64, 64, 128, 4, 4, 1),
    (16, 64, 64, 128, 4, 3, 2),
    (16, 32, 64, 128, 4, 4, 2),
    (16, 64, 128, 128, 4, 3, 2),
)
ORDERS = {
    "column_groups": (1, 2, 4, 8), "tile_group": (2, 4, 8, 16), "blocks_per_task": (1, 2, 4, 8),
}  # fmt: skip
LEAST_GAIN = 0.995  # steps of less are within the model's error, and a search has many
SHOWN_FIELDS = (*TILE_FIELDS, *ORDERS, "num_workers")


@dataclass(frozen=True, eq=False)
class Launch:
    """What is launched.

    Attributes:
        schedule: the task list.
        tiles: what its row tiles hold.
        num_workers: programs that claim its tasks.
    """

    schedule: Schedule
    tiles: Tiles
    num_workers: int


def make_tiles(load_E: np.ndarray, block_rows: int) -> Tiles:
    """Cut each expert's rows into tiles."""
    tiles_E = -(-load_E // block_rows)
    expert_of_tile = np.repeat(np.arange(len(load_E)), tiles_E)
    first_E = np.cumsum(tiles_E) - tiles_E
    place = np.arange(len(expert_of_tile)) - first_E[expert_of_tile]
    rows = np.minimum(load_E[expert_of_tile] - place * block_rows, block_rows)
    return Tiles(rows, expert_of_tile)


def spec_of(model: ModelShape, route: str, config: KernelConfig) -> KernelSpec:
    """Return what the kernel would be specialised on: bfloat16, slots as experts, softmax."""
    return CompileCase("predicted", config, model, route).spec


def make_launch(
    model: ModelShape,
    num_tokens: int,
    load_E: np.ndarray,
    config: KernelConfig,
    route: str = "live",
    machine: Machine = H200,
) -> Launch:
    """Describe the launch of a config for a routing.

    Args:
        model: sizes of the layer.
        num_tokens: T, at least 1.
        load_E: assignments of each expert, summing to at most T·K.
        config: how the work is cut.
        route: live, given or replay.
        machine: for the number of workers.
    """
    spec = spec_of(model, route, config)
    tiles = make_tiles(load_E, config.block_rows)
    workers = config.num_workers or machine.num_sms * config.workers_per_sm
    return Launch(Schedule(spec, num_tokens, len(tiles.rows_of_tile)), tiles, workers)


def simulate(launch: Launch, costs: TaskCosts, machine: Machine = H200) -> Timeline:
    """Play the queue: the worker that is free first claims the next id."""
    tasks = list(launch.schedule.tasks())
    return Play(launch.schedule, tasks, costs(tasks), launch.num_workers, machine).run()


def predict(
    model: ModelShape,
    num_tokens: int,
    load_E: np.ndarray,
    config: KernelConfig,
    route: str = "live",
    machine: Machine = H200,
    heights: tuple[int, ...] = (),
    choices_in_flight: int | None = None,
) -> Timeline:
    """Predict a launch with roofline costs; the last two arguments as in RooflineCosts."""
    launch = make_launch(model, num_tokens, load_E, config, route, machine)
    schedule = launch.schedule
    costs = RooflineCosts(
        schedule.spec,
        num_tokens,
        launch.tiles,
        launch.num_workers,
        machine,
        heights,
        choices_in_flight,
    )
    return simulate(launch, costs, machine)


def neighbours(config: KernelConfig) -> list[KernelConfig]:
    """Return the configs with another tile shape, or with one field of ORDERS changed."""
    shapes: list[dict[str, Any]] = [
        dict(zip(TILE_FIELDS, shape, strict=True)) for shape in TILE_SHAPES
    ]
    orders: list[dict[str, Any]] = [
        {name: value} for name, values in ORDERS.items() for value in values
    ]
    return [replace(config, **changes) for changes in (*shapes, *orders)]


def search_configs(
    start: KernelConfig,
    model: ModelShape,
    num_tokens: int,
    load_E: np.ndarray,
    route: str,
    machine: Machine = H200,
) -> list[tuple[float, KernelConfig]]:
    """Walk from ``start`` to the best neighbour until none is clearly better.

    Returns:
        (predicted microseconds, config) of every config seen, fastest first.
    """
    predicted_us: dict[KernelConfig, float] = {}
    best = start
    with progress_bar(desc="simulating", unit=" configs") as progress:
        while True:
            around = dict.fromkeys([best, *neighbours(best)])
            for config in [one for one in around if one not in predicted_us]:
                found = predict(model, num_tokens, load_E, config, route, machine)
                predicted_us[config] = found.launch_us
                progress.update()
            fastest = min(predicted_us, key=lambda config: predicted_us[config])
            if predicted_us[fastest] > LEAST_GAIN * predicted_us[best]:
                break
            best = fastest
    return sorted(((us, config) for config, us in predicted_us.items()), key=lambda one: one[0])


def describe(config: KernelConfig) -> str:
    """Name the fields that shape a launch's time."""
    return " ".join(f"{name}={getattr(config, name)}" for name in SHOWN_FIELDS)
