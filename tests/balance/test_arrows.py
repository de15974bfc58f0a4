"""The rooms of balance, and who may look into which.

     commands ──► compare ──┬──► plan ──► measures
        │                   │      └────► exact
        ├──► planner ──► steps ──► exact
        └──► recorded ──► trace

Arrows that are not drawn are refused; to add one, draw it here and say why.
"""

import pytest

from tests.helpers.sources import ROOT, dotted_name, imported_names, modules_of

# The rooms are folders; what lies on the corridor is a room of its own, or the machine and the
# batch ("base"), which everybody may know.
BASE = {"checks", "ids", "options", "topology", "trace"}
DOORS = {"__main__", "baselines", "commands", "extras", "formats"}
ALLOWED = {
    "base": {"measures"},  # the size of an expert, a default of the options
    "measures": {"base"},
    "recorded": {"base"},
    "exact": set(),
    "plan": {"base", "measures", "exact"},
    "steps": {"base", "plan", "exact"},
    "planner": {"base", "plan", "steps", "measures"},
    "compare": {"base", "plan", "measures", "exact"},
    "doors": {"base", "plan", "planner", "recorded", "compare"},
}


def room_of(module):
    """The room of a module of balance; None for the package itself, which gathers names."""
    name = module.split(".")[1] if "." in module else None
    if name in BASE:
        return "base"
    return "doors" if name in DOORS else name


def arrows():
    """(room, other room, which import) of every import between rooms."""
    modules = {dotted_name(path): path for path in modules_of("balance")}
    for module, path in modules.items():
        for name, _ in imported_names(path):
            known = name if name in modules else name.rpartition(".")[0]
            here, there = room_of(module), room_of(known) if known in modules else None
            if here and there and here != there:
                yield here, there, f"{path.relative_to(ROOT)} imports {name}"


def test_every_file_is_in_a_room():
    rooms = {room_of(dotted_name(path)) for path in modules_of("balance")} - {None}
    assert rooms == set(ALLOWED)


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_looks_only_into_those_below(room):
    refused = {
        said for here, there, said in arrows() if here == room and there not in ALLOWED[room]
    }
    assert refused == set()


@pytest.mark.parametrize("room", ALLOWED)
def test_every_arrow_is_needed(room):
    drawn = {there for here, there, _ in arrows() if here == room}
    assert drawn == ALLOWED[room]


def test_nobody_looks_through_a_door_from_inside():
    assert {
        said for here, there, said in arrows() if there == "doors" and here != "doors"
    } == set()
