"""Order and statistics of sampling; device times need a device."""

import pytest
import torch

from perf.measuring.measure import Protocol, Timing, interleave, time_eager, time_graphs, time_host


def test_providers_take_turns_and_the_first_one_moves_on():
    order = []

    def sampler(name):
        def sample():
            order.append(name)
            return float(len(order))

        return sample

    timings = interleave({name: sampler(name) for name in "abc"}, Protocol(warm_ups=2, rounds=3))
    assert "".join(order) == "aabbcc" + "abc" + "bca" + "cab"
    assert timings["a"].n == 3
    assert timings["a"].median == 12  # samples 7, 12 and 14


def test_a_timing_keeps_the_band_of_its_samples():
    timing = Timing.of([float(n) for n in range(11)])
    assert (timing.median, timing.p20, timing.p80, timing.n) == (5, 2, 8, 11)
    assert timing.scaled(2) == Timing(10, 4, 16, 11)


def test_the_slow_samples_are_the_low_rates():
    assert Timing(2.0, 1.0, 4.0, 9).inverse(8.0) == Timing(4.0, 2.0, 8.0, 9)


def test_an_exact_figure_has_no_band():
    assert Timing.exact(3) == Timing(3, 3, 3, 1)


@pytest.mark.parametrize("time_calls", [time_host, lambda c, p: time_eager(c, p, CPU)])
def test_calls_are_timed_after_their_warm_ups(time_calls):
    counts = {"one": 0}

    def call():
        counts["one"] += 1

    timings = time_calls({"one": call}, Protocol(warm_ups=4, rounds=5))
    assert counts["one"] == 9
    assert timings["one"].n == 5 and timings["one"].median > 0


CPU = torch.device("cpu")


@pytest.mark.gpu
def test_a_graph_is_timed_and_one_that_synchronises_is_refused(device):
    x = torch.randn(64, 64, device=device)
    calls = {"fine": lambda: x @ x, "reads back": lambda: x.sum().item()}
    timings, refused = time_graphs(calls, Protocol(2, 3, 1 << 20), device)
    assert set(timings) == {"fine"} and timings["fine"].median > 0
    assert set(refused) == {"reads back"}
