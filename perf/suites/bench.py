"""Where a suite runs, how it times, and what it has found so far."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from megakernel import release_workspaces
from perf.extras import progress_bar_if_any
from perf.measuring.measure import DEFAULT, Protocol, Timing, time_eager, time_graphs
from perf.measuring.roofline import ASSUMED_H200, Roofs, measure_roofs
from perf.problems.cases import RECORDING, Case
from perf.problems.providers import Provider
from perf.results.record import Row, make_row
from perf.results.timelines import Saved
from perf.simulator.costs import H200, Machine


def device_here() -> torch.device:
    """Return the current GPU, with its index as tensors name it; the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@dataclass
class Bench:
    """Where and how a suite runs, and what it found.

    Attributes:
        device: GPU, or the CPU for what runs there and for rehearsals.
        quick: few small cases, few rounds.
        protocol: warm-ups and rounds.
        deadline: ``time.monotonic()`` after which no new case starts; None for no limit.
        models: names of models to keep; empty for all.
        providers: names of providers to keep; empty for all.
        trace: recording that the suites play besides what they make up.
        known_roofs: of an earlier suite of the same run; None to measure when first asked.
        say: told what is about to happen, since a long silence looks like a hang.
        rows: figures so far.
        failures: what of ours was wrong.
        notes: what was skipped, and why.
        timelines: what workers did when, by the name of the file to be.
    """

    device: torch.device
    quick: bool = False
    protocol: Protocol = DEFAULT
    deadline: float | None = None
    models: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    trace: Path = RECORDING
    known_roofs: Roofs | None = None
    say: Callable[[str], object] = lambda text: None
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    timelines: dict[str, Saved] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether device times exist."""
        return self.device.type == "cuda"

    @property
    def roofs(self) -> Roofs:
        """Measured once in this run on a GPU; assumed, and labelled so, without one."""
        if not self.on_gpu:
            return ASSUMED_H200
        if self.known_roofs is None:
            self.known_roofs = measure_roofs(self.device, self.protocol)
        return self.known_roofs

    @property
    def machine(self) -> Machine:
        """The simulator's machine, with the measured roofs and multiprocessors on a GPU."""
        if not self.on_gpu:
            return H200
        properties = torch.cuda.get_device_properties(self.device)
        return replace(H200, roofs=self.roofs, num_sms=properties.multi_processor_count)

    def time(
        self, calls: Mapping[str, Callable[[], object]], not_captured: Sequence[str] = ()
    ) -> dict[str, dict[str, Timing]]:
        """Return timing_of[mode][name]: graph and eager on a GPU, eager elsewhere."""
        self.say(f"timing {', '.join(calls)}")
        timing_of = {"eager": time_eager(calls, self.protocol, self.device)}
        if self.on_gpu:
            captured = {name: call for name, call in calls.items() if name not in not_captured}
            timing_of["graph"], refused = time_graphs(captured, self.protocol, self.device)
            self.notes += [f"{name}: no graph, {reason}" for name, reason in refused.items()]
            # The graphs are gone: what their captures kept would lie beside the next case's.
            release_workspaces(self.device, captured=True)
            torch.cuda.empty_cache()
        return timing_of

    def add(
        self, suite: str, case: Case, provider: str, mode: str, metric: str, unit: str,
        timing: Timing,
    ) -> None:  # fmt: skip
        """Keep a figure."""
        self.rows.append(
            make_row(suite, case.name, provider, case.num_tokens, mode, metric, unit, timing)
        )

    def keep(self, cases: Iterable[Case]) -> list[Case]:
        """Return the cases whose model is wanted."""
        return [case for case in cases if not self.models or case.model.name in self.models]

    def keep_providers(self, providers: Sequence[Provider]) -> list[Provider]:
        """Return the wanted providers."""
        return [one for one in providers if not self.providers or one.name in self.providers]

    @property
    def is_late(self) -> bool:
        """Whether nothing new may start."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def each(self, cases: Iterable[Case]) -> Iterable[Case]:
        """Yield cases with a progress bar until the time is up, and note what was left out."""
        wanted = self.keep(cases)
        with progress_bar_if_any(wanted, unit="case") as progress:
            for place, case in enumerate(progress):
                if self.is_late:
                    self.notes.append(f"{len(wanted) - place} cases left out: time is up")
                    return
                progress.set_description(f"{case.name} T={case.num_tokens}")
                self.say(f"{case.name} T={case.num_tokens}")
                yield case

    def add_roofs(self, suite: str) -> None:
        """Keep what the machine could do in the same run."""
        for metric, unit, value in (
            ("dense product", "TFLOP/s", self.roofs.dense_flops_per_s * 1e-12),
            ("copy", "GB/s", self.roofs.copy_bytes_per_s * 1e-9),
            ("L2 read", "GB/s", self.roofs.l2_bytes_per_s * 1e-9),
        ):
            timing = Timing.exact(value)
            self.rows.append(make_row(suite, "machine", "roof", 0, "graph", metric, unit, timing))
