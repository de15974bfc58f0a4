"""Pictures of rows: latency against T, roofline, skew, makespan; each says where it comes from."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from perf.extras import optional
from perf.measuring.roofline import ASSUMED_H200
from perf.results.drawing import COLOURS, add_legend, make_panels, save_figure, style_of
from perf.results.record import LABEL, Row, pick, provenance_line, unique

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_latency(rows: Sequence[Row], path: Path) -> Path:
    """One panel per case: time against T, both logarithmic, with bands of 20 to 80 %."""
    cases = unique(row.case for row in rows)
    figure, panels = make_panels(len(cases))
    for axis, case in zip(panels, cases, strict=True):
        for place, provider in enumerate(unique(row.provider for row in rows)):
            line = sorted(pick(rows, case=case, provider=provider), key=lambda row: row.T)
            if line:
                _draw_line(axis, line, place, provider)
        axis.set(title=case, xlabel="tokens T", ylabel="time in us", xscale="log", yscale="log")
        counts = sorted({row.T for row in rows if row.case == case})
        axis.set_xticks(counts, [str(T) for T in counts], minor=False)
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter(optional("matplotlib.ticker").ScalarFormatter())
    mode = rows[0].mode
    what = "device time of a captured graph" if mode == "graph" else "wall clock with launches"
    add_legend(figure, panels)
    return _finish(figure, panels, f"{rows[0].suite}: {what}, {provenance_line(rows)}", path)


def plot_roofline(rows: Sequence[Row], mode: str, path: Path) -> Path:
    """Useful FLOP/s against useful FLOP per byte, under the roofs of the same run."""
    figure, panels = make_panels(1, width=8.0)
    axis = panels[0]
    rates = pick(rows, mode=mode, metric="rate")
    traffic_of = {row.key[:5]: row for row in pick(rows, mode=mode, metric="traffic")}
    for place, provider in enumerate(unique(row.provider for row in rates)):
        dots = [row for row in rates if row.provider == provider and row.key[:5] in traffic_of]
        intensity = [row.median * 1e3 / traffic_of[row.key[:5]].median for row in dots]
        axis.scatter(
            intensity, [row.median for row in dots], s=22, label=provider,
            color=style_of(place)["color"], marker=style_of(place)["marker"],
        )  # fmt: skip
    _draw_roofs(axis, rows)
    axis.set(xlabel="useful FLOP per byte", ylabel="useful TFLOP/s", xscale="log", yscale="log")
    add_legend(figure, panels)
    return _finish(figure, panels, f"roofline ({mode}), {provenance_line(rates)}", path)


def plot_skew(rows: Sequence[Row], path: Path) -> Path:
    """One panel per model: time over that of balanced routing, scenario by scenario."""
    models = unique(row.case.split("/")[0] for row in rows)
    figure, panels = make_panels(len(models), width=7.0)
    for axis, model in zip(panels, models, strict=True):
        of_model = [row for row in rows if row.case.startswith(f"{model}/")]
        cases = unique(row.case for row in of_model)  # in the order they ran in
        for place, provider in enumerate(unique(row.provider for row in rows)):
            ratio_of = {row.case: row.median for row in pick(of_model, provider=provider)}
            places = [i for i, case in enumerate(cases) if case in ratio_of]
            ratios = [ratio_of[cases[i]] for i in places]
            axis.plot(places, ratios, label=provider, **style_of(place))
        axis.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
        names = [case.split("/")[1] for case in cases]
        axis.set_xticks(range(len(names)), names, rotation=25, ha="right")
        axis.set(title=model, ylabel="time / time when balanced")
    add_legend(figure, panels)
    return _finish(figure, panels, f"skew at equal FLOPs, {provenance_line(rows)}", path)


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
    word = LABEL if rows[0].mode == "predicted" else "measured, no communication"
    title = f"Slowest of the ranks, median and 20-80 % over micro-batches\n{word}"
    return _finish(figure, panels, title, path)


def _draw_line(axis: "Axes", line: Sequence[Row], place: int, label: str) -> None:
    """Draw one provider's medians and band."""
    counts = [row.T for row in line]
    axis.plot(counts, [row.median for row in line], label=label, **style_of(place))
    low, high = [row.p20 for row in line], [row.p80 for row in line]
    axis.fill_between(counts, low, high, color=style_of(place)["color"], alpha=0.2)


def _draw_roofs(axis: "Axes", rows: Sequence[Row]) -> None:
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


def _finish(figure: "Figure", panels: "Sequence[Axes]", title: str, path: Path) -> Path:
    """Add the grid behind what is drawn, and write the picture."""
    for axis in panels:
        axis.grid(True, alpha=0.3)
        axis.set_axisbelow(True)
    return save_figure(figure, title, path)
