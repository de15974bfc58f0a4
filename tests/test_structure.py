"""The rules of the house that a reader relies on: arrows, docstrings, sizes, agreed names."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.helpers.sources import (
    FOLDERS,
    PACKAGES,
    ROOT,
    Function,
    dotted_name,
    imported_names,
    modules_of,
    parse,
    place,
)

MODULE_LINES = 400
FUNCTION_LINES = 60
KERNEL_LINES = 130  # the persistent kernel tells the story of a whole launch in one place


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_never_import_one_another(package: str) -> None:
    crossing = {
        f"{place(path, node)} imports {name}"
        for path in modules_of(package)
        for name, node in imported_names(path)
        if name.split(".")[0] in set(FOLDERS) - {package}
    }
    assert crossing == set()


def test_nobody_imports_the_tests() -> None:
    importing = {
        place(path, node)
        for path in modules_of("perf")
        for name, node in imported_names(path)
        if name.split(".")[0] == "tests"
    }
    assert importing == set()


NEEDED = {
    "reference": {"torch"},
    "balance": {"numpy", "torch"},
    "megakernel": {"numpy", "torch", "triton"},
}


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_needs_no_optional_dependency(package: str) -> None:
    allowed = {package, *NEEDED[package], *sys.stdlib_module_names}
    needing = {
        f"{place(path, node)} imports {name}"
        for path in modules_of(package)
        for name, node in imported_names(path, on_import=True)
        if name.split(".")[0] not in allowed
    }
    assert needing == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_import_in_one_direction(package: str) -> None:
    modules = {
        dotted_name(path): path
        for path in modules_of(package)
        if path.name != "__init__.py"  # it gathers what the modules offer
    }
    imported_by = {
        module: {name for name, _ in imported_names(path) if name in modules}
        for module, path in modules.items()
    }
    try:
        order = list(TopologicalSorter(imported_by).static_order())
    except CycleError as cycle:
        pytest.fail(" imports ".join(reversed(cycle.args[1])))
    assert set(order) == set(modules)


IMPORT_WITHOUT_TRITON = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("no Triton here")

sys.meta_path.insert(0, Refuse())
package = importlib.import_module(sys.argv[1])
names = [module.name for module in pkgutil.walk_packages(package.__path__, sys.argv[1] + ".")]
for name in names:
    importlib.import_module(name)
print(1 + len(names))
"""


@pytest.mark.parametrize("package", ["reference", "balance"])
def test_every_module_imports_without_triton(package: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT_TRITON, package],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(modules_of(package))


def test_every_module_says_what_it_is_for() -> None:
    silent = {place(p) for p in modules_of(*PACKAGES, "perf") if not ast.get_docstring(parse(p))}
    assert silent == set()


def public_definitions(tree: ast.Module) -> Iterator[Function | ast.ClassDef]:
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_function_and_class_has_a_docstring(package: str) -> None:
    silent = {
        f"{place(path, node)} {node.name}"
        for path in modules_of(package)
        for node in public_definitions(parse(path))
        if not ast.get_docstring(node)
    }
    assert silent == set()


@pytest.mark.parametrize("folder", FOLDERS)
def test_modules_are_short(folder: str) -> None:
    lines_of = {place(path): len(path.read_text().splitlines()) for path in modules_of(folder)}
    assert {name: lines for name, lines in lines_of.items() if lines > MODULE_LINES} == {}


def line_limit(folder: str, function: Function) -> int:
    is_kernel = folder == "megakernel" and function.name == "moe_kernel"
    return KERNEL_LINES if is_kernel else FUNCTION_LINES


@pytest.mark.parametrize("folder", FOLDERS)
def test_functions_are_short(folder: str) -> None:
    lines_of = {
        f"{place(path, node)} {node.name}": node.end_lineno - node.lineno + 1
        for path in modules_of(folder)
        for node in ast.walk(parse(path))
        if isinstance(node, Function) and node.end_lineno - node.lineno >= line_limit(folder, node)
    }
    assert lines_of == {}


# What users and their checks call. Names, and arguments with a default, may be added.
SIGNATURES = {
    "Experts": "gate_up_E2IH, down_EHI",
    "Router": "top_k, score='softmax', renormalize=True",
    "Placement": "expert_of_P, slot_of_TK=None",
    "moe": "x_TH, router_weight_EH, experts, router, *, replay=None, placement=None, config=None",
    "moe_routed": "x_TH, expert_of_TK, gate_TK, experts, *, placement=None, config=None",
    "prepare_replay": "expert_of_TK, num_experts, placement=None, config=None",
}
PUBLIC = {*SIGNATURES, "KernelConfig", "MoEOutput", "MegakernelStall", "Replay", "check"}


def test_megakernel_offers_what_was_agreed() -> None:
    megakernel = importlib.import_module("megakernel")
    assert set(megakernel.__all__) >= PUBLIC
    assert megakernel.MoEOutput._fields[:4] == ("y_TH", "expert_of_TK", "gate_TK", "logits_TE")
    assert issubclass(megakernel.MegakernelStall, RuntimeError)
    assert next(iter(inspect.signature(megakernel.KernelConfig).parameters)) == "num_workers"


def test_balance_offers_what_was_agreed() -> None:
    assert {"Plan", "Topology", "Trace", "make_plan"} <= set(
        importlib.import_module("balance").__all__
    )


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_public_arguments_are_the_agreed_ones(name: str) -> None:
    signature = inspect.signature(getattr(importlib.import_module("megakernel"), name))
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    found = str(inspect.Signature(bare)).strip("()").split(", ")
    agreed = SIGNATURES[name].split(", ")
    assert found[: len(agreed)] == agreed
    assert all("=" in added for added in found[len(agreed) :]), "additions need a default"


@pytest.mark.parametrize("package", PACKAGES)
def test_exported_names_exist_once(package: str) -> None:
    module = importlib.import_module(package)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    assert len(set(module.__all__)) == len(module.__all__)
