"""How many programs a launch has, and how long a wait polls."""

import torch

from megakernel.config import KernelConfig
from megakernel.launch.run import resolve_polls, resolve_workers

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_workers_and_polls_are_taken_as_given_or_from_the_device():
    assert resolve_workers(KernelConfig(num_workers=5), CPU) == 5
    assert resolve_workers(KernelConfig(), CPU) == 1
    assert resolve_polls(KernelConfig(max_polls=9), GPU) == 9
    assert resolve_polls(KernelConfig(), GPU) > 1_000_000 > resolve_polls(KernelConfig(), CPU)
