"""Pictures of the same figures: what there is to gain, who gains it, where the plan gains it.

Colours are those of Okabe and Ito, which stay apart for colour-blind eyes, and cividis; no
meaning rests on colour alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from balance.compare.baselines.run import Outcome
from balance.compare.report import OURS, WORTH_IT, TraceStats, contiguous_rank_load
from balance.measures.load import Balance, imbalance, ratio_to, summarize
from balance.topology import Topology
from balance.trace import Trace

_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#E69F00", "#009E73", "#555555"


def plot_stats(trace: Trace, stats: TraceStats, path: Path) -> None:
    """Left: how loaded experts are, layer by layer. Right: contiguous imbalance by ranks."""
    figure, (left, right) = _figure(11, 4.6, columns=2)
    load_BLE = trace.loads()
    image = _draw_expert_loads(left, load_BLE, stats.gini)
    figure.colorbar(image, ax=left, label="load / mean of the layer")
    _draw_imbalance_by_ranks(right, load_BLE, stats)
    figure.legend(loc="outside lower right", ncols=2)
    _save(figure, path, stats.label)


def _draw_expert_loads(axes: Any, load_BLE: np.ndarray, gini: float) -> Any:
    """A column for each layer, its experts by load, the hottest at the bottom."""
    total_LE = load_BLE.sum(0).astype(float)
    mean_L1 = total_LE.mean(1, keepdims=True).clip(min=1e-30)
    sorted_LE = -np.sort(-total_LE / mean_L1, axis=1)
    image = axes.imshow(
        sorted_LE.T, aspect="auto", origin="lower", cmap="cividis", interpolation="nearest"
    )
    axes.set(
        xlabel="MoE layer",
        ylabel="expert, hottest at the bottom",
        title=f"Load of experts, Gini {gini:.2f}",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    return image


def _draw_imbalance_by_ranks(axes: Any, load_BLE: np.ndarray, stats: TraceStats) -> None:
    """A box for each number of ranks, over layers and micro-batches."""
    ratios = [
        imbalance(contiguous_rank_load(load_BLE, at.num_ranks)).ravel() for at in stats.ranks
    ]
    axes.boxplot(
        ratios,
        tick_labels=[str(at.num_ranks) for at in stats.ranks],
        whis=(5, 95),
        widths=0.5,
        medianprops={"color": _ORANGE, "linewidth": 2},
        flierprops={"marker": ".", "markersize": 3, "alpha": 0.4},
    )
    axes.axhline(1.0, color=_GREEN, linewidth=1.5, label="perfect balance")
    axes.axhline(
        WORTH_IT, color=_BLUE, linewidth=1.5, linestyle="--", label=f"worth balancing: {WORTH_IT}"
    )
    axes.set(
        xlabel="ranks, experts in order on them",
        ylabel="max / mean load, per layer and micro-batch",
        title="What balancing could gain",
        ylim=(0.9, None),
    )


def plot_compare(outcomes: Sequence[Outcome], topology: Topology, label: str, path: Path) -> None:
    """Imbalance of every method: bar to the average, tick at p95, dot at the worst."""
    figure, axes = _figure(9.5, 1.6 + 0.42 * len(outcomes))
    for y, outcome in enumerate(outcomes):
        balance = summarize(outcome.rank_load_BLR, topology.speed_R)
        _draw_method(axes, y, balance, _BLUE if outcome.name == OURS else _ORANGE)
    axes.set_yticks(range(len(outcomes)), [outcome.name for outcome in outcomes])
    axes.invert_yaxis()
    axes.set_xlim(left=1.0)
    axes.grid(axis="x", alpha=0.3)
    axes.set(
        xlabel="max / mean load of ranks, over layers and micro-batches; 1 is perfect",
        title=_machine(topology),
    )
    axes.annotate(
        "average",
        (1, 1),
        xycoords="axes fraction",
        xytext=(8, 5),
        textcoords="offset points",
    )
    figure.legend(loc="outside lower center", ncols=3)
    _save(figure, path, label)


def _draw_method(axes: Any, y: int, balance: Balance, color: str) -> None:
    """One row; the first carries the legend."""
    average, p95, worst = balance.imbalance_avg, balance.imbalance_p95, balance.imbalance_worst
    names = ("average", "95th percentile", "worst") if y == 0 else ("", "", "")
    axes.barh(y, average - 1, left=1, height=0.62, color=color, zorder=2, label=names[0])
    axes.plot([average, worst], [y, y], color=_GREY, linewidth=1, zorder=1)
    axes.plot(p95, y, "|", color=_GREY, markersize=12, label=names[1])
    axes.plot(worst, y, "o", color=_GREY, markersize=4, label=names[2])
    axes.annotate(
        f"{average:.3f}",
        (1, y),
        xycoords=("axes fraction", "data"),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
    )


def plot_plan(
    before: Outcome,
    after: Outcome,
    bound_BL: np.ndarray,
    topology: Topology,
    label: str,
    path: Path,
) -> None:
    """Imbalance layer by layer, without a plan, with it, and at the bound of any plan."""
    figure, axes = _figure(9, 4.4)
    layers = np.arange(bound_BL.shape[1])
    for outcome, color, marker in ((before, _ORANGE, "s"), (after, _BLUE, "o")):
        ratio_BL = imbalance(outcome.rank_load_BLR, topology.speed_R)
        low, high = np.percentile(ratio_BL, [5, 95], axis=0)
        axes.fill_between(layers, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(layers, ratio_BL.mean(0), marker=marker, color=color, label=outcome.name)
    ideal_BL = after.rank_load_BLR.sum(2) / topology.speed_R.sum()
    ratio_BL = ratio_to(ideal_BL, bound_BL)
    axes.plot(
        layers, ratio_BL.mean(0), color=_GREEN, linestyle="--", label="lower bound of any plan"
    )
    axes.set(
        xlabel="MoE layer",
        ylabel="max / mean load of ranks",
        title=f"{_machine(topology)}; lines: average over micro-batches, bands: 5 to 95 %",
    )
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=3)
    _save(figure, path, label)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure with its axes."""
    # Here, so that importing balance does not need matplotlib; no display is asked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def _save(figure: Any, path: Path, label: str) -> None:
    """Write a figure under the name of the trace."""
    figure.suptitle(label, fontsize=10, color=_GREY)
    figure.savefig(path, dpi=150)


def _machine(topology: Topology) -> str:
    """A topology in words."""
    nodes = "1 node" if topology.num_nodes == 1 else f"{topology.num_nodes} nodes"
    spare = topology.spare_slots_per_rank
    slots = "1 spare slot" if spare == 1 else f"{spare} spare slots"
    return f"{topology.num_ranks} ranks, {nodes}, {slots} per rank"
