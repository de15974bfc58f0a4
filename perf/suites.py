"""The suites by name, and the command that runs them.

``python -m perf run --suite S --out DIR`` writes DIR/S.csv. Suites that need a GPU say so and are
skipped without one. The exit status is 1 only when something of ours failed.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from perf import record
from perf.cases import SHAPES, Case
from perf.costs import H200, Machine
from perf.measure import DEFAULT, QUICK, Protocol, Timing, time_eager, time_graphs
from perf.record import Row, make_row
from perf.roofline import ASSUMED_H200, Roofs, measure_roofs


@dataclass
class Bench:
    """Where and how a suite runs, and what it found.

    Attributes:
        device: GPU, or the CPU for what runs there and for rehearsals.
        quick: few small cases, few rounds.
        protocol: warm-ups and rounds.
        deadline: ``time.monotonic()`` after which no new case starts; None for no limit.
        models: names of models to keep; empty for all.
        rows: figures so far.
        failures: what of ours was wrong.
        notes: what was skipped, and why.
    """

    device: torch.device
    quick: bool = False
    protocol: Protocol = DEFAULT
    deadline: float | None = None
    models: tuple[str, ...] = ()
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _roofs: Roofs | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether device times exist."""
        return self.device.type == "cuda"

    @property
    def roofs(self) -> Roofs:
        """Measured once in this run on a GPU; assumed, and labelled so, without one."""
        if self._roofs is None:
            self._roofs = (
                measure_roofs(self.device, self.protocol) if self.on_gpu else ASSUMED_H200
            )
        return self._roofs

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
        timing_of = {"eager": time_eager(calls, self.protocol, self.device)}
        if self.on_gpu:
            captured = {name: call for name, call in calls.items() if name not in not_captured}
            timing_of["graph"], refused = time_graphs(captured, self.protocol, self.device)
            self.notes += [f"{name}: no graph, {reason}" for name, reason in refused.items()]
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

    def each(self, cases: Iterable[Case]) -> Iterable[Case]:
        """Yield cases with a progress bar until the time is up, and note what was left out."""
        wanted = self.keep(cases)
        with tqdm(wanted, unit="case", leave=False) as progress:
            for place, case in enumerate(progress):
                if self.deadline is not None and time.monotonic() > self.deadline:
                    self.notes.append(f"{len(wanted) - place} cases left out: time is up")
                    return
                progress.set_description(f"{case.name} T={case.num_tokens}")
                yield case


@dataclass(frozen=True)
class Suite:
    """A set of cases and what is found out about them.

    Attributes:
        run: fills the bench.
        about: one line.
        needs_gpu: whether its figures mean anything only on a GPU.
    """

    run: Callable[[Bench], None]
    about: str
    needs_gpu: bool


def suites() -> dict[str, Suite]:
    """Return every suite by name."""
    from perf import suites_host, suites_layer, suites_rank

    return {
        "forward": Suite(suites_layer.forward, "models x T = 1024 ... 65536, gate included", True),
        "decode": Suite(suites_layer.decode, "T = 1 ... 256, gate included", True),
        "replay": Suite(suites_layer.replay, "live gate, replay and given routing", True),
        "skew": Suite(suites_layer.skew, "one T, balanced to one expert takes all", True),
        "planner": Suite(suites_rank.planner, "seconds, imbalance, bound, bytes", False),
        "makespan": Suite(
            suites_rank.makespan, "slowest rank under each plan; predicted without a GPU", False
        ),
        "host": Suite(suites_host.host, "launches, microseconds, allocations per call", False),
        "simulate": Suite(suites_host.simulate, "predicted launch times, steps of tuning", False),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", nargs="+", required=True, choices=[*suites(), "all"])
    parser.add_argument("--out", type=Path, default=Path("out/perf"), help="folder for the CSVs")
    parser.add_argument("--quick", action="store_true", help="few small cases, few rounds")
    parser.add_argument("--model", nargs="+", default=[], choices=SHAPES, help="only these")
    parser.add_argument("--budget", type=float, help="seconds after which no new case starts")


def run(arguments: argparse.Namespace) -> int:
    """Run suites and return 0 unless something of ours failed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = list(suites()) if "all" in arguments.suite else arguments.suite
    failures = []
    for name in wanted:
        bench = Bench(
            device,
            arguments.quick,
            QUICK if arguments.quick else DEFAULT,
            time.monotonic() + arguments.budget if arguments.budget else None,
            tuple(arguments.model),
        )
        failures += run_suite(name, bench, arguments.out)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def run_suite(name: str, bench: Bench, out: Path) -> list[str]:
    """Run one suite, write its rows, say what was skipped; return its failures."""
    suite = suites()[name]
    if suite.needs_gpu and not bench.on_gpu:
        print(f"{name}: skipped, its figures need a GPU")
        return []
    start = time.monotonic()
    suite.run(bench)
    if bench.on_gpu:
        add_roofs(bench, name)
    if bench.rows:
        record.write(bench.rows, out / f"{name}.csv")
    seconds = time.monotonic() - start
    print(f"{name}: {len(bench.rows)} figures in {seconds:.0f} s -> {out / f'{name}.csv'}")
    for note in dict.fromkeys(bench.notes):
        print(f"  {note}")
    return [f"{name}: {failure}" for failure in bench.failures]


def add_roofs(bench: Bench, suite: str) -> None:
    """Record what the machine could do in the same run."""
    for metric, unit, value in (
        ("dense product", "TFLOP/s", bench.roofs.dense_flops_per_s * 1e-12),
        ("copy", "GB/s", bench.roofs.copy_bytes_per_s * 1e-9),
        ("L2 read", "GB/s", bench.roofs.l2_bytes_per_s * 1e-9),
    ):
        timing = Timing.exact(value)
        bench.rows.append(make_row(suite, "machine", "roof", 0, "graph", metric, unit, timing))
