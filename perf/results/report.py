"""Draw results: latency against T, roofline, skew, makespan, and who does what when.

``python -m perf report RESULTS --out DIR`` draws what the rows allow and writes a table. Timelines
of the workers are the kernel's own where the results hold some, and the simulator's, which say so.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from perf.arguments import count
from perf.measuring.roofline import ASSUMED_H200
from perf.problems.cases import SCENARIOS, SHAPES, Case
from perf.results import record, timelines
from perf.results.record import Row
from perf.simulator.predict import LABEL

# Okabe and Ito's palette, with more markers than colours, so that no two providers look alike and
# no meaning rests on colour alone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vP*X<>p"


def draw_all(rows: Sequence[Row], out: Path) -> list[Path]:
    """Draw every picture that the rows allow, and the table; return what was written."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
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
    if rows:
        (out / "tables.md").write_text(format_tables(rows))
        written.append(out / "tables.md")
    return written


def pick(rows: Sequence[Row], **wanted: str) -> list[Row]:
    """Return the rows whose fields have the wanted values."""
    return [
        row for row in rows if all(getattr(row, name) == want for name, want in wanted.items())
    ]


def plot_latency(rows: Sequence[Row], path: Path) -> Path:
    """One panel per case: time against T, both logarithmic, with bands of 20 to 80 %."""
    cases = unique(row.case for row in rows)
    providers = unique(row.provider for row in rows)
    figure, panels = make_panels(len(cases))
    for axis, case in zip(panels, cases, strict=True):
        for place, provider in enumerate(providers):
            line = sorted(pick(rows, case=case, provider=provider), key=lambda row: row.T)
            if line:
                draw_line(axis, line, place, provider)
        axis.set(title=case, xlabel="tokens T", ylabel="time in us", xscale="log", yscale="log")
        counts = sorted({row.T for row in rows if row.case == case})
        axis.set_xticks(counts, [str(T) for T in counts], minor=False)
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter(ScalarFormatter())
    mode = rows[0].mode
    what = "device time of a captured graph" if mode == "graph" else "wall clock with launches"
    return finish(figure, panels, f"{rows[0].suite}: {what}, {provenance_line(rows)}", path)


def draw_line(axis: Axes, line: Sequence[Row], place: int, label: str) -> None:
    """Draw one provider's medians and band."""
    counts = [row.T for row in line]
    axis.plot(counts, [row.median for row in line], label=label, **style_of(place))
    low, high = [row.p20 for row in line], [row.p80 for row in line]
    axis.fill_between(counts, low, high, color=style_of(place)["color"], alpha=0.2)


