"""The demo's picture: who was asked for what, and how evenly eight ranks share it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from balance.measures.load import imbalance
from perf.results.drawing import BLUE, ORANGE, add_legend, make_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEFORE, AFTER = ORANGE, BLUE
# Colours stop changing at this many times the mean, so that one hot expert hides no others.
FULL_COLOUR = 4.0


def draw(
    path: Path,
    kinds: Sequence[str],
    load_BLE: np.ndarray,
    before_LR: np.ndarray,
    after_LR: np.ndarray,
    shown: int,
) -> None:
    """Write a picture with one column per layer.

    Args:
        path: file to write; the ending chooses the format.
        kinds: name of each micro-batch.
        load_BLE: recorded assignments.
        before_LR: load per rank of one micro-batch, experts placed in order.
        after_LR: the same under the plan.
        shown: that micro-batch.
    """
    num_layers = load_BLE.shape[1]
    figure, axes = make_figure(2, num_layers, 4.6 * num_layers, 6.4)
    relative_BLE = load_BLE / load_BLE.mean(-1, keepdims=True)
    for layer in range(num_layers):
        heat = axes[0, layer].imshow(
            relative_BLE[:, layer], aspect="auto", cmap="cividis", vmin=0, vmax=FULL_COLOUR
        )
        _label_heat(axes[0, layer], kinds if layer == 0 else None, layer)
        _draw_ranks(axes[1, layer], before_LR[layer], after_LR[layer])
    figure.colorbar(heat, ax=axes[0, -1], label="load / mean load", extend="max")
    axes[1, 0].set_ylabel("assignments on the rank")
    add_legend(figure, axes[1], columns=3)
    highest = 1.08 * max(before_LR.max(), after_LR.max())
    for axis in axes[1]:
        axis.set_ylim(0, highest)
    title = f"Recorded expert load of every micro-batch, and rank load of “{kinds[shown]}”"
    save_figure(figure, title, path)


def _label_heat(axis: "Axes", kinds: Sequence[str] | None, layer: int) -> None:
    axis.set_title(f"layer {layer}: load per expert")
    axis.set_xlabel("expert")
    axis.set_yticks(range(len(kinds)) if kinds else [], kinds)


def _draw_ranks(axis: "Axes", before_R: np.ndarray, after_R: np.ndarray) -> None:
    rank_R = np.arange(len(before_R))
    axis.bar(rank_R - 0.2, before_R, 0.4, color=BEFORE, label="experts in order")
    axis.bar(rank_R + 0.2, after_R, 0.4, color=AFTER, label="under the plan")
    axis.axhline(before_R.mean(), color="black", linewidth=0.8, linestyle="--", label="mean")
    axis.set_title(f"imbalance {imbalance(before_R):.2f} → {imbalance(after_R):.2f}")
    axis.set_xlabel("rank")
    axis.set_xticks(rank_R)
