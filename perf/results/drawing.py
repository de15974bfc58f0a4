"""The look that all pictures of perf share: colours, panels, title, file.

Figures are made without pyplot, so that no window system is asked for and nothing has to be
closed; matplotlib is imported when the first one is made.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perf.extras import optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which stays apart for every kind of colour vision.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK, GREY = "#E69F00", "#56B4E9", "#000000", "#999999"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
# More markers than colours, so that no two lines look alike and no meaning rests on colour alone.
MARKERS = "osD^vP*X<>p"
DOTS_PER_INCH = 120


def style_of(place: int) -> dict[str, Any]:
    """Return colour and marker of the line at a place of a list; later ones are dashed."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": "-" if place < len(COLOURS) else "--",
    }


def make_figure(
    lines: int, columns: int, width: float, height: float, **options: Any
) -> "tuple[Figure, Any]":
    """Return a figure of so many inches, and its axes as an array [lines, columns].

    Args:
        lines, columns: of panels.
        width, height: in inches, of the whole figure.
        options: as those of ``Figure.subplots``.
    """
    figure = optional("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(lines, columns, squeeze=False, **options)


def make_panels(count: int, width: float = 5.0) -> "tuple[Figure, list[Axes]]":
    """Return a figure with ``count`` panels of ``width`` inches, at most three in a line."""
    columns = min(count, 3)
    lines = -(-count // columns)
    figure, axes = make_figure(lines, columns, width * columns, 4.2 * lines + 0.8)
    panels = list(axes.flat)
    for spare in panels[count:]:
        spare.remove()
    return figure, panels[:count]


def add_legend(figure: "Figure", panels: "Iterable[Axes]", columns: int = 4) -> None:
    """Name below the panels what any of them labels, once."""
    handle_of = {
        label: handle
        for axis in panels
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handle_of.values()), list(handle_of), loc="outside lower center", ncols=columns,
        frameon=False,
    )  # fmt: skip


def save_figure(figure: "Figure", title: str, path: Path) -> Path:
    """Write a figure under a title; the path's ending chooses the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    return path


def file_formats() -> set[str]:
    """Return the endings a picture's path may have, without the dot."""
    return set(optional("matplotlib.backend_bases").FigureCanvasBase.get_supported_filetypes())
