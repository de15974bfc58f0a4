"""Whole numbers at the border."""

import numpy as np
import pytest

from balance.checks import whole


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3)], ids=["int", "int8", "uint64"])
def test_whole_numbers_become_ints(value):
    assert type(whole("n", value, 3)) is int


@pytest.mark.parametrize("value", [2, 3.0, np.nan, None, "3", True, [3]], ids=str)
def test_others_are_refused_by_name(value):
    with pytest.raises(ValueError, match="n must be a whole number of at least 3, got"):
        whole("n", value, 3)
