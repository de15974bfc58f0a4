"""Pictures are written, and say what they show."""

import numpy as np
import pytest

from balance.compare import plots, report
from balance.compare.baselines.run import run_baseline
from balance.recorded.synthetic import SyntheticConfig, make_trace
from balance.topology import Topology

TOPOLOGY = Topology(2, 2, 1)


@pytest.fixture(scope="module")
def trace():
    return make_trace(
        SyntheticConfig(16, 2, 3, num_micro_batches=2, tokens_per_micro_batch=200, num_ranks=4)
    )


@pytest.fixture
def drawn(monkeypatch):
    """The figure that was saved, for a look at its texts."""
    figures = []
    save = plots._save

    def keep(figure, *arguments):
        figures.append(figure)
        save(figure, *arguments)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_stats_picture(trace, drawn, tmp_path):
    stats = report.trace_stats(trace, [2, 4])
    plots.plot_stats(trace, stats, tmp_path / "x.png")
    assert is_png(tmp_path / "x.png")
    left, right = drawn[0].axes[:2]
    assert left.get_xlabel() == "MoE layer" and "Gini" in left.get_title()
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["2", "4"]
    assert drawn[0].get_suptitle() == trace.label


def test_compare_picture_names_every_method(trace, drawn, tmp_path):
    names = ("none (contiguous)", "EPLB, oracle per batch")
    outcomes, _ = report.compare(trace.loads(), TOPOLOGY, names=names)
    plots.plot_compare(outcomes, TOPOLOGY, trace.label, tmp_path / "x.png")
    assert is_png(tmp_path / "x.png")
    axes = drawn[0].axes[0]
    assert tuple(tick.get_text() for tick in axes.get_yticklabels()) == names
    assert axes.get_title() == "4 ranks, 2 nodes, 1 spare slot per rank"


def test_plan_picture(trace, drawn, tmp_path):
    load_BLE = trace.loads()
    before = run_baseline("none (contiguous)", load_BLE, TOPOLOGY)
    after = run_baseline("EPLB, oracle per micro-batch", load_BLE, TOPOLOGY)
    bound_BL = report.lower_bound(load_BLE, TOPOLOGY)
    plots.plot_plan(before, after, bound_BL, TOPOLOGY, trace.label, tmp_path / "x.png")
    assert is_png(tmp_path / "x.png")
    lines = {line.get_label(): line.get_ydata() for line in drawn[0].axes[0].lines}
    assert set(lines) == {before.name, after.name, "lower bound of any plan"}
    assert (np.asarray(lines[before.name]) >= lines["lower bound of any plan"]).all()
