"""The project's own source files, as text and as syntax trees."""

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("reference", "megakernel", "balance")  # what a wheel carries
FOLDERS = (*PACKAGES, "perf", "tests")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules_of(*folders: str) -> list[Path]:
    """Return the Python files of some folders, in order."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@cache
def parse(path: Path) -> ast.Module:
    """Return a file's syntax tree, which is not to be changed: it is read once."""
    return ast.parse(path.read_text(), str(path))


def place(path: Path, node: ast.AST | None = None) -> str:
    """Name a file and a line in it."""
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def dotted_name(path: Path) -> str:
    """Return the name a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def functions_of(tree: ast.AST) -> dict[str, Function]:
    """Return all functions by name, methods and inner ones included."""
    return {node.name: node for node in ast.walk(tree) if isinstance(node, Function)}


def imported_names(path: Path, *, on_import: bool = False) -> Iterator[tuple[str, ast.stmt]]:
    """Yield each module a file imports, and each ``module.name`` it imports from one.

    Args:
        path: the file.
        on_import: leave out what only runs when a function is called.
    """
    package = path.relative_to(ROOT).parent.parts
    for node in statements(parse(path), into_functions=not on_import):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*start, *filter(None, [node.module])])
            yield base, node
            yield from ((f"{base}.{alias.name}", node) for alias in node.names)


def statements(node: ast.AST, *, into_functions: bool) -> Iterator[ast.stmt]:
    """Yield every statement below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        if into_functions or not isinstance(child, Function):
            yield from statements(child, into_functions=into_functions)


def tracked_files() -> list[str]:
    """Return the names of the files that git tracks, or skip the test where there is no git."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout: this is a plain copy of the sources")
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    return [name for name in names if (ROOT / name).is_file()]
