"""Tests must be able to fail: each asserts something, and no comparison goes unused."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.sources import FOLDERS, ROOT, Function, functions_of, modules_of, parse, place

ASSERTING_CALL = re.compile(r"raises|warns|fail|benchmark|assert_\w+|check_call|check_output")
COMPARISON = re.compile(r"allclose|array_equal|equal|isclose|all|any|isfinite|isnan")


def called_name(node: ast.AST) -> str:
    """Return the last part of the name of what is called, or nothing."""
    function = node.func if isinstance(node, ast.Call) else None
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def is_check(node: ast.AST) -> bool:
    """Whether a node raises when something is wrong."""
    if isinstance(node, ast.Assert):
        return True
    keywords = node.keywords if isinstance(node, ast.Call) else []
    raises_on_failure = any(
        keyword.arg == "check" and ast.unparse(keyword.value) == "True" for keyword in keywords
    )
    return raises_on_failure or bool(ASSERTING_CALL.fullmatch(called_name(node)))


def can_fail(function: Function, helpers: dict[str, Function], depth: int = 3) -> bool:
    """Whether a function checks something, itself or through helpers of its file."""
    for node in ast.walk(function):
        helper = helpers.get(called_name(node)) if depth else None
        if is_check(node) or (helper is not None and can_fail(helper, helpers, depth - 1)):
            return True
    return False


def unused_comparisons(tree: ast.AST) -> list[ast.Expr]:
    """Return the statements that compare and forget the answer."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and (isinstance(node.value, ast.Compare) or COMPARISON.fullmatch(called_name(node.value)))
    ]


def test_every_test_can_fail() -> None:
    vacuous = {
        f"{place(path, function)} {name}"
        for path in modules_of("tests")
        for functions in [functions_of(parse(path))]
        for name, function in functions.items()
        if name.startswith("test_") and not can_fail(function, functions)
    }
    assert vacuous == set()


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_comparison_goes_unused(folder: str) -> None:
    unused = {place(p, node) for p in modules_of(folder) for node in unused_comparisons(parse(p))}
    assert unused == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def test_a(): assert True", True),
        ("def test_a():\n with pytest.raises(ValueError): f()", True),
        ("def test_a():\n torch.testing.assert_close(1, 1)", True),
        ("def test_a(benchmark): benchmark(f)", True),
        ("def test_a(): run(['x'], check=True)", True),
        ("def agree(): assert f()\ndef test_a(): agree()", True),
        ("def test_a(): run(['x'])", False),
        ("def test_a(): torch.equal(1, 2)", False),
        ("def agree(): f()\ndef test_a(): agree()", False),
        ("def test_a(): test_a()", False),
    ],
)
def test_a_test_that_can_not_fail_is_found(source: str, expected: bool) -> None:
    functions = functions_of(ast.parse(source))
    assert can_fail(functions["test_a"], functions) is expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("torch.equal(a, b)", 1),
        ("a == b", 1),
        ("a.isfinite().all()", 1),
        ("assert torch.equal(a, b)", 0),
        ("same = a == b", 0),
    ],
)
def test_an_unused_comparison_is_found(source: str, expected: int) -> None:
    assert len(unused_comparisons(ast.parse(source))) == expected


@pytest.mark.parametrize(
    ("beside", "test", "status"),
    [
        pytest.param("this", "pass", 0, id="both pass", marks=pytest.mark.slow),
        pytest.param("no_such_module", "pass", 1, id="the other fails"),
        pytest.param("this", "assert 0", 1, id="the test fails", marks=pytest.mark.slow),
    ],
)
def test_what_runs_beside_the_tests_fails_with_them_and_leaves_pytest_the_last_word(
    beside: str, test: str, status: int, tmp_path: Path
) -> None:
    (tmp_path / "test_one.py").write_text(f"def test_one(): {test}")
    (tmp_path / "pytest.ini").write_text("[pytest]")
    plugin = ["-p", "tests.helpers.beside", "--beside", beside]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", *plugin]
    done = subprocess.run(
        [*command, str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stdout
    assert f"python -m {beside} {'failed' if beside != 'this' else 'passed'}" in done.stdout
    assert re.match(r"1 (passed|failed) in", done.stdout.splitlines()[-1])
