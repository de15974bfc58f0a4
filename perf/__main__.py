"""``python -m perf COMMAND``: the demo and the measurements."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from perf.sources import first_line, parse

# Each module offers add_arguments(parser) and run(arguments) -> exit status, and its docstring's
# first line is the help text. Only the chosen one is imported: most of them need torch.
MODULE_OF_COMMAND = {
    "demo": "perf.demo.command",
    "list": "perf.listing",
    "run": "perf.suites.command",
    "compare": "perf.results.compare",
    "report": "perf.reporting",
    "tune": "perf.tune",
    "simulate": "perf.simulator.command",
}
WITHOUT_KERNELS = ("list", "compare")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = make_parser(given).parse_args(given)
    return arguments.run(arguments)


def make_parser(given: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser that knows all commands by name, and the arguments of the given one."""
    chosen = next((word for word in given if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module_name in MODULE_OF_COMMAND.items():
        if name == chosen:
            add_command(commands, name, module_name)
        else:
            commands.add_parser(name, help=first_line(parse(module_name)))
    return parser


def add_command(commands: argparse._SubParsersAction, name: str, module_name: str) -> None:
    """Import a command's module and take over its arguments."""
    if name not in WITHOUT_KERNELS:
        interpret_without_gpu()
    module = import_module(module_name)
    command = commands.add_parser(name, description=module.__doc__)
    module.add_arguments(command)
    command.set_defaults(run=module.run)


def interpret_without_gpu() -> None:
    """Let Triton interpret its kernels where no GPU can run them; it reads this on import."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


if __name__ == "__main__":
    sys.exit(main())
