"""Who may import whom inside perf, drawn from its imports."""

import subprocess
import sys

import pytest

from tests.helpers.sources import ROOT, imported_names, modules_of, place

# From a room to the rooms that it may look into; "top" are the modules beside the rooms.
ARROWS = {
    "measuring": set(),
    "problems": set(),
    "results": {"measuring"},
    "simulator": {"measuring", "problems", "results"},
    "suites": {"measuring", "problems", "results", "simulator"},
    "demo": {"measuring", "results"},
    "gpu": {"measuring", "problems", "results", "suites"},
    "top": {"measuring", "problems", "results", "simulator", "suites"},
}
LEAVES = {"arguments", "extras", "sources"}  # on top, import nothing of perf, serve everyone
# Of this project's packages; what is not named here, a room may not know.
PACKAGES = {
    "measuring": set(),
    "problems": {"balance", "megakernel", "reference"},
    "results": {"megakernel"},
    "simulator": {"megakernel"},
    "suites": {"balance", "megakernel"},
    "demo": {"balance", "megakernel", "reference"},
    "gpu": {"megakernel"},
    "top": {"megakernel"},
}
MODULES = {
    path: path.relative_to(ROOT / "perf").with_suffix("").parts for path in modules_of("perf")
}


def room_of(parts):
    """Return where a module of perf is: a room, a leaf by its name, or the top."""
    if len(parts) > 1 or parts[0] in ARROWS:
        return parts[0]
    return parts[0] if parts[0] in LEAVES else "top"


def imports_of(room):
    """Yield (where, name) of what a room's modules import, also when a function runs."""
    for path, parts in MODULES.items():
        if room_of(parts) == room:
            for name, node in imported_names(path):
                yield place(path, node), name


def test_every_folder_has_its_arrows():
    rooms = {room_of(parts) for parts in MODULES.values()}
    assert rooms == set(ARROWS) | LEAVES


@pytest.mark.parametrize("room", ARROWS)
def test_a_room_looks_only_where_its_arrows_point(room):
    allowed = {room, *ARROWS[room], *LEAVES}
    crossing = {
        f"{where} imports {name}"
        for where, name in imports_of(room)
        if name.startswith("perf.") and room_of(tuple(name.split(".")[1:])) not in allowed
    }
    assert crossing == set()


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_a_leaf_imports_nothing_of_ours(leaf):
    ours = {"perf", "balance", "megakernel", "reference", "tests"}
    assert {name for _, name in imports_of(leaf) if name.split(".")[0] in ours} == set()


@pytest.mark.parametrize("room", PACKAGES)
def test_a_room_knows_only_its_packages(room):
    unknown = {"balance", "megakernel", "reference"} - PACKAGES[room]
    knowing = {
        f"{where} imports {name}"
        for where, name in imports_of(room)
        if name.split(".")[0] in unknown
    }
    assert knowing == set()


def test_reading_results_needs_neither_the_kernel_nor_the_simulator():
    names = [f"perf.results.{name}" for name in ("record", "compare", "pictures", "report")]
    code = f"import sys, {', '.join(names)}; print(*sys.modules)"
    out = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    loaded = set(out.split())
    assert loaded >= set(names)
    assert not loaded & {"megakernel", "triton", "balance", "perf.simulator", "perf.demo"}
