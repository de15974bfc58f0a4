"""The shared look: no two lines alike, as many panels as asked for, a file of some format."""

import numpy as np
import pytest

from perf.results.drawing import (
    COLOURS,
    MARKERS,
    add_legend,
    file_formats,
    make_figure,
    make_panels,
    save_figure,
    style_of,
)


def test_no_two_lines_look_alike():
    styles = [tuple(style_of(place).values()) for place in range(len(COLOURS) * len(MARKERS))]
    assert len(set(styles[:16])) == 16
    assert style_of(0)["linestyle"] != style_of(len(COLOURS))["linestyle"]


@pytest.mark.parametrize(("count", "lines"), [(1, 1), (3, 1), (4, 2), (7, 3)])
def test_panels_are_at_most_three_in_a_line(count, lines):
    figure, panels = make_panels(count, width=4.0)
    assert len(panels) == len(figure.axes) == count
    wanted = [4.0 * min(count, 3), 4.2 * lines + 0.8]
    assert figure.get_size_inches().tolist() == pytest.approx(wanted)


def test_a_label_is_named_once_however_many_panels_have_it():
    figure, panels = make_panels(2)
    for axis in panels:
        axis.plot([1, 2], label="ours")
    add_legend(figure, panels)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ours"]


@pytest.mark.parametrize("ending", ["png", "pdf"])
def test_the_ending_chooses_the_format_and_folders_are_made(tmp_path, ending):
    figure, axes = make_figure(1, 1, 2, 2)
    axes[0, 0].plot(np.arange(3))
    path = save_figure(figure, "a title", tmp_path / "new" / f"x.{ending}")
    assert path.read_bytes()[1:4] == ending.upper().encode()
    assert ending in file_formats()
