"""Timelines survive the file, and pictures say where they come from."""

import numpy as np
import pytest

from megakernel.tools.timeline import Timeline
from perf.results.timelines import Saved, covered, draw_saved, load, save

TIMES = Timeline(
    launch_us=9.0,
    kind_N=np.array([0, 4, 4]),
    worker_N=np.array([0, 1, 0]),
    ask_N=np.array([0.0, 0.0, 4.0]),
    claim_N=np.array([0.0, 0.5, 4.5]),
    start_N=np.array([0.0, 4.0, 5.0]),
    end_N=np.array([4.0, 9.0, 8.0]),
)


def test_a_timeline_survives_the_file(tmp_path):
    save(Saved("Qwen, T = 3", TIMES, "readings"), tmp_path / "timeline_x.npz")
    found = load(tmp_path / "timeline_x.npz")
    assert (found.title, found.unit) == ("Qwen, T = 3", "readings")
    assert found.timeline.launch_us == 9.0
    for name in ("kind_N", "worker_N", "ask_N", "claim_N", "start_N", "end_N"):
        assert np.array_equal(getattr(found.timeline, name), getattr(TIMES, name))


def test_another_file_is_refused(tmp_path):
    np.savez(tmp_path / "timeline_x.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"timeline_x\.npz must hold .*, got \['a'\]"):
        load(tmp_path / "timeline_x.npz")


def test_a_cut_off_file_is_refused_with_its_name(tmp_path):
    path = tmp_path / "timeline_x.npz"
    save(Saved("x", TIMES), path)
    for size in (0, 40, 700):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"timeline_x\.npz must be a saved timeline"):
            load(path)


def test_every_saved_timeline_of_a_folder_is_drawn(tmp_path):
    for name in ("b", "a"):
        save(Saved(name, TIMES), tmp_path / f"timeline_{name}.npz")
    written = draw_saved([tmp_path], tmp_path / "out")
    assert [path.name for path in written] == ["timeline_a.png", "timeline_b.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_covered_counts_spans_at_once():
    start_N, end_N = np.array([0.0, 1.0]), np.array([2.0, 2.0])
    chosen_N = np.array([True, True])
    assert covered(end_N, start_N, chosen_N, np.array([0.0, 1.0, 2.0, 3.0])).tolist() == [1, 2, 0]


def test_time_is_split_between_tasks_and_waits():
    assert TIMES.us_of_kind() == {
        "route": 2.0, "prefix": 0.0, "scatter": 0.0, "shared FFN1": 0.0, "FFN1": 4.0,
        "shared FFN2": 0.0, "FFN2": 0.0, "combine": 0.0, "claim": 0.5, "wait": 2.0,
    }  # fmt: skip
    assert TIMES.busy_share == 12 / 18
