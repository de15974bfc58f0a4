"""The house of megakernel: who may import whom, who loads, who touches a stream."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

from megakernel import Experts, Router, moe
from tests.helpers.inputs import SMALL
from tests.helpers.sources import ROOT, dotted_name, imported_names, modules_of, parse, place

# A room is a module or a folder right under megakernel. An arrow points at what may be imported.
LEAVES = {"errors", "config", "plan"}
CHECKS = {*LEAVES, "checks", "formats"}
RECORDS = {"experts", "router", "placement", "replay"}
BELOW_LAUNCH = {*CHECKS, *RECORDS, "calls"}
BELOW_API = {*BELOW_LAUNCH, "launch", "autograd"}
ARROWS = {
    "errors": set(),
    "config": {"errors"},
    "plan": {"plan", "config"},
    "checks": CHECKS,
    "formats": CHECKS,
    "experts": {*CHECKS, *RECORDS},
    "router": {*CHECKS, *RECORDS},
    "placement": {*CHECKS, *RECORDS},
    "replay": {*CHECKS, *RECORDS},
    "calls": {*CHECKS, *RECORDS},  # checks/calls.py looks at the records that a call is made of
    "losses": {*CHECKS, *RECORDS},
    "device": {"device", "plan"},
    "hopper": {"hopper", "plan"},  # device/hopper, a second way to write the same tasks
    "launch": {*BELOW_LAUNCH, "launch", "device", "hopper"},
    "autograd": {*BELOW_LAUNCH, "launch"},
    "api": BELOW_API,
    "stages": {*BELOW_API, "api"},
    "ranks": {*BELOW_API, "api", "ranks"},
    "adapters": {*CHECKS, *RECORDS, "api", "ranks", "losses", "adapters"},
    "tools": {*BELOW_API, "api", "device", "hopper", "tools"},
}
ROOM_OF_MODULE = {"megakernel.checks.calls": "calls", "megakernel.device.hopper": "hopper"}
MODULES = [path for path in modules_of("megakernel") if path.name != "__init__.py"]


def room_of(name: str) -> str | None:
    """Return the room of a module, or of what is imported from one; None outside of the house."""
    for module, room in ROOM_OF_MODULE.items():
        if f"{name}.".startswith(f"{module}."):
            return room
    package, *inner = name.split(".")
    if package != "megakernel" or not inner:
        return None
    exists = (ROOT / package / inner[0]).is_dir() or (ROOT / package / f"{inner[0]}.py").exists()
    return inner[0] if exists else "api"  # the package offers what a user calls


def rooms_imported_by(path: Path) -> Iterator[tuple[str, str, ast.stmt]]:
    """Yield room, name and statement of each import from the house."""
    for name, node in imported_names(path):
        if room := room_of(name):
            yield room, name, node


def test_every_module_is_in_a_room_with_arrows() -> None:
    assert {room_of(dotted_name(path)) for path in MODULES} <= set(ARROWS)


@pytest.mark.parametrize("room", ARROWS)
def test_arrows_point_where_they_may(room: str) -> None:
    crossing = {
        f"{place(path, node)} imports {name}"
        for path in MODULES
        if room_of(dotted_name(path)) == room
        for target, name, node in rooms_imported_by(path)
        if target not in ARROWS[room]
    }
    assert crossing == set()


def test_no_arrow_runs_back_up() -> None:
    """The records are one floor, as are checks and formats: there modules may name one another."""
    floor_of = {room: "records" if room in RECORDS else room for room in ARROWS}
    floor_of["formats"] = "checks"
    below: dict[str, set[str]] = {floor: set() for floor in floor_of.values()}
    for room, targets in ARROWS.items():
        below[floor_of[room]] |= {floor_of[target] for target in targets} - {floor_of[room]}
    assert {"api", "device"} < set(TopologicalSorter(below).static_order())


@pytest.mark.parametrize(
    "leaf", ["checks.tensors", "config", "plan.spec", "plan.buffers", "errors"]
)
def test_a_leaf_imports_nothing_of_the_house(leaf: str) -> None:
    path = ROOT / "megakernel" / f"{leaf.replace('.', '/')}.py"
    imported = {name for _, name, _ in rooms_imported_by(path)}
    of_spec = ("forward", "protocol", "rules")  # which spec is made of
    allowed = ("megakernel.errors", *(f"megakernel.plan.{name}" for name in of_spec))
    assert {name for name in imported if not name.startswith(allowed)} == set()


def test_nobody_imports_device_code_to_name_a_record() -> None:
    records = {
        f"{dotted_name(path)}.{node.name}"
        for path in modules_of("megakernel/device")
        for node in parse(path).body
        if isinstance(node, ast.ClassDef)
    }
    naming = {
        f"{place(path, node)} imports {name}"
        for path in MODULES
        if room_of(dotted_name(path)) not in ("device", "hopper")
        for name, node in imported_names(path)
        if name in records
    }
    assert naming == set()


def attributes_of(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Yield every dotted expression of a file, ``torch.cuda.device`` as one."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node), node


MEMORY = {"tl.load", "tl.store", "tl.gather", "tl.debug_barrier"}


def touches_memory(name: str) -> bool:
    """Whether an expression reads, writes or orders global memory."""
    return name in MEMORY or name.startswith(("tl.atomic_", "tl.make_tensor_descriptor"))


def test_only_device_code_loads_and_stores() -> None:
    touching = {
        f"{place(path, node)} {name}"
        for path in MODULES
        if room_of(dotted_name(path)) not in ("device", "hopper")
        for name, node in attributes_of(path)
        if touches_memory(name)
    }
    assert touching == set()


# What counts as a stream, a workspace or the driver: anything of torch.cuda, Triton's driver, and
# whatever is imported from the workspace's module. ``megakernel`` itself may offer ``check``.
DRIVER = ("torch.cuda.", "torch.accelerator.", "triton.runtime.driver", "driver.active")
MAY_TOUCH = {"launch", "tools"}


def test_only_the_launch_touches_a_stream_a_workspace_or_the_driver() -> None:
    others = [path for path in MODULES if room_of(dotted_name(path)) not in MAY_TOUCH]
    touching = {
        f"{place(path, node)} {name}"
        for path in others
        for name, node in [*attributes_of(path), *imported_names(path)]
        if name.startswith((*DRIVER, "megakernel.launch.workspace"))
    }
    assert touching == set()


def loaders() -> set[tuple[str, str]]:
    """Return file and name of each device function that loads by itself."""
    return {
        (str(path), node.name)
        for path in modules_of("megakernel/device")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef)
        and any(
            isinstance(n, ast.Attribute) and ast.unparse(n) == "tl.load" for n in ast.walk(node)
        )
    }


def way_to(frame) -> list[str]:
    """Return the functions of megakernel on the stack, outermost first."""
    names = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(str(ROOT / "megakernel")):
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names[::-1]


MOST_HOPS = 6


def test_at_most_six_functions_stand_from_the_call_to_a_load() -> None:
    """moe, run, the kernel, its task, and what loads; measured on the way, in the interpreter."""
    wanted, ways = loaders(), set()

    def watch(frame, event: str, argument: object) -> None:
        if event == "call" and (frame.f_code.co_filename, frame.f_code.co_name) in wanted:
            ways.add(tuple(way_to(frame)))

    x_TH, router_EH = torch.ones(2, 16), torch.ones(2, 16)
    experts = Experts(torch.ones(2, 32, 16), torch.ones(2, 16, 16))
    sys.setprofile(watch)
    try:
        moe(x_TH, router_EH, experts, Router(1), config=SMALL)
    finally:
        sys.setprofile(None)
    assert ways, "nothing was seen to load"
    assert {" > ".join(way) for way in ways if len(way) > MOST_HOPS} == set()
