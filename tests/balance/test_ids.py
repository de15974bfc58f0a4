"""Defects of recorded ids are found, each at its place."""

import numpy as np
import pytest

from balance.ids import inspect_ids


def rows(*ids_of_T, dtype=np.int32):
    """One layer, one row per token."""
    return np.array(ids_of_T, dtype)[:, None, :]


def test_clean_ids_report_nothing():
    report = inspect_ids(rows([0, 1], [7, 3]), 8)
    assert (report.num_rows, report.num_missing, report.num_out_of_range) == (2, 0, 0)
    assert (report.num_duplicate_rows, report.first_duplicate) == (0, None)
    assert report.all_zero_layers == ()


def test_missing_and_out_of_range_are_told_apart():
    report = inspect_ids(rows([-1, 1], [-1, -1], [8, -2]), 8)
    assert (report.num_missing, report.num_out_of_range) == (3, 2)
    assert report.num_duplicate_rows == 0, "two missing ids are not an expert named twice"


@pytest.mark.parametrize("columns", [(0, 1), (0, 3), (2, 3)])
def test_duplicates_are_found_in_any_pair_of_columns(columns):
    ids_TLK = rows([0, 1, 2, 3], [4, 5, 6, 7])
    ids_TLK[1, 0, list(columns)] = 2
    assert inspect_ids(ids_TLK, 8).first_duplicate == (1, 0)


def test_masked_rows_are_not_looked_at_and_positions_stay_true():
    ids_TLK = rows([0, 0], [1, 2], [3, 3])
    report = inspect_ids(ids_TLK, 8, np.array([False, True, True]))
    assert report.num_rows == 2
    assert (report.num_duplicate_rows, report.first_duplicate) == (1, (2, 0))


def test_all_zero_layers_only_where_there_was_a_choice():
    ids_TLK = np.zeros((3, 2, 1), np.uint8)
    ids_TLK[2, 1] = 5
    assert inspect_ids(ids_TLK, 8).all_zero_layers == (0,)
    assert inspect_ids(ids_TLK[:, :1], 1).all_zero_layers == (), "one expert is always 0"
    assert inspect_ids(ids_TLK[:0], 8).all_zero_layers == (), "no rows, no verdict"


def test_chunks_agree_with_one_pass(monkeypatch):
    rng = np.random.default_rng(0)
    ids_TLK = rng.integers(-2, 9, (50, 3, 4)).astype(np.int8)
    whole = inspect_ids(ids_TLK, 8)
    monkeypatch.setattr("balance.ids._IDS_PER_CHUNK", 12 * 7)
    assert inspect_ids(ids_TLK, 8) == whole
    assert whole.num_duplicate_rows > 0 and whole.num_out_of_range > 0
