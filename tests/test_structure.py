"""The rules of the house that a reader relies on: arrows, docstrings, sizes, agreed names."""

import ast
import importlib
import inspect
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.helpers.sources import (
    FOLDERS,
    PACKAGES,
    ROOT,
    dotted_name,
    imported_names,
    modules_of,
    parse,
    place,
)
from tests.metrics import LIMITS, broken_limits, undocumented


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
from importlib.machinery import PathFinder

class WithoutTriton(PathFinder):  # torch 2.14 asks whether there is one
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTriton
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


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_function_and_class_has_a_docstring(package: str) -> None:
    assert undocumented(package) == set()


# What passes a limit of tests.metrics and is about to be rewritten: function or module, and why.
BREAKERS = {
    "backward_kernel": "so does that of its backward",
    "moe_kernel": "the persistent kernel tells the story of a launch on one page",
}


def test_annotations_are_what_they_say() -> None:
    """From Python 3.11 on nothing needs them as text, and the custom op reads a record's types."""
    as_text = {
        place(path, node)
        for path in modules_of(*FOLDERS)
        for name, node in imported_names(path)
        if name == "__future__"
    }
    assert as_text == set()


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_code_stays_within_the_limits(folder: str, limit: str) -> None:
    names = {name: name.split(":")[1].split()[-1] for name in broken_limits(folder)[limit]}
    assert {full for full, name in names.items() if name not in BREAKERS} == set()


def test_what_is_let_through_still_breaks_a_limit() -> None:
    broken = {
        name.split(":")[1].split()[-1]
        for folder in FOLDERS
        for names in broken_limits(folder).values()
        for name in names
    }
    assert set(BREAKERS) <= broken


# What users and their checks call. Names, and arguments with a default, may be added.
SIGNATURES = {
    "Experts": "gate_up_E2IH, down_EHI",
    "Router": "top_k, score='softmax', renormalize=True",
    "Placement": "expert_of_P, slot_of_TK=None",
    "moe": "x_TH, router_weight_EH, experts, router, *, replay=None, placement=None, config=None, "
    "save='preactivations'",
    "moe_routed": "x_TH, expert_of_TK, gate_TK, experts, *, placement=None, config=None, "
    "save='preactivations'",
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
