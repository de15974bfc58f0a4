"""Rows survive a file, and every row says where it comes from."""

import pytest

from perf.measuring.measure import Timing
from perf.results import record
from perf.results.record import COLUMNS, make_row, provenance, read, write
from perf.sources import digest

AGREED = (
    "suite,case,provider,T,mode,metric,unit,median,p20,p80,n,gpu,driver,torch,triton,commit,date"
)


def row(**changes):
    values = {
        "suite": "forward",
        "case": "model/scenario, with a comma",
        "provider": "ours live",
        "num_tokens": 8,
        "mode": "eager",
        "metric": "time",
        "unit": "us",
        "timing": Timing(1.5, 1.0, 2.0, 7),
    }
    return make_row(**{**values, **changes})


def test_the_columns_are_the_agreed_ones():
    assert ",".join(COLUMNS) == AGREED


def test_rows_survive_a_file(tmp_path):
    rows = [row(), row(provider="grouped_mm", timing=Timing.exact(0.1))]
    write(rows, tmp_path / "a" / "x.csv")
    assert read([tmp_path / "a" / "x.csv"]) == rows
    assert read([tmp_path / "a"]) == rows


def test_every_row_says_where_it_comes_from():
    assert all(provenance().values())
    assert row().commit == provenance()["commit"]


def test_a_file_with_other_columns_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns suite,case"):
        read([tmp_path])


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no CSV file in"):
        read([tmp_path])


def test_without_git_the_files_name_themselves(monkeypatch):
    monkeypatch.setattr(record, "_output", lambda *command: "unknown")
    assert record._commit() == f"sources-{digest()}"
