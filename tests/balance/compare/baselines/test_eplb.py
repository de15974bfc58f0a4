"""EPLB: its published examples, by slot."""

import numpy as np
import pytest

from balance.compare.baselines.eplb import eplb, replicate_hottest

# The example of EPLB's README: 2 layers of 12 experts in 4 groups, 16 replicas, 2 nodes, 8 GPUs.
README_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


README_EXPERT_OF_P = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


@pytest.mark.parametrize("layer", [0, 1])
def test_eplb_reproduces_its_readme(layer):
    expert_of_P = eplb(np.array(README_LOADS[layer]), 16, 4, 2, 8)
    assert expert_of_P.tolist() == README_EXPERT_OF_P[layer]


def test_eplb_on_the_flash_lb_example():
    """Published comparison: EPLB ends at 232 where 181.25 is possible."""
    load_E = np.array([600, 560, 120, 120, 20, 10, 10, 10.0])
    expert_of_P = eplb(load_E, 16, 1, 1, 8)
    share = load_E / np.bincount(expert_of_P)
    assert share[expert_of_P].reshape(8, 2).sum(1).max() == 232


@pytest.mark.parametrize(
    ("load", "arguments", "message"),
    [
        ([1, np.nan], (2, 1, 1, 1), "load_E must be finite"),
        ([1, -1], (2, 1, 1, 1), "load_E must be finite and not negative"),
        ([1, 1], (1, 1, 1, 1), "num_slots must hold all 2 experts"),
        ([1, 1], (3, 1, 1, 2), "a multiple of 2 ranks, got 3"),
        ([1, 1], (2, 3, 1, 1), "num_groups must divide the 2 experts, got 3"),
        ([1, 1], (3, 1, 2, 3), "num_nodes must divide the 3 ranks, got 2"),
    ],
)
def test_eplb_refuses_bad_arguments(load, arguments, message):
    with pytest.raises(ValueError, match=message):
        eplb(np.array(load), *arguments)


def test_replication_goes_to_the_hottest_copy():
    assert replicate_hottest(np.array([9.0, 5, 1]), 6).tolist() == [0, 1, 2, 0, 1, 0]
