"""Every picture is drawn from rows that a suite could have written."""

from perf.measuring.measure import Timing
from perf.results.record import make_row
from perf.results.report import draw_all, format_tables


def rows_of_all_suites():
    rows = []
    for mode in ("graph", "eager"):
        for place, provider in enumerate(("ours live", "grouped_mm")):
            for T in (8, 64, 1024):
                us = 10.0 * (place + 1) + T / 10
                timing = Timing(us, us * 0.9, us * 1.2, 10)
                for suite in ("forward", "decode", "replay"):
                    shared = (suite, "tiny/uniform", provider, T, mode)
                    rows.append(make_row(*shared, "time", "us", timing))
                    rows.append(make_row(*shared, "rate", "TFLOP/s", timing.inverse(1e4)))
                    rows.append(make_row(*shared, "traffic", "GB/s", timing.inverse(1e5)))
            for name in ("balanced", "zipf"):
                ratio = Timing.exact(1.0 + place)
                rows.append(make_row("skew", f"tiny/{name}", provider, 64, mode,
                                     "time over balanced", "ratio", ratio))  # fmt: skip
    for place, method in enumerate(("contiguous", "our plan", "ideal even")):
        timing = Timing(30.0 - place, 28.0 - place, 33.0, 8)
        rows.append(make_row("makespan", "tiny/synthetic", method, 64, "predicted",
                             "slowest rank", "us", timing))  # fmt: skip
    return rows


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
    assert [path.name for path in draw_all(rows, tmp_path)] == ["makespan.png", "tables.md"]


def test_tables_come_from_the_rows():
    text = format_tables(rows_of_all_suites())
    assert "## forward: time in us" in text
    assert "| tiny/uniform | 8 | graph | 10.8 | 20.8 |" in text
