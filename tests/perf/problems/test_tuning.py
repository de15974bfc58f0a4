"""Autotuners compile all their configs at once, still try each, and are left as they were."""

import threading

import pytest
import torch
import triton
from triton.runtime._async_compile import active_mode
from triton.runtime.autotuner import Autotuner

from perf.problems.tuning import TIMED_MS, WARM_UP_MS, quick_autotuning

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
NUM_CONFIGS = 3


class Kernel:
    """What an autotuner sees of a kernel: config 1 does not compile, config 2 is the fastest."""

    def __init__(self):
        self.barrier, self.tried, self.run_with = threading.Barrier(NUM_CONFIGS), [], []

    @staticmethod
    def fn():
        """Stands for the kernel's source."""

    def warmup(self, *args, grid, place, **options):
        def compile_one():
            self.barrier.wait(timeout=20)  # nobody is done before all have started
            if place == 1:
                raise RuntimeError("does not compile")
            return f"kernel {place}"

        active_mode.get().submit(place, compile_one, self.tried.append)

    def run(self, *args, grid, place, **options):
        self.run_with.append(place)


@pytest.fixture
def kernel():
    return Kernel()


@pytest.fixture
def tuner(kernel):
    configs = [triton.Config({"place": place}) for place in range(NUM_CONFIGS)]
    return Autotuner(kernel, ["size"], configs, ["size"], None, None)


@pytest.fixture(autouse=True)
def bench(monkeypatch, kernel):
    """Triton's timing, without a GPU: what it was told to spend, and a time for each config."""
    spent = []

    def do_bench(call, warmup, rep, quantiles):
        spent.append((warmup, rep))
        call()
        return [NUM_CONFIGS - kernel.run_with[-1]] * 3

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr("perf.problems.tuning.os.cpu_count", lambda: NUM_CONFIGS)
    return spent


def test_configs_compile_side_by_side_and_the_fastest_is_taken(kernel, tuner, bench):
    with quick_autotuning(CUDA):
        tuner.run(8, grid=(1,))
    assert sorted(kernel.tried) == ["kernel 0", "kernel 2"]
    assert kernel.run_with == [0, 1, 2, 2]
    assert bench == [(WARM_UP_MS, TIMED_MS)] * NUM_CONFIGS


def test_afterwards_triton_tunes_as_ever():
    before = Autotuner.run, Autotuner.__dict__["do_bench"]
    with quick_autotuning(CUDA):
        assert Autotuner.run is not before[0]
    assert (Autotuner.run, Autotuner.__dict__["do_bench"]) == before


def test_the_interpreter_is_left_alone():
    before = Autotuner.run
    with quick_autotuning(CPU):
        assert Autotuner.run is before
