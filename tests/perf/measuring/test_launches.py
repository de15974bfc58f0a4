"""Launches are counted from outside the call."""

import pytest
import torch
import triton
import triton.language as tl

from perf.measuring.launches import count_launches


@triton.jit
def add_one(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + 1)


@pytest.mark.parametrize("launches", [0, 1, 3])
def test_every_interpreted_launch_is_counted(launches):
    x = torch.zeros(1)
    with count_launches(on_gpu=False) as launched:
        for _ in range(launches):
            add_one[(1,)](x)
    assert launched == ["add_one"] * launches
    assert x.item() == launches
