"""The linear split: optimal where only a chain of shifts is."""

import numpy as np

from balance.compare.baselines.linear import split


def test_linear_split_is_optimal_on_a_chain():
    # Expert 0 on ranks 0, 1; expert 1 on ranks 1, 2; mean 4 is reachable only by shifting both.
    holds_ER = np.array([[True, True, False], [False, True, True]])
    load_ER = split(np.array([6.0, 6.0]), holds_ER, np.ones(3))
    np.testing.assert_allclose(load_ER.sum(0), 4)
    assert (load_ER[~holds_ER] == 0).all()
    faster = split(np.array([6.0, 6.0]), holds_ER, np.array([1.0, 1.0, 4.0]))
    np.testing.assert_allclose(faster.sum(0) / [1, 1, 4], [3, 3, 1.5])
