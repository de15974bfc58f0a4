"""Packing: even, and heaviest first."""

import numpy as np
import pytest

from balance.compare.baselines.common import pack_evenly


def test_packing_is_heaviest_first_and_even():
    pack_of_X, place_of_X = pack_evenly(np.array([1.0, 9, 5, 4]), 2)
    assert pack_of_X.tolist() == [0, 0, 1, 1]
    assert place_of_X.tolist() == [1, 0, 0, 1]
    with pytest.raises(ValueError, match="num_packs must divide the 3 items, got 2"):
        pack_evenly(np.ones(3), 2)
