"""Nodes of more than eight ranks: near the bound, and pruned."""

import numpy as np
import pytest

from balance.steps.copies import Search
from balance.steps.copies_by_flow import choose_copies_by_flow
from tests.balance.steps.test_copies import Node


@pytest.mark.parametrize("num_ranks", [9, 16, 24])
def test_gap_to_the_bound(num_ranks):
    rng = np.random.default_rng(num_ranks)
    load_FX = np.round(rng.lognormal(6.0, 1.0, (6, 4 * num_ranks))).astype(int)
    node = Node.make(load_FX, num_ranks)
    gap_F = node.level_F(node.copies(choose_copies_by_flow)) / node.bound_F() - 1
    assert gap_F.mean() <= 0.01 and gap_F.max() <= 0.05


def test_tolerance_saves_copies():
    rng = np.random.default_rng(0)
    node = Node.make(rng.lognormal(6, 1, (5, 48)).astype(int), 12)
    exact = node.copies(choose_copies_by_flow)
    rough = node.copies(choose_copies_by_flow, Search(tolerance=0.1))
    assert (rough >= 0).sum() < (exact >= 0).sum()
