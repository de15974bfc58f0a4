"""What outsiders import stays where they look for it."""

import importlib

import pytest

DOORS = {
    "balance": {
        "Plan",
        "PlanOptions",
        "Topology",
        "Trace",
        "Traffic",
        "count_traffic",
        "make_plan",
        "moving_the_expert_pays",
    },
    "balance.formats": {
        "FORMATS",
        "Routes",
        "decode_sglang",
        "decode_vllm",
        "detect",
        "from_megatron",
        "from_sglang",
        "from_slime",
        "from_verl",
        "from_vllm",
        "join",
        "read",
        "read_fingerprints",
        "read_npz",
        "write_npz",
    },
    "balance.baselines": {"BASELINES", "Baseline", "Outcome", "Served", "eplb", "run_baseline"},
}
ALSO = {"balance.trace": "Trace", "balance.plan": "PlanOptions", "balance.__main__": "main"}


@pytest.mark.parametrize("door", DOORS)
def test_every_name_is_behind_its_door(door):
    module = importlib.import_module(door)
    assert set(module.__all__) == DOORS[door]
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("module", ALSO)
def test_names_that_are_imported_from_their_module(module):
    assert hasattr(importlib.import_module(module), ALSO[module])


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'balance' has no attribute 'make_plans'"):
        _ = importlib.import_module("balance").make_plans
