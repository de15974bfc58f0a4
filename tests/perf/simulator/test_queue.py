"""Workers, waits and shared memory, each played where the outcome is known by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.config import KernelConfig
from megakernel.plan.schedule import Schedule
from perf.measuring.roofline import Roofs
from perf.problems.cases import TINY, Case, make_loads
from perf.simulator.costs import Demand, Machine
from perf.simulator.predict import make_launch
from perf.simulator.queue import Play

# One multiprocessor reads at most 2 bytes a microsecond, all together 3; atomics are free.
SLOW = Machine(
    roofs=Roofs(1.0, 3e6, 1.0, "made up"), sm_bytes_per_s=2e6, claim_us=0.0, poll_us=0.0,
    signal_us=0.0, launch_us=0.0,
)  # fmt: skip
CONFIG = replace(KernelConfig(), block_rows=16, block_i=32, block_h=64, num_workers=1)


def ffn1_only(num_tiles: int) -> tuple[Schedule, list]:
    """Return the FFN1 tasks of a replay, which wait for nothing."""
    launch = make_launch(TINY, 16 * num_tiles, np.full(8, 4 * num_tiles), CONFIG, "replay")
    tasks = [task for task in launch.schedule.tasks() if task.kind == launch.schedule.spec.FFN1]
    return launch.schedule, tasks[:num_tiles]


@pytest.mark.parametrize(
    ("demands", "num_workers", "ends"),
    [
        ([Demand(1.0, 4.0)], 1, [5]),
        ([Demand(1.0, 4.0)] * 2, 1, [5, 10]),
        ([Demand(1.0, 4.0)] * 2, 2, [5, 5]),
        ([Demand(0.0, 1.0, 6.0)], 1, [3]),
        ([Demand(0.0, 9.0, 6.0)], 1, [9]),
        ([Demand(0.0, 0.0, 6.0)] * 2, 2, [4, 4]),
        ([Demand(0.0, 0.0, 3.0), Demand(0.0, 0.0, 7.0)], 2, [2, 4]),
        ([Demand(0.0, 0.0, 6.0), Demand(1.0, 0.0, 6.0)], 2, [3 + 2 / 3, 4 + 2 / 3]),
    ],
    ids=[
        "fixed time, then steps", "one after the other", "side by side",
        "one multiprocessor's rate", "bytes behind the steps", "two share the memory",
        "the rest goes faster when one is done", "one comes later",
    ],
)  # fmt: skip
def test_times_by_hand(demands, num_workers, ends):
    schedule, tasks = ffn1_only(len(demands))
    found = Play(schedule, tasks, demands, num_workers, SLOW).run()
    assert found.end_N.tolist() == pytest.approx(ends)


@given(
    num_tokens=st.integers(1, 200),
    workers=st.integers(1, 40),
    route=st.sampled_from(["live", "replay", "given"]),
    seed=st.integers(0, 5),
)
@settings(max_examples=25, deadline=None)
def test_no_launch_beats_the_memory_or_its_workers(num_tokens, workers, route, seed):
    """What a model of shared bandwidth must never do: hand out more than there is."""
    launch = make_launch(
        TINY, num_tokens, make_loads(Case(TINY, num_tokens, "zipf", seed)),
        replace(CONFIG, num_workers=workers), route,
    )  # fmt: skip
    tasks = list(launch.schedule.tasks())
    random = np.random.default_rng(seed)
    demands = [Demand(*random.exponential(5.0, 3)) for _ in tasks]
    found = Play(launch.schedule, tasks, demands, workers, SLOW).run()
    assert found.launch_us >= sum(demand.moved_bytes for demand in demands) / 3 * 0.999
    alone_us = [d.fixed_us + max(d.steps_us, d.moved_bytes / 2) for d in demands]
    assert found.launch_us >= sum(alone_us) / workers * 0.999
    assert (found.end_N - found.start_N >= np.array(alone_us) * 0.999).all()
