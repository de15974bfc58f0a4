"""Every rule of a legal plan, broken on purpose."""

import dataclasses

import numpy as np
import pytest

from balance import Topology, make_plan


@pytest.fixture
def plan():
    """Two nodes of two ranks, an expert and a spare slot on each; slots are home, spare, home …"""
    return make_plan(np.array([[[6, 2, 5, 5]], [[2, 2, 2, 2]]]), Topology(2, 2), reorder=False)


def tampered(plan, **cells):
    """Change cells of arrays: name -> (index, value)."""
    arrays = {}
    for name, (index, value) in cells.items():
        arrays[name] = getattr(plan, name).copy()
        arrays[name][index] = value
    return dataclasses.replace(plan, **arrays)


def test_the_plan_itself_is_legal(plan):
    assert plan.expert_of_BLP[:, 0].tolist() == [
        [0, -1, 1, 0, 2, -1, 3, -1],
        [0, -1, 1, -1, 2, -1, 3, -1],
    ]


@pytest.mark.parametrize(
    ("cells", "rule"),
    [
        pytest.param(
            {"expert_of_BLP": ((0, 0, 2), 0)}, "not in its home slot", id="home slot holds another"
        ),
        pytest.param({"expert_of_BLP": ((0, 0, 1), 4)}, "must lie in -1..3", id="no such expert"),
        pytest.param(
            {"expert_of_BLP": ((0, 0, 1), 0)}, "rank holds two copies", id="copy beside the home"
        ),
        pytest.param(
            {"expert_of_BLP": ((0, 0, 5), 0)}, "on a node without", id="copy on another node"
        ),
        pytest.param(
            {"is_static_LP": ((0, 3), True)}, "changes between micro-batches", id="static changes"
        ),
        pytest.param(
            {"quota_BLP": ((1, 0, 1), 1)}, "stands on an empty slot", id="quota on empty slot"
        ),
        pytest.param({"quota_BLP": ((0, 0, 0), -1)}, "quota is negative", id="negative quota"),
        pytest.param({"quota_BLP": ((0, 0, 0), 9)}, "do not sum to the loads", id="too much"),
    ],
)
def test_broken_rules(plan, cells, rule):
    with pytest.raises(ValueError, match=f"plan must be legal: .*{rule}"):
        tampered(plan, **cells)


def test_a_missing_rank_may_hold_nothing():
    whole = Topology(1, 2, home_slots_per_rank=2)
    plan = make_plan(np.ones((1, 1, 2), int), whole)
    broken = dataclasses.replace(whole, missing_ranks=(1,))
    with pytest.raises(ValueError, match="a missing rank holds an expert"):
        dataclasses.replace(plan, topology=broken)


def test_slots_must_fit_the_machine(plan):
    with pytest.raises(ValueError, match="must have 12 slots"):
        dataclasses.replace(plan, topology=Topology(2, 2, spare_slots_per_rank=2))
