"""What a folder of results says: every picture that its rows allow, and its tables."""

from collections.abc import Sequence
from pathlib import Path

from perf.results import record
from perf.results.pictures import plot_latency, plot_makespan, plot_roofline, plot_skew
from perf.results.record import Row, pick, provenance_line, unique


def draw_all(rows: Sequence[Row], out: Path) -> list[Path]:
    """Write the table and draw every picture that the rows allow; return what was written.

    The table comes first: it needs no matplotlib, which a machine with a GPU may lack.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []
    if rows:
        (out / "tables.md").write_text(format_tables(rows))
        written.append(out / "tables.md")
    for mode in ("graph", "eager"):
        for suite in ("forward", "decode", "replay"):
            chosen = pick(rows, suite=suite, mode=mode, metric="time")
            if chosen:
                written.append(plot_latency(chosen, out / f"{suite}_{mode}.png"))
        if pick(rows, mode=mode, metric="rate"):
            written.append(plot_roofline(rows, mode, out / f"roofline_{mode}.png"))
        chosen = pick(rows, suite="skew", mode=mode, metric="time over balanced")
        if chosen:
            written.append(plot_skew(chosen, out / f"skew_{mode}.png"))
    chosen = pick(rows, suite="makespan", metric="slowest rank")
    if chosen:
        written.append(plot_makespan(chosen, out / "makespan.png"))
    return written


def format_tables(rows: Sequence[Row]) -> str:
    """Return the times of each suite as Markdown, a line per case, T and mode."""
    lines = [f"# Results\n\n{provenance_line(rows)}"]
    for suite in unique(row.suite for row in rows):
        for metric in unique(row.metric for row in pick(rows, suite=suite)):
            chosen = [row for row in pick(rows, suite=suite, metric=metric) if row.T]
            if chosen:
                lines.append(format_table(f"{suite}: {metric} in {chosen[0].unit}", chosen))
    return "\n\n".join(lines) + "\n"


def format_table(title: str, rows: Sequence[Row]) -> str:
    """Return one table: providers across, cases down."""
    providers = unique(row.provider for row in rows)
    median_of = {(row.case, row.T, row.mode, row.provider): row.median for row in rows}
    lines = [f"## {title}\n", f"| case | T | mode | {' | '.join(providers)} |"]
    lines.append("|---|---:|---|" + "---:|" * len(providers))
    for case, T, mode in unique((row.case, row.T, row.mode) for row in rows):
        found = [median_of.get((case, T, mode, provider)) for provider in providers]
        cells = ["" if value is None else f"{value:.4g}" for value in found]
        lines.append(f"| {case} | {T} | {mode} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read_or_none(paths: Sequence[Path]) -> list[Row]:
    """Return the rows of files and folders, none where a folder is empty."""
    try:
        return record.read(paths)
    except FileNotFoundError:
        return []
