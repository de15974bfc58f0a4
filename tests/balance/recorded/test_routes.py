"""Joined sequences: layers kept once, missing ids in no load, defects refused by place."""

import numpy as np
import pytest

from balance.recorded.routes import join
from tests.balance.recorded.recordings import draw_ids


@pytest.mark.parametrize("moe_layers", [[0.0], [-1], [0, 0], [1], []], ids=str)
def test_layers_that_are_not_recorded_once_are_refused(moe_layers):
    with pytest.raises(ValueError, match="moe_layers must"):
        join([np.array([[[0, 1]]])], 2, moe_layers=moe_layers)


def test_every_sequence_has_one_domain():
    with pytest.raises(ValueError, match="domain_S must have 1 entries, got 2"):
        join([np.array([[[0, 1]]])], 2, domain_S=["a", "b"])


def test_zero_rows_inside_a_sequence_are_refused():
    ids_TLK = draw_ids(6, 1, 2, 8)
    ids_TLK[2] = 0
    with pytest.raises(ValueError, match="1 rows that do not; the first is token 2, layer 0"):
        join([ids_TLK], 8)


@pytest.mark.parametrize("bad", [-2, 8, 255])
def test_ids_out_of_range_are_refused(bad):
    ids_TLK = draw_ids(4, 1, 2, 8).astype(np.int16)
    ids_TLK[1, 0, 1] = bad
    with pytest.raises(ValueError, match=r"must lie in \[0, 8\) or be -1, got 1 other"):
        join([ids_TLK], 8)


def test_missing_ids_stay_out_of_the_load():
    ids_TLK = draw_ids(4, 1, 2, 8).astype(np.int8)
    ids_TLK[1] = -1
    ids_TLK[2, 0, 1] = -1
    assert join([ids_TLK], 8).pack(1).loads().sum() == 8 - 2 - 1
