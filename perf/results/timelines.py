"""Timelines of workers as files and pictures: the kernel's own, and the simulator's."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from megakernel.plan.protocol import FORWARD_NAMES, NAMES
from megakernel.tools.timeline import Timeline
from perf.results.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    add_legend,
    make_figure,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (SKY, ORANGE, PURPLE, BLACK, GREEN, GREY, VERMILION, BLUE)
# Eight colours do for a backward launch too: its gradients of weights are hatched.
COLOUR_OF_TASK = dict(zip(FORWARD_NAMES, COLOURS, strict=True)) | {
    "shared dH": GREY, "dH": VERMILION, "shared dX": BLACK, "dX": BLUE, "dS": PURPLE, "dx": SKY,
    "dRouter": ORANGE, "dGateUp": GREEN, "dDown": ORANGE, "shared dGateUp": BLACK,
    "shared dDown": GREY, "dBias": PURPLE, "dTokenGate": SKY,
}  # fmt: skip
HATCHED = NAMES[NAMES.index("dRouter") :]
SHOWN_WORKERS = 24
PREDICTED = "us, predicted,"
PATTERN = "timeline_*.npz"


@dataclass(frozen=True, eq=False)
class Saved:
    """A timeline with the words that belong to it.

    Attributes:
        title: what was launched, where and when.
        timeline: of one launch.
        unit: what its times are in, and whether they are predicted.
    """

    title: str
    timeline: Timeline
    unit: str = "us"


def save(saved: Saved, path: Path) -> None:
    """Write a timeline to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        field.name: getattr(saved.timeline, field.name) for field in fields(Timeline)
    }
    np.savez_compressed(path, title=saved.title, unit=saved.unit, **arrays)


def load(path: Path) -> Saved:
    """Read what :func:`save` wrote.

    Raises:
        ValueError: on another file.
    """
    names = {"title", "unit", *(field.name for field in fields(Timeline))}
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} must be a saved timeline: {error}") from error
    if set(arrays) != names:
        raise ValueError(f"{path} must hold {sorted(names)}, got {sorted(arrays)}")
    title, unit = str(arrays.pop("title")), str(arrays.pop("unit"))
    launch_us = float(arrays.pop("launch_us"))
    return Saved(title, Timeline(launch_us=launch_us, **arrays), unit)


def draw_saved(folders: Sequence[Path], out: Path) -> list[Path]:
    """Draw every timeline in some folders; return what was written."""
    written = []
    for path in (path for folder in folders for path in sorted(folder.glob(PATTERN))):
        saved = load(path)
        written.append(plot_timeline(saved, out / f"{path.stem}.png"))
    return written


def plot_timeline(saved: Saved, path: Path) -> Path:
    """Draw what some of the workers do when, and what all of them do together."""
    figure, axes = make_figure(2, 1, 12, 7, height_ratios=(3, 1), sharex=True)
    workers, shares = axes[:, 0]
    _draw_workers(workers, saved.timeline)
    _draw_shares(shares, saved.timeline, saved.unit)
    add_legend(figure, [shares], columns=7)
    return save_figure(figure, f"{saved.title}; white: claims and waits", path)


def _draw_workers(axis: "Axes", timeline: Timeline) -> None:
    """Draw the tasks of some workers, evenly chosen, as a line of bars for each."""
    num_workers = timeline.num_workers
    shown = np.unique(np.linspace(0, num_workers - 1, min(SHOWN_WORKERS, num_workers)).astype(int))
    spans_N2 = np.stack([timeline.start_N, timeline.end_N - timeline.start_N], axis=1)
    for line, worker in enumerate(shown):
        mine_N = timeline.worker_N == worker
        for kind in kinds_of(timeline):
            chosen_N = mine_N & (timeline.kind_N == kind)
            axis.broken_barh(spans_N2[chosen_N], (line - 0.4, 0.8), **look_of(kind))
    axis.set(ylabel=f"{len(shown)} of {num_workers} workers", yticks=[], ylim=(-1, len(shown)))


def _draw_shares(axis: "Axes", timeline: Timeline, unit: str) -> None:
    """Stack the share of workers in each kind of task over time."""
    edges = np.linspace(0, timeline.launch_us, 200)
    shares = [
        covered(timeline.end_N, timeline.start_N, timeline.kind_N == kind, edges)
        / timeline.num_workers
        for kind in kinds_of(timeline)
    ]
    middle = (edges[1:] + edges[:-1]) / 2
    labels = [NAMES[kind] for kind in kinds_of(timeline)]
    areas = axis.stackplot(middle, shares, labels=labels)
    for kind, area in zip(kinds_of(timeline), areas, strict=True):
        area.set(**look_of(kind))
    axis.set(xlabel=f"{unit} from the launch", ylabel="share of workers", ylim=(0, 1))


def kinds_of(timeline: Timeline) -> list[int]:
    """Return the kinds of task that a timeline holds, in the order of their numbers."""
    return np.unique(timeline.kind_N).tolist()


def look_of(kind: int) -> dict[str, Any]:
    """Return how tasks of a kind are drawn."""
    name = NAMES[kind]
    hatch, edge = ("//", "white") if name in HATCHED else ("", "none")
    return {
        "facecolor": COLOUR_OF_TASK[name], "edgecolor": edge, "hatch": hatch, "linewidth": 0.0,
    }  # fmt: skip


def covered(
    end_N: np.ndarray, start_N: np.ndarray, chosen_N: np.ndarray, edges: np.ndarray
) -> np.ndarray:
    """Mean number of the chosen spans that cover each interval between edges."""
    before = [np.clip(edges[:, None] - t[chosen_N], 0, None).sum(1) for t in (start_N, end_N)]
    return np.diff(before[0] - before[1]) / np.diff(edges)
