"""Workers that really run at once: the same bits, and wrong ones when the kernel is weakened."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from megakernel import MegakernelStall
from tests.helpers.compare import assert_same_bits
from tests.helpers.race.layer import kernel
from tests.helpers.race.layer.launches import LAUNCHES, Launch
from tests.helpers.race.memory import POISON
from tests.helpers.race.processes import as_processes
from tests.helpers.race.weak.mutants import MUTANTS

# Python 3.12 warns of any fork beside threads; none of this process's holds a lock by then.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

NUM_WORKERS = 6
SEEDS = 8
PATIENT = {"max_polls": 1_000_000}  # a wait ends when its signals are there, or the test's time
LAUNCH_OF_NAME = {
    launch.name: replace(launch, config=launch.config | PATIENT) for launch in LAUNCHES
}
MUTANT_OF_NAME = {mutant.name: mutant for mutant in MUTANTS}


def outputs_of(launch: Launch, num_workers: int) -> list[Tensor]:
    """Make the launch on poisoned scratch."""
    kernel.workspace().fill_scratch(POISON)
    kernel.share_report()
    outputs = launch.call(num_workers)
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("live", 0),
        ("replay", 1),
        *[
            pytest.param(name, seed, marks=pytest.mark.slow)
            for name in ("live", "given-slot", "replay-even", "capacity", "shared-replay")
            for seed in range(2, 6)
        ],
    ],
)
def test_processes_give_the_bits_of_one_worker(name: str, seed: int) -> None:
    launch = LAUNCH_OF_NAME[name]
    expected = outputs_of(launch, 1)
    with as_processes(seed):
        actual = outputs_of(launch, NUM_WORKERS)
    for got, want in zip(actual, expected, strict=True):
        assert_same_bits(actual=got, expected=want)
    assert kernel.counters_left() == []


def goes_wrong(launch: Launch, expected: list[Tensor], seed: int) -> bool:
    """Whether a launch as processes gives other bits, or does not end well."""
    try:
        with as_processes(seed):
            actual = outputs_of(launch, NUM_WORKERS)
    except (InterpreterError, MegakernelStall):  # stuck, crashed, or stalled
        return True
    finally:
        kernel.workspace().reset()
    return not all(torch.equal(got, want) for got, want in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "every awaited value is 1",
        *[
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "prefix awaits one route task less",
                "FFN1 signals before its stores",
                "row tiles share one counter",
            )
        ],
    ],
)
def test_a_weak_kernel_goes_wrong_within_a_few_seeds(name: str) -> None:
    launch = LAUNCH_OF_NAME[MUTANT_OF_NAME[name].launch]
    expected = outputs_of(launch, 1)
    with MUTANT_OF_NAME[name].applied():
        assert any(goes_wrong(launch, expected, seed) for seed in range(SEEDS))
