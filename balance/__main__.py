"""Command line: is balancing worth it, how good is each method, plan it, convert recordings.

    python -m balance stats   trace.npz --plot stats.png
    python -m balance compare trace.npz --ranks 16 --nodes 2 --plot compare.png
    python -m balance plan    trace.npz --out plan.npz
    python -m balance convert recording.jsonl --num-experts 128 --out trace.npz

TRACE is a saved trace or any recording that ``balance.formats`` reads; recordings of whole
sequences are packed on the fly. The word "synthetic" makes a trace up.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from balance.extras import MissingExtraError
from balance.recorded import FORMATS

COMMANDS = {
    "stats": "Print whether balancing is worth it.",
    "plan": "Make the plan, print its summary, write it.",
    "compare": "Print the table of all baselines, this planner and the bound.",
    "convert": "Write a recording as a packed trace, or as plain sequences with --unpacked.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: of the command line; None takes those of the process.

    Returns:
        0 when it worked, 2 with one line on stderr when the input is bad or a package is missing.
    """
    options = _parser().parse_args(arguments)
    # Here, because it imports torch, which --help and a typing error need not wait for.
    from balance import commands

    run = {
        "stats": commands.print_stats,
        "plan": commands.write_plan,
        "compare": commands.print_comparison,
        "convert": commands.convert_recording,
    }
    try:
        run[options.command](options)
    except (ValueError, OSError, MissingExtraError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    """All commands, each with its options."""
    program = _program()
    parser = argparse.ArgumentParser(
        prog=program,
        description=(__doc__ or "").replace("python -m balance", program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moe-megakernel {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, purpose in COMMANDS.items():
        _add_options(commands.add_parser(name, help=purpose, description=purpose), name)
    return parser


def _program() -> str:
    """How the reader has called this: as a module, or by its installed name."""
    name = Path(sys.argv[0]).stem
    return name if name == "moe-balance" else "python -m balance"


def _version() -> str:
    """Of the installed distribution."""
    try:
        return version("moe-megakernel")
    except PackageNotFoundError:
        return "(not installed: run from its sources)"


def _add_options(command: argparse.ArgumentParser, name: str) -> None:
    """What a command may be told."""
    _add_input_options(command)
    command.add_argument("--json", action="store_true", help="print JSON only")
    if name != "convert":
        command.add_argument("--plot", type=Path, metavar="FILE", help="write a picture")
    if name == "stats":
        command.add_argument("--at", type=int, nargs="+", default=[8, 16, 64], help="ranks")
    else:
        command.add_argument("--ranks", type=int, default=8, help="ranks of all nodes (8)")
    if name in ("plan", "compare"):
        _add_planner_options(command)
    if name in ("plan", "convert"):
        command.add_argument("--out", type=Path, required=name == "convert", metavar="NPZ")
    if name == "convert":
        command.add_argument("--unpacked", action="store_true", help="keep whole sequences")


def _add_input_options(command: argparse.ArgumentParser) -> None:
    """What to read, and how to pack it."""
    command.add_argument("trace", metavar="TRACE", help='file, folder, or the word "synthetic"')
    command.add_argument("--format", default="auto", choices=("auto", *FORMATS))
    command.add_argument("--num-experts", type=int, help="logical experts, where not recorded")
    command.add_argument(
        "--num-layers", type=int, help="hidden layers (SGLang), MoE layers (synthetic)"
    )
    command.add_argument("--top-k", type=int, help="experts per token (SGLang, synthetic)")
    command.add_argument("--moe-layers", type=int, nargs="+", help="layers to keep")
    command.add_argument("--pack", default="shuffled", choices=("given", "shuffled", "domain"))
    command.add_argument("--tokens-per-micro-batch", type=int, help="3400; synthetic: 16384")
    command.add_argument(
        "--seed", type=int, default=0, help="of shuffling and of synthetic routing"
    )


def _add_planner_options(command: argparse.ArgumentParser) -> None:
    """Options named like a field of ``PlanOptions`` are handed to the planner."""
    command.add_argument("--nodes", type=int, default=1, help="nodes of equal size (1)")
    command.add_argument("--spare-slots", type=int, default=1, help="per rank (1)")
    command.add_argument("--cross-node-copies", type=int, help="batch-static copies per node (0)")
    command.add_argument("--tolerance", type=float, help="stop this close to the bound")
    command.add_argument("--min-tokens-per-replica", type=int, help="smallest load of a copy")
    command.add_argument(
        "--move-budget", type=int, help="most experts of a layer that change homes"
    )
    command.add_argument(
        "--no-reorder", dest="reorder", action="store_false", default=None, help="keep all homes"
    )
    command.add_argument("--locality", type=float, help="straggler load worth one send less")
    command.add_argument(
        "--tile-rows", type=int, help="balance tiles of this many rows, not tokens"
    )
    command.add_argument(
        "--previous", type=Path, metavar="PLAN", help="plan whose homes to start from"
    )
    command.add_argument(
        "--tile", type=int, default=128, help="rows of a tile, for measuring (128)"
    )


if __name__ == "__main__":
    sys.exit(main())
