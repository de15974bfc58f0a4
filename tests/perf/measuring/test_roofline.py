"""Useful work against figures published for the same layers."""

import numpy as np
import pytest
import torch

from perf.measuring.measure import Protocol
from perf.measuring.roofline import (
    ASSUMED_H200,
    Roofs,
    Work,
    backward_work,
    measure_roofs,
    useful_work,
)
from perf.problems.cases import SHAPES

QWEN = SHAPES["Qwen3-30B-A3B"]


def test_flops_of_a_known_layer():
    work = useful_work(QWEN, 8192, np.full(128, 512))
    assert work.flops == pytest.approx(0.618e12, rel=1e-3)
    assert ASSUMED_H200.least_us(work) == pytest.approx(793, rel=1e-3)


def test_only_touched_experts_are_read():
    load_E = np.zeros(128, np.int64)
    load_E[:8] = 1
    work = useful_work(QWEN, 1, load_E)
    assert work.bytes == 2 * (8 * 3 * 2048 * 768 + 2 * 2048)


def test_padding_and_missing_choices_are_no_work():
    assert useful_work(QWEN, 100, np.zeros(128, np.int64)).flops == 0


def test_a_backward_is_twice_a_forward_and_half_as_much_again_without_what_was_saved():
    load_E = np.full(128, 512)
    flops = useful_work(QWEN, 8192, load_E).flops
    assert (
        backward_work(QWEN, 8192, load_E).flops == 2 * flops == pytest.approx(1.237e12, rel=1e-3)
    )
    assert backward_work(QWEN, 8192, load_E, save="nothing").flops == 2 * flops + 2 / 3 * flops


def test_bytes_of_a_backward_by_hand():
    """Weights once; their gradients in bfloat16, in float32, or read and written; rows."""
    weights, rows, z = 128 * 3 * 2048 * 768, 3 * 8192 * 2048 * 2, 8192 * 8 * 2 * 768 * 2
    load_E = np.full(128, 512)
    for gradients, each in (("bfloat16", 2), ("float32", 4), ("added", 8)):
        work = backward_work(QWEN, 8192, load_E, gradients)
        assert work.bytes == 2 * weights + each * weights + rows + z
    without = backward_work(QWEN, 8192, load_E, save="nothing")
    assert without.bytes == 4 * weights + rows


def test_gradients_of_experts_nobody_chose_are_zeroed_but_not_added_to():
    load_E = np.zeros(128, np.int64)
    load_E[:8] = 1
    one = 3 * 2048 * 768
    whole, added = (
        backward_work(QWEN, 1, load_E, name, "nothing") for name in ("float32", "added")
    )
    assert whole.bytes - added.bytes == 4 * 128 * one - 8 * 8 * one


def test_the_slower_roof_decides():
    roofs = Roofs(100.0, 10.0, 0.0, "made up")
    assert roofs.least_us(Work(flops=200.0, bytes=10.0)) == 2e6
    assert roofs.least_us(Work(flops=100.0, bytes=30.0)) == 3e6
    assert Work(flops=200.0, bytes=10.0).intensity == 20


def test_what_is_not_measured_says_so():
    assert "assumed" in ASSUMED_H200.source


@pytest.mark.gpu
def test_roofs_are_measured_in_this_run(device):
    roofs = measure_roofs(device, Protocol(2, 3))
    assert roofs.source == "measured"
    assert roofs.dense_flops_per_s > 1e12
    assert roofs.copy_bytes_per_s > 1e10
    assert torch.cuda.is_available()
