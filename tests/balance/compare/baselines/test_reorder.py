"""Reordering: experts that are hot together must part."""

import numpy as np

from balance.compare.baselines.reorder import anneal


def test_annealing_separates_two_hot_experts_that_rise_together():
    # Batch sums are equal everywhere; only micro-batches show that 0 and 1 must part.
    load_BE = np.array([[8.0, 8, 0, 0], [0, 0, 8, 8]])
    place_E = anneal(load_BE, np.array([0, 0, 1, 1]), np.ones(2))
    assert place_E[0] != place_E[1] and place_E[2] != place_E[3]
    assert np.bincount(place_E).tolist() == [2, 2]