def style_of(place: int) -> dict[str, Any]:
    """Return colour and marker of the provider at a place of the list; later ones are dashed."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": "-" if place < len(COLOURS) else "--",
    }


def plot_roofline(rows: Sequence[Row], mode: str, path: Path) -> Path:
    """Useful FLOP/s against useful FLOP per byte, under the roofs of the same run."""
    figure, panels = make_panels(1, width=8.0)
    axis = panels[0]
    rates = pick(rows, mode=mode, metric="rate")
    traffic_of = {row.key[:5]: row for row in pick(rows, mode=mode, metric="traffic")}
    providers = unique(row.provider for row in rates)
    for place, provider in enumerate(providers):
        dots = [row for row in rates if row.provider == provider and row.key[:5] in traffic_of]
        intensity = [row.median * 1e3 / traffic_of[row.key[:5]].median for row in dots]
        axis.scatter(
            intensity, [row.median for row in dots], s=22, label=provider,
            color=style_of(place)["color"], marker=style_of(place)["marker"],
        )  # fmt: skip
    draw_roofs(axis, rows)
    axis.set(xlabel="useful FLOP per byte", ylabel="useful TFLOP/s", xscale="log", yscale="log")
    return finish(figure, panels, f"roofline ({mode}), {provenance_line(rates)}", path)


def draw_roofs(axis: Axes, rows: Sequence[Row]) -> None:
    """Draw the measured roofs, or the assumed ones with that word."""
    of_metric = {row.metric: row.median for row in pick(rows, provider="roof")}
    peak = of_metric.get("dense product", ASSUMED_H200.dense_flops_per_s * 1e-12)
    copy = of_metric.get("copy", ASSUMED_H200.copy_bytes_per_s * 1e-9)
    word = "measured" if of_metric else ASSUMED_H200.source
    intensity = np.geomspace(0.5, 4000, 200)
    axis.plot(
        intensity, np.minimum(peak, intensity * copy * 1e-3), color="black", linewidth=1,
        label=f"roofs, {word}",
    )  # fmt: skip


def plot_skew(rows: Sequence[Row], path: Path) -> Path:
    """One panel per model: time over that of balanced routing, scenario by scenario."""
    models = unique(row.case.split("/")[0] for row in rows)
    providers = unique(row.provider for row in rows)
    figure, panels = make_panels(len(models), width=7.0)
    for axis, model in zip(panels, models, strict=True):
        found = {row.case.split("/")[1] for row in rows if row.case.startswith(f"{model}/")}
        names = [name for name in SCENARIOS if name in found]
        for place, provider in enumerate(providers):
            dots = {row.case: row for row in pick(rows, provider=provider)}
            heights = [
                dots[f"{model}/{name}"].median for name in names if f"{model}/{name}" in dots
            ]
            places = [i for i, name in enumerate(names) if f"{model}/{name}" in dots]
            axis.plot(places, heights, label=provider, **style_of(place))
        axis.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
        axis.set_xticks(range(len(names)), names, rotation=25, ha="right")
        axis.set(title=model, ylabel="time / time when balanced")
    return finish(figure, panels, f"skew at equal FLOPs, {provenance_line(rows)}", path)


def plot_makespan(rows: Sequence[Row], path: Path) -> Path:
    """One panel per trace: time of the slowest rank under each method."""
    cases = unique(row.case for row in rows)
    figure, panels = make_panels(len(cases), width=6.0)
    for axis, case in zip(panels, cases, strict=True):
        bars = pick(rows, case=case)
        lowest = bars[-1].median
        for place, row in enumerate(bars):
            spread = [[row.median - row.p20], [row.p80 - row.median]]
            axis.bar(place, row.median, 0.6, color=COLOURS[place], yerr=spread, capsize=3)
            axis.annotate(
                f"{row.median / lowest:.2f}x", (place, row.p80), ha="center", va="bottom",
                xytext=(0, 3), textcoords="offset points",
            )  # fmt: skip
        axis.set_xticks(range(len(bars)), [row.provider for row in bars])
        axis.set(title=case, ylabel="slowest rank, us", ylim=(0, 1.2 * max(r.p80 for r in bars)))
    is_predicted = rows[0].mode == "predicted"
    word = LABEL if is_predicted else "measured, no communication"
    title = f"Slowest of the ranks, median and 20-80 % over micro-batches\n{word}"
    return finish(figure, panels, title, path, legend=False)


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


def provenance_line(rows: Sequence[Row]) -> str:
    """Say where rows come from."""
    row = rows[0]
    gpu = "no GPU" if row.gpu == "none" else row.gpu
    return f"{gpu}, torch {row.torch}, triton {row.triton}, {row.commit}, {row.date}"


def unique(values) -> list:  # type: ignore[no-untyped-def]
    """Return distinct values in the order they first occur."""
    return list(dict.fromkeys(values))


def make_panels(count: int, width: float = 5.0) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``count`` panels, at most three in a line."""
    columns = min(count, 3)
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(width * columns, 4.2 * lines + 0.8), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    panels = list(axes.flat)
    for spare in panels[count:]:
        spare.remove()
    return figure, panels[:count]


def finish(
    figure: Figure, panels: Sequence[Axes], title: str, path: Path, legend: bool = True
) -> Path:
    """Add title, grid and legend, and write the picture."""
    for axis in panels:
        axis.grid(True, alpha=0.3)
        axis.set_axisbelow(True)
    if legend:
        handles = {
            label: handle
            for axis in panels
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
        )
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def read_or_none(paths: Sequence[Path]) -> list[Row]:
    """Return the rows of files and folders, none where a folder is empty."""
    try:
        return record.read(paths)
    except FileNotFoundError:
        return []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, nargs="*", help="CSV files or folders of them")
    parser.add_argument("--out", type=Path, default=Path("out/perf"))
    parser.add_argument(
        "--model", choices=SHAPES, default="Qwen3-30B-A3B", help="of the predicted timeline"
    )
    parser.add_argument("--tokens", type=count, default=8192, help="of the predicted timeline")


def run(arguments: argparse.Namespace) -> int:
    """Draw results and timelines, measured and predicted; 2 on files that are not results."""
    folders = [path for path in arguments.results if path.is_dir()]
    try:
        written = draw_all(record.read(arguments.results), arguments.out)
        written += timelines.draw_saved(folders, arguments.out)
    except (ValueError, OSError) as error:
        print(f"perf report: {error}", file=sys.stderr)
        return 2
    case = Case(SHAPES[arguments.model], arguments.tokens, "recorded")
    written += timelines.draw_predicted(case, arguments.out)
    for path in written:
        print(path)
    return 0
