"""How long, how deep and how wide the code is, against what a reader can hold in mind.

    python -m tests.metrics     # a row per package; exit status 1 when a limit is broken

``LIMITS`` is the only copy of the numbers; the structure tests hold the code to them.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests.helpers.sources import FOLDERS, ROOT, Function, modules_of, parse, place


class Limit(NamedTuple):
    """What is meant to be reached, and what must not be passed."""

    aim: int
    most: int
    what: str


LIMITS = {
    "lines": Limit(25, 60, "lines of a function of the host"),
    "device_lines": Limit(25, 40, "lines of a function of the device"),
    "arguments": Limit(6, 12, "arguments of a function, on host and device"),
    "depth": Limit(2, 3, "statements that one line stands inside of"),
    "module_lines": Limit(250, 400, "lines of a module"),
    "folder_files": Limit(10, 18, "modules of a folder"),  # so many chapters has the planner
}
NESTING = (
    ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match,
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One function."""

    path: Path
    node: Function
    lines: int
    depth: int
    arguments: int
    on_device: bool

    def __str__(self) -> str:
        return f"{place(self.path, self.node)} {self.node.name}"


@cache
def measure(path: Path) -> list[Measured]:
    """Return a module's functions, methods and inner ones included."""
    return [
        Measured(path, node, length_of(node), depth_of(node), num_arguments(node), is_jit(node))
        for node in ast.walk(parse(path))
        if isinstance(node, Function)
    ]


def length_of(node: Function) -> int:
    """Count the lines of a function, its docstring and decorators included."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return (node.end_lineno or node.lineno) - first + 1


def depth_of(node: ast.AST, inside: int = 0) -> int:
    """Count the compound statements around the innermost line; ``elif`` is no deeper than ``if``.

    A function inside a function starts again: it is measured by itself.
    """
    deepest = inside
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.Lambda | ast.ClassDef):
            continue
        is_elif = isinstance(node, ast.If) and [child] == node.orelse and isinstance(child, ast.If)
        deeper = isinstance(child, NESTING) and not is_elif
        deepest = max(deepest, depth_of(child, inside + deeper))
    return deepest


def num_arguments(node: Function) -> int:
    """Count the arguments, without ``self`` and ``cls``."""
    given = node.args
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def is_jit(node: Function) -> bool:
    """Whether Triton compiles a function."""
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def undocumented(*folders: str) -> set[str]:
    """Return the public functions and classes, of module and class level, without a docstring.

    Magic methods say what they are by name, and functions without a body have nothing to say.
    """
    return {
        f"{place(path, node)} {node.name}"
        for path in modules_of(*folders)
        for node in public_definitions(parse(path))
        if not ast.get_docstring(node)
    }


def public_definitions(tree: ast.Module) -> Iterator[Function | ast.ClassDef]:
    """Yield what a module offers by a name without underscore."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node


@cache
def broken_limits(folder: str) -> dict[str, set[str]]:
    """Return what passes each limit in a folder, as ``place name: value``."""
    functions = [one for path in modules_of(folder) for one in measure(path)]
    host, device = (
        [one for one in functions if one.on_device is on_device] for on_device in (False, True)
    )
    return {
        "lines": over("lines", {str(one): one.lines for one in host}),
        "device_lines": over("device_lines", {str(one): one.lines for one in device}),
        "arguments": over("arguments", {str(one): one.arguments for one in functions}),
        "depth": over("depth", {str(one): one.depth for one in functions}),
        "module_lines": over("module_lines", lines_of_modules(folder)),
        "folder_files": over("folder_files", files_of_folders(folder)),
    }


def over(limit: str, values: dict[str, int]) -> set[str]:
    """Return the names whose value passes a limit, with the value."""
    most = LIMITS[limit].most
    return {f"{name}: {value}" for name, value in values.items() if value > most}


def lines_of_modules(folder: str) -> dict[str, int]:
    """Return the lines of each module."""
    return {place(path): len(path.read_text().splitlines()) for path in modules_of(folder)}


def files_of_folders(folder: str) -> dict[str, int]:
    """Return the number of modules in each folder, without the one that names it."""
    paths = [path for path in modules_of(folder) if path.name != "__init__.py"]
    return {
        str(parent.relative_to(ROOT)): [path.parent for path in paths].count(parent)
        for parent in {path.parent for path in paths}
    }


def row_of(folder: str) -> str:
    """Return a package's figures as one line under ``HEADER``."""
    functions = [one for path in modules_of(folder) for one in measure(path)]
    lines = sorted(one.lines for one in functions)
    p90 = statistics.quantiles(lines, n=10, method="inclusive")[-1]
    modules = lines_of_modules(folder).values()
    documented = [node for path in modules_of(folder) for node in public_definitions(parse(path))]
    return (
        f"{folder:<12}{len(modules):>6}{sum(modules):>8}"
        f"{statistics.median(lines):>8.0f}{p90:>5.0f}{lines[-1]:>5}"
        f"{max(one.depth for one in functions):>7}{max(one.arguments for one in functions):>11}"
        f"{statistics.median(modules):>9.0f}{max(modules):>5}"
        f"{max(files_of_folders(folder).values()):>12}"
        f"{len(documented) - len(undocumented(folder)):>12} of {len(documented)}"
    )


HEADER = (
    f"{'package':<12}{'files':>6}{'lines':>8}{'median':>8}{'p90':>5}{'max':>5}"
    f"{'depth':>7}{'arguments':>11}{'module':>9}{'max':>5}{'in a folder':>12}{'documented':>12}"
)


def main() -> int:
    """Print the table, the limits and what breaks them."""
    print(HEADER)
    for folder in FOLDERS:
        print(row_of(folder))
    num_broken = 0
    for limit, (aim, most, what) in LIMITS.items():
        found = sorted(name for folder in FOLDERS for name in broken_limits(folder)[limit])
        num_broken += len(found)
        print(f"\n{what}: aim {aim}, at most {most}, {len(found)} over")
        for name in found:
            print(f"    {name}")
    return 1 if num_broken else 0


if __name__ == "__main__":
    sys.exit(main())
