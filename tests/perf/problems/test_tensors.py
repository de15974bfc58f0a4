"""A case's tensors route as the case demands."""

from dataclasses import replace

import pytest
import torch

import reference
from perf.problems.cases import TINY, Case, make_ids
from perf.problems.tensors import make_problem


def test_a_live_router_chooses_the_experts_of_the_scenario():
    problem = make_problem(Case(TINY, 20, "zipf"), torch.device("cpu"))
    routing = reference.route(problem.x_TH, problem.router_EH, 2)
    wanted_TK = torch.from_numpy(make_ids(problem.case))
    assert torch.equal(routing.expert_of_TK.sort(1).values, wanted_TK.sort(1).values)
    assert torch.equal(problem.expert_of_TK.long().sort(1).values, wanted_TK.sort(1).values)


def test_a_router_narrower_than_its_experts_is_refused():
    with pytest.raises(ValueError, match="hidden must be at least E=8, got 4"):
        make_problem(Case(replace(TINY, hidden=4), 2), torch.device("cpu"))
