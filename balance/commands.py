"""What the commands of ``python -m balance`` do; how they are spelled is in ``__main__``."""

import json
import sys
from argparse import Namespace
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from balance import formats
from balance.baselines import BASELINES, Outcome, run_baseline
from balance.compare import plots, report, text
from balance.extras import need, progress_bar
from balance.options import PlanOptions
from balance.plan import Plan
from balance.planner import make_plan
from balance.recorded.packing import Order
from balance.recorded.synthetic import SyntheticConfig, make_trace
from balance.topology import Topology
from balance.trace import Trace


def print_stats(options: Namespace) -> None:
    """Is balancing worth it?"""
    _check_extras(options)
    trace = _read_trace(options, max(options.at))
    figures = report.trace_stats(trace, options.at)
    _print(options, asdict(figures), text.format_stats(figures))
    if options.plot:
        plots.plot_stats(trace, figures, options.plot)


def print_comparison(options: Namespace) -> None:
    """All baselines, this planner and the bound, as a table."""
    _check_extras(options)
    need("scipy", "the baseline with a linear program")
    trace, topology = _read_trace(options, options.ranks), _topology(options)
    num_steps = (len(BASELINES) + 1) * trace.num_layers
    with _progress(options, num_steps, "layers") as bar:
        made, planned = _make_plan(options, trace, topology)
        bar.update(trace.num_layers)
        outcomes, rows = report.compare(
            trace.loads(), topology, planned=planned, tile=options.tile, on_layer=bar.update
        )
    figures = {
        "label": trace.label,
        "topology": asdict(topology),
        "methods": [asdict(row) for row in rows],
        "plan": made.summary(),
    }
    lines = (f"{trace.label}; {_shape(trace)}", text.format_rows(rows), _own_bound(made))
    _print(options, figures, "\n\n".join(lines))
    if options.plot:
        plots.plot_compare(outcomes, topology, trace.label, options.plot)


def write_plan(options: Namespace) -> None:
    """Make the plan, print its summary, write it."""
    _check_extras(options)
    trace, topology = _read_trace(options, options.ranks), _topology(options)
    made, planned = _make_plan(options, trace, topology)
    summary = made.summary()
    lines = [f"{trace.label}; {_shape(trace)}"]
    lines += [f"{name:>28}  {value:.6g}" for name, value in summary.items()]
    if options.out:
        made.save(options.out)
        lines.append(f"{'written':>28}  {options.out}")
    _print(options, summary, "\n".join(lines))
    if options.plot:
        load_BLE = trace.loads()
        before = run_baseline("none (contiguous)", load_BLE, topology, tile=options.tile)
        bound_BL = report.lower_bound(load_BLE, topology)
        plots.plot_plan(before, planned, bound_BL, topology, trace.label, options.plot)


def convert_recording(options: Namespace) -> None:
    """Write a recording as a packed trace, or as plain sequences."""
    recorded = _read(options, options.ranks)
    if options.unpacked:
        if isinstance(recorded, Trace):
            raise ValueError("--unpacked needs a recording of whole sequences, got a packed trace")
        formats.write_npz(options.out, recorded)
        written = f"{options.out}: {len(recorded.sequence_start) - 1} sequences"
    else:
        trace = _pack(options, recorded, options.ranks)
        trace.save(options.out)
        written = f"{options.out}: {trace.label}; {_shape(trace)}"
    _print(options, {"written": str(options.out)}, written)


def _check_extras(options: Namespace) -> None:
    """Refuse a picture that could not be drawn, before any work."""
    if options.plot:
        need("matplotlib", "--plot")


def _read(options: Namespace, num_ranks: int) -> Trace | formats.Routes:
    """What the first argument names: synthetic, a trace, or whole sequences."""
    if options.trace == "synthetic":
        return _synthetic(options, num_ranks)
    # Of a single file a bar would show nothing until it is read.
    with _progress(options, None, "files", quiet=not Path(options.trace).is_dir()) as bar:
        return formats.read(
            options.trace,
            options.format,
            num_experts=options.num_experts,
            num_layers=options.num_layers,
            top_k=options.top_k,
            moe_layers=options.moe_layers,
            on_file=bar.update,
        )


def _read_trace(options: Namespace, num_ranks: int) -> Trace:
    """The same, packed."""
    return _pack(options, _read(options, num_ranks), num_ranks)


def _pack(options: Namespace, recorded: Trace | formats.Routes, num_ranks: int) -> Trace:
    """Whole sequences packed for these ranks; a trace as it is."""
    if isinstance(recorded, Trace):
        return recorded
    tokens = options.tokens_per_micro_batch or 3400
    return recorded.pack(num_ranks, tokens, options.pack, options.seed)


def _synthetic(options: Namespace, num_ranks: int) -> Trace:
    """A trace made up to the sizes that were given."""
    given = {
        "num_experts": options.num_experts,
        "num_layers": options.num_layers,
        "top_k": options.top_k,
        "tokens_per_micro_batch": options.tokens_per_micro_batch,
    }
    known = {name: value for name, value in given.items() if value is not None}
    order: Order = "domain" if options.pack == "domain" else "shuffled"
    return make_trace(
        SyntheticConfig(**known, num_ranks=num_ranks, order=order, seed=options.seed)
    )


def _topology(options: Namespace) -> Topology:
    """Equal nodes."""
    if options.nodes < 1 or options.ranks % options.nodes:
        raise ValueError(f"--nodes must divide the {options.ranks} ranks, got {options.nodes}")
    return Topology(options.nodes, options.ranks // options.nodes, options.spare_slots)


def _make_plan(options: Namespace, trace: Trace, topology: Topology) -> tuple[Plan, Outcome]:
    """The plan, and what it achieves, counted from its assignment of every token."""
    given = {field.name: getattr(options, field.name, None) for field in fields(PlanOptions)}
    known = {name: value for name, value in given.items() if value is not None}
    previous = Plan.load(options.previous) if options.previous else None
    made = make_plan(trace, topology, previous=previous, options=PlanOptions(**known))
    return made, report.measure_plan(made, trace, options.tile)


def _print(options: Namespace, figures: Any, words: str) -> None:
    """JSON or words."""
    print(json.dumps(figures, indent=2, default=_plain) if options.json else words)


def _plain(value: Any) -> Any:
    """What JSON does not know, as something that it does."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def _own_bound(made: Plan) -> str:
    """The bound that the table cannot show: it holds for this plan's homes only."""
    figures = made.summary()
    return (
        "With its homes and batch-static copies given, this planner's bound is "
        f"{figures['lower_bound_avg']:.4f}; gap avg {100 * figures['gap_avg']:.3f} %, "
        f"p99 {100 * figures['gap_p99']:.3f} %, worst {100 * figures['gap_worst']:.2f} %."
    )


def _shape(trace: Trace) -> str:
    """Sizes of a trace in a line."""
    return (
        f"{trace.num_tokens:,} tokens, {trace.num_micro_batches} micro-batches, "
        f"{trace.num_layers} layers, top-{trace.top_k} of {trace.num_experts}"
    )


def _progress(options: Namespace, total: int | None, unit: str, *, quiet: bool = False) -> Any:
    """A bar on stderr, which JSON goes without."""
    return progress_bar(
        total,
        unit,
        quiet=quiet or options.json,
        note=lambda line: print(line, file=sys.stderr),
    )
