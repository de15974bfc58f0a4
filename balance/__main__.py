"""Command line: is balancing worth it, how good is each method, plan it, convert recordings.

    python -m balance stats   trace.npz --plot stats.png
    python -m balance compare trace.npz --ranks 16 --nodes 2 --plot compare.png
    python -m balance plan    trace.npz --out plan.npz
    python -m balance convert recording.jsonl --num-experts 128 --out trace.npz

TRACE is a saved trace or any recording that ``balance.recorded.read`` reads; recordings of whole
sequences are packed on the fly. The word "synthetic" makes a trace up.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from balance.compare import plots, report
from balance.compare.baselines import BASELINES, Outcome, run_baseline
from balance.plan import Plan, PlanOptions
from balance.planner import make_plan
from balance.recorded import read as formats
from balance.recorded.packing import Order
from balance.recorded.synthetic import SyntheticConfig, make_trace
from balance.topology import Topology
from balance.trace import Trace


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 2 with one line on stderr when the input is bad."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def stats(options: argparse.Namespace) -> None:
    """Print whether balancing is worth it."""
    trace = _read_trace(options, max(options.at))
    figures = report.trace_stats(trace, options.at)
    _print(options, asdict(figures), report.format_stats(figures))
    if options.plot:
        plots.plot_stats(trace, figures, options.plot)


def compare(options: argparse.Namespace) -> None:
    """Print the table of all baselines, this planner and the bound."""
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
    text = f"{trace.label}; {_shape(trace)}\n\n{report.format_rows(rows)}\n\n{_own_bound(made)}"
    _print(options, figures, text)
    if options.plot:
        plots.plot_compare(outcomes, topology, trace.label, options.plot)


def plan(options: argparse.Namespace) -> None:
    """Make the plan, print its summary, write it."""
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


def convert(options: argparse.Namespace) -> None:
    """Write a recording as a packed trace, or as plain sequences with --unpacked."""
    recorded = _read(options, options.ranks)
    if options.unpacked:
        if isinstance(recorded, Trace):
            raise ValueError("--unpacked needs a recording of whole sequences, got a packed trace")
        formats.write_npz(options.out, recorded)
        text = f"{options.out}: {len(recorded.sequence_start) - 1} sequences"
    else:
        trace = _pack(options, recorded, options.ranks)
        trace.save(options.out)
        text = f"{options.out}: {trace.label}; {_shape(trace)}"
    _print(options, {"written": str(options.out)}, text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m balance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (stats, plan, compare, convert):
        sub = commands.add_parser(
            command.__name__, help=command.__doc__, description=command.__doc__
        )
        sub.set_defaults(command=command)
        _add_input_options(sub)
        sub.add_argument("--json", action="store_true", help="print JSON only")
        if command is not convert:
            sub.add_argument("--plot", type=Path, metavar="FILE", help="write a picture")
        if command is stats:
            sub.add_argument("--at", type=int, nargs="+", default=[8, 16, 64], help="ranks")
        else:
            sub.add_argument("--ranks", type=int, default=8, help="ranks of all nodes (8)")
        if command in (plan, compare):
            _add_planner_options(sub)
        if command in (plan, convert):
            sub.add_argument("--out", type=Path, required=command is convert, metavar="NPZ")
        if command is convert:
            sub.add_argument("--unpacked", action="store_true", help="keep whole sequences")
    return parser


def _add_input_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("trace", metavar="TRACE", help='file, folder, or the word "synthetic"')
    sub.add_argument("--format", default="auto", choices=("auto", *formats.FORMATS))
    sub.add_argument("--num-experts", type=int, help="logical experts, where not recorded")
    sub.add_argument(
        "--num-layers", type=int, help="hidden layers (SGLang), MoE layers (synthetic)"
    )
    sub.add_argument("--top-k", type=int, help="experts per token (SGLang, synthetic)")
    sub.add_argument("--moe-layers", type=int, nargs="+", help="layers to keep")
    sub.add_argument("--pack", default="shuffled", choices=("given", "shuffled", "domain"))
    sub.add_argument("--tokens-per-micro-batch", type=int, help="3400; synthetic: 16384")
    sub.add_argument("--seed", type=int, default=0, help="of shuffling and of synthetic routing")


def _add_planner_options(sub: argparse.ArgumentParser) -> None:
    """Options named like a field of ``PlanOptions`` are handed to the planner."""
    sub.add_argument("--nodes", type=int, default=1, help="nodes of equal size (1)")
    sub.add_argument("--spare-slots", type=int, default=1, help="per rank (1)")
    sub.add_argument("--cross-node-copies", type=int, help="batch-static copies per node (0)")
    sub.add_argument("--tolerance", type=float, help="stop this close to the bound")
    sub.add_argument("--min-tokens-per-replica", type=int, help="smallest load of a copy")
    sub.add_argument("--move-budget", type=int, help="most experts of a layer that change homes")
    sub.add_argument(
        "--no-reorder", dest="reorder", action="store_false", default=None, help="keep all homes"
    )
    sub.add_argument("--locality", type=float, help="straggler load worth one send less")
    sub.add_argument("--tile-rows", type=int, help="balance tiles of this many rows, not tokens")
    sub.add_argument(
        "--previous", type=Path, metavar="PLAN", help="plan whose homes to start from"
    )
    sub.add_argument("--tile", type=int, default=128, help="rows of a tile, for measuring (128)")


def _read(options: argparse.Namespace, num_ranks: int) -> Trace | formats.Routes:
    if options.trace == "synthetic":
        return _synthetic(options, num_ranks)
    with _progress(options, None, "files") as bar:
        return formats.read(
            options.trace,
            options.format,
            num_experts=options.num_experts,
            num_layers=options.num_layers,
            top_k=options.top_k,
            moe_layers=options.moe_layers,
            on_file=bar.update,
        )


def _read_trace(options: argparse.Namespace, num_ranks: int) -> Trace:
    return _pack(options, _read(options, num_ranks), num_ranks)


def _pack(options: argparse.Namespace, recorded: Trace | formats.Routes, num_ranks: int) -> Trace:
    if isinstance(recorded, Trace):
        return recorded
    tokens = options.tokens_per_micro_batch or 3400
    return recorded.pack(num_ranks, tokens, options.pack, options.seed)


def _synthetic(options: argparse.Namespace, num_ranks: int) -> Trace:
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


def _topology(options: argparse.Namespace) -> Topology:
    if options.nodes < 1 or options.ranks % options.nodes:
        raise ValueError(f"--nodes must divide the {options.ranks} ranks, got {options.nodes}")
    return Topology(options.nodes, options.ranks // options.nodes, options.spare_slots)


def _print(options: argparse.Namespace, figures: Any, text: str) -> None:
    print(json.dumps(figures, indent=2, default=_plain) if options.json else text)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def _own_bound(made: Plan) -> str:
    figures = made.summary()
    return (
        "With its homes and batch-static copies given, this planner's bound is "
        f"{figures['lower_bound_avg']:.4f}; gap avg {100 * figures['gap_avg']:.3f} %, "
        f"p99 {100 * figures['gap_p99']:.3f} %, worst {100 * figures['gap_worst']:.2f} %."
    )


def _shape(trace: Trace) -> str:
    return (
        f"{trace.num_tokens:,} tokens, {trace.num_micro_batches} micro-batches, "
        f"{trace.num_layers} layers, top-{trace.top_k} of {trace.num_experts}"
    )


def _progress(options: argparse.Namespace, total: int | None, unit: str) -> Any:
    # Here, so that importing balance does not need tqdm.
    from tqdm import tqdm

    return tqdm(total=total, unit=f" {unit}", leave=False, disable=options.json or None)


def _make_plan(
    options: argparse.Namespace, trace: Trace, topology: Topology
) -> tuple[Plan, Outcome]:
    """The plan, and what it achieves, counted from its assignment of every token."""
    given = {field.name: getattr(options, field.name, None) for field in fields(PlanOptions)}
    known = {name: value for name, value in given.items() if value is not None}
    previous = Plan.load(options.previous) if options.previous else None
    made = make_plan(trace, topology, previous=previous, options=PlanOptions(**known))
    return made, report.measure_plan(made, trace, options.tile)


if __name__ == "__main__":
    sys.exit(main())
