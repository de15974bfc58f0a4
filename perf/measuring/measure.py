"""How time is taken.

Every call is warmed up past compilation. Then rounds: in each, every provider runs once, the
first one moving on by one, so that clocks and neighbours hit all alike. On a GPU the L2 cache is
overwritten before each call. Two times are kept apart:

* ``graph``: the device's time for one replay of a CUDA graph that holds the call;
* ``eager``: the wall clock from calling until the device is done, launches included.

Clocks are not locked. Without a GPU only ``host`` exists: the wall clock of the call.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

Sampler = Callable[[], float]


@dataclass(frozen=True)
class Protocol:
    """How a figure is sampled.

    Attributes:
        warm_ups: calls of each provider that are not timed.
        rounds: in each of which every provider is timed once.
        flush_bytes: overwritten before each timed call to empty the L2 cache.
    """

    warm_ups: int = 10
    rounds: int = 50
    flush_bytes: int = 256 << 20


DEFAULT = Protocol()
QUICK = Protocol(warm_ups=3, rounds=10)


@dataclass(frozen=True)
class Timing:
    """Spread of samples; the unit is the caller's, microseconds for times.

    Attributes:
        median, p20, p80: percentiles of the samples.
        n: how many there were.
    """

    median: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        """Summarise samples, at least one."""
        p20, median, p80 = np.percentile(samples, [20, 50, 80]).tolist()
        return cls(median, p20, p80, len(samples))

    @classmethod
    def exact(cls, value: float) -> "Timing":
        """A figure that was counted or predicted, not sampled."""
        return cls(value, value, value, 1)

    def scaled(self, factor: float) -> "Timing":
        """The same samples in another unit."""
        return Timing(self.median * factor, self.p20 * factor, self.p80 * factor, self.n)

    def inverse(self, numerator: float) -> "Timing":
        """numerator / sample: a rate. The slow samples are its low end."""
        return Timing(numerator / self.median, numerator / self.p80, numerator / self.p20, self.n)


def interleave(samplers: Mapping[str, Sampler], protocol: Protocol) -> dict[str, Timing]:
    """Sample all in turns and summarise each."""
    names = list(samplers)
    for name in names:
        for _ in range(protocol.warm_ups):
            samplers[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(protocol.rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            samples[name].append(samplers[name]())
    return {name: Timing.of(taken) for name, taken in samples.items()}


def time_host(calls: Mapping[str, Callable[[], object]], protocol: Protocol) -> dict[str, Timing]:
    """Wall clock of each call in microseconds, nothing flushed and nothing awaited."""
    return interleave({name: _host_sampler(call) for name, call in calls.items()}, protocol)


def time_eager(
    calls: Mapping[str, Callable[[], object]], protocol: Protocol, device: torch.device
) -> dict[str, Timing]:
    """Microseconds from calling until the device is done, L2 emptied before."""
    flush = make_flush(protocol, device)
    return interleave(
        {name: _eager_sampler(call, flush, device) for name, call in calls.items()}, protocol
    )


def time_graphs(
    calls: Mapping[str, Callable[[], object]], protocol: Protocol, device: torch.device
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Device microseconds of a replayed graph of each call, and why some could not be captured."""
    flush = make_flush(protocol, device)
    stream, pool = capture_stream(device), torch.cuda.graph_pool_handle()
    samplers, refused = {}, {}
    for name, call in calls.items():
        try:
            samplers[name] = _graph_sampler(capture(call, stream, pool), flush)
        except Exception as error:  # whatever a library raises while capturing
            torch.cuda.synchronize(device)
            pool = torch.cuda.graph_pool_handle()
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    timings = interleave(samplers, protocol)
    samplers.clear()
    torch.cuda.empty_cache()  # the graphs' memory; the next case may need it all
    return timings, refused


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream graphs are captured on, so that they share one workspace."""
    return torch.cuda.Stream(device)


def capture(
    call: Callable[[], object], stream: torch.cuda.Stream, pool: Any
) -> torch.cuda.CUDAGraph:
    """Return a graph that holds one call.

    Graphs share the pool, since they are replayed one after another and nobody reads their output.
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        call()
    return graph


def make_flush(protocol: Protocol, device: torch.device) -> Callable[[], object]:
    """Return a call that overwrites more memory than the L2 cache holds."""
    size = protocol.flush_bytes if device.type == "cuda" else 1
    scratch = torch.empty(size, dtype=torch.int8, device=device)
    return scratch.zero_


def _host_sampler(call: Callable[[], object]) -> Sampler:
    def sample_us() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6

    return sample_us


def _eager_sampler(
    call: Callable[[], object], flush: Callable[[], object], device: torch.device
) -> Sampler:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def sample_us() -> float:
        flush()
        wait()
        start = time.perf_counter()
        call()
        wait()
        return (time.perf_counter() - start) * 1e6

    return sample_us


def _graph_sampler(graph: torch.cuda.CUDAGraph, flush: Callable[[], object]) -> Sampler:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample_us() -> float:
        flush()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    return sample_us
