"""What the project's sources say, read without running them: importing torch takes seconds."""

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MEASURED = ("megakernel", "perf", "reference")  # what a figure depends on


def digest() -> str:
    """Name the sources that ran, where there is no git to say it: equal files, equal digest."""
    total = hashlib.sha256()
    for path in sorted(path for folder in MEASURED for path in (ROOT / folder).rglob("*.py")):
        total.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return total.hexdigest()[:12]


def parse(module_name: str) -> ast.Module:
    """Return the syntax tree of a module of this repository."""
    path = ROOT.joinpath(*module_name.split(".")).with_suffix(".py")
    return ast.parse(path.read_text(), str(path))


def first_line(node: ast.Module | ast.FunctionDef) -> str:
    """Return the first line of a docstring: a module's help text, a function's in a list."""
    return (ast.get_docstring(node) or "").partition("\n")[0]


def functions_of(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """Return the functions of a module by name."""
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def calls_of(tree: ast.Module, *names: str) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Yield the arguments of a module's calls of some names, in the order of its lines.

    Args:
        tree: the module.
        names: of the called functions or classes.

    Yields:
        Positional arguments and keywords; what is no literal is None.
    """
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(call.func, ast.Name) and call.func.id in names:
            yield (
                [_literal(argument) for argument in call.args],
                {word.arg: _literal(word.value) for word in call.keywords if word.arg},
            )


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
