"""Bounds: by hand, and never above what an exhaustive search finds."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balance.exact import bounds, split


@pytest.mark.parametrize(
    ("total", "speed_D", "level"),
    [
        pytest.param(7, [1, 1], 4.0, id="whole tokens round up"),
        pytest.param(8, [1, 1], 4.0, id="exact"),
        pytest.param(9, [1, 2], 3.0, id="one rank twice as fast"),
        pytest.param(10, [1, 2], 3.5, id="fast rank takes the odd token"),
        pytest.param(6, [2, 0], 3.0, id="a missing rank serves nothing"),
        pytest.param(0, [1, 1], 0.0, id="nothing to do"),
    ],
)
def test_ideal_level(total, speed_D, level):
    speeds = torch.tensor(speed_D, dtype=torch.float64)
    assert bounds.ideal_level(torch.tensor([total]), speeds).item() == level


@pytest.mark.parametrize(
    ("load_X", "home_X", "slots_D", "level"),
    [
        pytest.param([9, 1], [0, 1], [0, 0], 9.0, id="no slots: the hottest rank as it is"),
        pytest.param([9, 1], [0, 1], [1, 1], 5.0, id="one slot each: the mean"),
        pytest.param([9, 1], [0, 1], [1, 0], 9.0, id="the hot rank's own slot does not help it"),
        pytest.param([3, 3, 3, 1], [0, 0, 0, 1], [0, 1], 6.0, id="one slot takes one expert"),
        pytest.param([2] * 6 + [0], [0] * 6 + [1], [0, 1], 10.0, id="small pieces, one at a time"),
    ],
)
def test_slot_level(load_X, home_X, slots_D, level):
    found = bounds.slot_level(
        torch.tensor([load_X]), torch.tensor([home_X]), torch.tensor([slots_D]), torch.ones(2)
    )
    assert found.item() == pytest.approx(level)


@given(
    seed=st.integers(0, 2**32 - 1),
    num_ranks=st.integers(1, 3),
    num_experts=st.integers(1, 4),
    spares=st.integers(0, 1),
)
@settings(max_examples=30, deadline=None)
def test_never_above_the_best_of_all_placements(seed, num_ranks, num_experts, spares):
    rng = np.random.default_rng(seed)
    load_1X = torch.from_numpy(rng.integers(0, 30, (1, num_experts)))
    home_1X = torch.from_numpy(rng.integers(0, num_ranks, (1, num_experts)))
    speed_D = torch.from_numpy(rng.choice([1.0, 2.0], num_ranks))
    slots_1D = torch.full((1, num_ranks), spares)
    rank_of_J = torch.arange(num_ranks).repeat_interleave(spares)
    contents = list(itertools.product(range(-1, num_experts), repeat=len(rank_of_J)))
    every_FJ = torch.tensor(contents, dtype=torch.int64).reshape(len(contents), len(rank_of_J))
    every_FJ = torch.where(home_1X[0][every_FJ.clamp(min=0)] == rank_of_J, -1, every_FJ)
    level_F, _ = split.bottleneck(
        load_1X.expand(len(every_FJ), -1),
        home_1X.expand(len(every_FJ), -1),
        every_FJ,
        rank_of_J,
        speed_D,
    )
    bound = bounds.slot_level(load_1X, home_1X, slots_1D, speed_D).item()
    assert bound <= level_F.min().item() + 1e-9


def test_node_level_is_the_load_that_cannot_leave():
    # Node 0 owns 6 + 4, node 1 owns 2; the copy of the 6 on node 1 levels them.
    load_1E, node_1E = torch.tensor([[6, 4, 2]]), torch.tensor([[0, 0, 1]])
    node_of_J, speeds = torch.tensor([1]), torch.tensor([2.0, 2.0], dtype=torch.float64)
    for copy, level in ((-1, 5.0), (0, 3.0), (1, 3.0)):
        found = bounds.node_level(load_1E, node_1E, torch.tensor([[copy]]), node_of_J, speeds)
        assert found.item() == level
