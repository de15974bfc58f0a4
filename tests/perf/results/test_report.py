"""Every picture is drawn from rows that a suite could have written."""

from itertools import product

from perf.measuring.measure import Timing
from perf.results.record import make_row
from perf.results.report import draw_all, format_tables

MODES, PROVIDERS = ("graph", "eager"), ("ours live", "grouped_mm")


def rows_of_all_suites():
    return [*rows_of_layers(), *rows_of_skew(), *rows_of_makespan()]


def rows_of_layers():
    suites = ("forward", "decode", "replay")
    for mode, (place, provider), T, suite in product(
        MODES, enumerate(PROVIDERS), (8, 64, 1024), suites
    ):
        us = 10.0 * (place + 1) + T / 10
        timing = Timing(us, us * 0.9, us * 1.2, 10)
        shared = (suite, "tiny/uniform", provider, T, mode)
        yield make_row(*shared, "time", "us", timing)
        yield make_row(*shared, "rate", "TFLOP/s", timing.inverse(1e4))
        yield make_row(*shared, "traffic", "GB/s", timing.inverse(1e5))


def rows_of_skew():
    for mode, (place, provider), name in product(
        MODES, enumerate(PROVIDERS), ("balanced", "zipf")
    ):
        shared = ("skew", f"tiny/{name}", provider, 64, mode)
        yield make_row(*shared, "time over balanced", "ratio", Timing.exact(1.0 + place))


def rows_of_makespan():
    for place, method in enumerate(("contiguous", "our plan", "ideal even")):
        timing = Timing(30.0 - place, 28.0 - place, 33.0, 8)
        shared = ("makespan", "tiny/synthetic", method, 64, "predicted")
        yield make_row(*shared, "slowest rank", "us", timing)


def test_every_picture_is_drawn(tmp_path):
    written = draw_all(rows_of_all_suites(), tmp_path)
    assert {path.stem for path in written} == {
        *(f"{s}_{m}" for s in ("forward", "decode", "replay", "roofline", "skew")
          for m in ("graph", "eager")),
        "makespan", "tables",
    }  # fmt: skip
    pictures = [path for path in written if path.suffix == ".png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_only_what_is_there_is_drawn(tmp_path):
    rows = [row for row in rows_of_all_suites() if row.suite == "makespan"]
    assert [path.name for path in draw_all(rows, tmp_path)] == ["tables.md", "makespan.png"]


def test_tables_come_from_the_rows():
    text = format_tables(rows_of_all_suites())
    assert "## forward: time in us" in text
    assert "| tiny/uniform | 8 | graph | 10.8 | 20.8 |" in text
