"""``python -m perf COMMAND``: the demo and the measurements."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import torch

# Each module offers add_arguments(parser) and run(arguments) -> exit status, and its docstring's
# first line is the help text.
MODULE_OF_COMMAND = {
    "demo": "perf.demo.command",
    "list": "perf.listing",
    "run": "perf.suites.command",
    "compare": "perf.results.compare",
    "report": "perf.results.report",
    "tune": "perf.tune",
    "simulate": "perf.simulator.command",
}


def main(argv: Sequence[str] | None = None) -> int:
    interpret_without_gpu()
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module_name in MODULE_OF_COMMAND.items():
        module = import_module(module_name)
        command = commands.add_parser(name, help=_first_line(module), description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def interpret_without_gpu() -> None:
    """Let Triton interpret its kernels where no GPU can run them; it reads this on import."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def _first_line(module: object) -> str:
    return (module.__doc__ or "").strip().splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
