from dataclasses import replace

import numpy as np
import pytest
import torch

from balance import Trace
from perf.demo.compare import (
    Forward,
    find_failures,
    measure_drift,
    planned_placement,
    rank_loads,
    reference_layers,
    same_bits,
)
from perf.demo.layers import WatchedLayer
from perf.demo.model import DemoModel, ModelConfig
from perf.demo.rollout import RolloutConfig, roll_out

SMALL = ModelConfig(num_layers=2, hidden=16, num_heads=2, num_experts=6, top_k=2, intermediate=8)


class OneSpareEach:
    """Four experts on two ranks with a spare slot each: rank 0 also holds expert 3."""

    def expert_of_P(self, micro_batch, layer):
        return np.array([0, 1, 3, 2, 3, -1], np.int32)

    def slot_of_TK(self, micro_batch, layer):
        return np.array([[4, 0], [2, 1], [2, 3]], np.int32)


def small_trace():
    ids_TLK = np.array([[[3, 0]], [[3, 1]], [[3, 2]]])
    return Trace(ids_TLK, np.zeros(3, np.int64), np.zeros(3, np.int64), num_experts=4)


def passed(logits, error=1e-7, launches=1):
    layer = WatchedLayer(None, lambda: None, launches)
    return Forward("a pass", torch.tensor(logits), error, seconds=0.0, layers=[layer])


GOOD = [passed([1.0]), passed([2.0]), passed([3.0]), passed([3.0])]


def test_rank_loads_follow_the_maps():
    before_BLR, after_BLR = rank_loads(small_trace(), OneSpareEach(), num_ranks=2)
    assert before_BLR.tolist() == [[[2, 4]]]
    assert after_BLR.tolist() == [[[4, 2]]]


def test_planned_placement_carries_the_plan():
    placement = planned_placement(OneSpareEach(), 0, 0, torch.device("cpu"))
    assert placement.expert_of_P.tolist() == [0, 1, 3, 2, 3, -1]
    assert placement.slot_of_TK.tolist() == [[4, 0], [2, 1], [2, 3]]


def test_no_drift_between_equal_numbers():
    torch.manual_seed(0)
    model = DemoModel(SMALL).double().requires_grad_(False)
    rollouts = roll_out(model, RolloutConfig(samples_per_prompt=1, prompt_bytes=4, new_bytes=3))
    drift = measure_drift(model, rollouts)
    assert drift.rerouted == 0
    assert drift.gap_free == drift.gap_replayed < 1e-5


def test_drift_of_other_experts_is_seen():
    torch.manual_seed(0)
    model = DemoModel(SMALL).double().requires_grad_(False)
    rollouts = roll_out(model, RolloutConfig(samples_per_prompt=1, prompt_bytes=4, new_bytes=3))
    others = replace(rollouts, expert_of_TLK=(rollouts.expert_of_TLK + 1) % SMALL.num_experts)
    drift = measure_drift(model, others)
    assert drift.rerouted > 0.5
    assert drift.gap_replayed > 1e-3 > drift.gap_free


def test_reference_layers_split_the_ids_by_layer():
    model = DemoModel(SMALL)
    ids_TLK = torch.arange(12).view(3, 2, 2)
    first, second = reference_layers(model, ids_TLK)
    assert torch.equal(first.replayed_TK, ids_TLK[:, 0])
    assert torch.equal(second.replayed_TK, ids_TLK[:, 1])


@pytest.mark.parametrize(
    ("place", "other", "message"),
    [
        pytest.param(1, passed([2.0], error=1e-6), "error 1.0e-06 is over 4.0e-07", id="error"),
        pytest.param(1, passed([2.0], error=float("nan")), "error nan", id="nan"),
        pytest.param(2, passed([3.0], launches=2), "layer 0 took 2 launches", id="launches"),
        pytest.param(3, passed([3.1]), "changed the bits", id="bits"),
    ],
)
def test_each_broken_promise_is_a_failure(place, other, message):
    broken = [*GOOD[:place], other, *GOOD[place + 1 :]]
    assert find_failures(GOOD) == []
    (failure,) = find_failures(broken)
    assert message in failure


def test_nan_is_never_the_same_bits():
    assert same_bits(passed([1.0]), passed([1.0]))
    assert not same_bits(passed([float("nan")]), passed([float("nan")]))
