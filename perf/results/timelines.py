"""Timelines of workers as files and pictures: the kernel's own, and the simulator's."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from megakernel.plan.schedule import NAMES
from megakernel.tools.timeline import Timeline
from perf.problems.cases import Case, make_loads
from perf.simulator.predict import LABEL, predict

# Okabe and Ito's palette.
COLOUR_OF_TASK = dict(
    zip(NAMES, ("#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#D55E00", "#0072B2"), strict=True)
)
SHOWN_WORKERS = 24
PREDICTED = "us, predicted,"
PATTERN = "timeline_*.npz"


@dataclass(frozen=True, eq=False)
class Saved:
    """A timeline with the words that belong to it, and what its times are in."""

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


def draw_predicted(case: Case, out: Path) -> list[Path]:
    """Draw what the simulator expects of a case; return what was written."""
    load_E, written = make_loads(case), []
    for mode in ("live", "replay"):
        prediction = predict(case.model, case.num_tokens, load_E, case.default_config, mode)
        title = f"{case.name}, T = {case.num_tokens}, {mode}\n{LABEL}"
        path = out / f"timeline_{mode}_predicted.png"
        written.append(plot_timeline(Saved(title, prediction, PREDICTED), path))
    return written


def plot_timeline(saved: Saved, path: Path) -> Path:
    """Draw what some of the workers do when, and what all of them do together."""
    timeline = saved.timeline
    figure, axes = plt.subplots(
        2, 1, figsize=(12, 7), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    num_workers = timeline.num_workers
    shown = np.unique(np.linspace(0, num_workers - 1, min(SHOWN_WORKERS, num_workers)).astype(int))
    spans_N2 = np.stack([timeline.start_N, timeline.end_N - timeline.start_N], axis=1)
    for line, worker in enumerate(shown):
        mine_N = timeline.worker_N == worker
        for kind, name in enumerate(NAMES):
            chosen_N = mine_N & (timeline.kind_N == kind)
            axes[0].broken_barh(spans_N2[chosen_N], (line - 0.4, 0.8), color=COLOUR_OF_TASK[name])
    axes[0].set(ylabel=f"{len(shown)} of {num_workers} workers", yticks=[], ylim=(-1, len(shown)))
    draw_shares(axes[1], timeline, saved.unit)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    figure.suptitle(f"{saved.title}; white: claims and waits")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def draw_shares(axis: Axes, timeline: Timeline, unit: str) -> None:
    """Stack the share of workers in each kind of task over time."""
    edges = np.linspace(0, timeline.launch_us, 200)
    shares = [
        covered(timeline.end_N, timeline.start_N, timeline.kind_N == kind, edges)
        / timeline.num_workers
        for kind in range(len(NAMES))
    ]
    middle = (edges[1:] + edges[:-1]) / 2
    axis.stackplot(middle, shares, labels=NAMES, colors=[COLOUR_OF_TASK[name] for name in NAMES])
    axis.set(xlabel=f"{unit} from the launch", ylabel="share of workers", ylim=(0, 1))


def covered(
    end_N: np.ndarray, start_N: np.ndarray, chosen_N: np.ndarray, edges: np.ndarray
) -> np.ndarray:
    """Mean number of the chosen spans that cover each interval between edges."""
    before = [np.clip(edges[:, None] - t[chosen_N], 0, None).sum(1) for t in (start_N, end_N)]
    return np.diff(before[0] - before[1]) / np.diff(edges)
