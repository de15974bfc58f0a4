"""A plan changes where the work is done and nothing else: outputs keep their bits."""

import numpy as np
import pytest
import torch

from balance import Topology, Trace, make_plan
from megakernel import Placement, moe, prepare_replay
from reference import moe_by_rank
from tests.helpers.cases import Case
from tests.helpers.compare import assert_same_bits
from tests.helpers.inputs import SMALL, make_inputs

T, E, K, RANKS = 60, 8, 2, 4
CASE = Case("planned", T, K, E, 48, 32, "experts that a plan copies")


def skewed_trace():
    """One micro-batch, most tokens to experts 0 and 1, with missing choices and masked tokens."""
    rng = np.random.default_rng(3)
    chance = np.array([0.4, 0.3, 0.1, 0.06, 0.05, 0.04, 0.03, 0.02])
    ids_TK = np.array([rng.choice(E, K, replace=False, p=chance) for _ in range(T)])
    ids_TK[5, 1] = -1
    ids_TK[7] = -1
    mask_T = np.arange(T) < T - 2
    ranks_T = np.arange(T) % RANKS
    return Trace(ids_TK[:, None], np.zeros(T, int), ranks_T, E, row_mask_T=mask_T)


def planned(num_nodes, cross_node_copies):
    trace = skewed_trace()
    topology = Topology(num_nodes, RANKS // num_nodes)
    plan = make_plan(trace, topology, cross_node_copies=cross_node_copies)
    ids_TK = torch.from_numpy(trace.ids_of(0)[:, 0])
    maps = plan.expert_of_P(0, 0), plan.slot_of_TK(0, 0)
    expert_of_P, slot_of_TK = (torch.from_numpy(values) for values in maps)
    assert (plan.expert_of_P(0, 0) >= 0).sum() > E, "the plan must hold copies"
    assert (slot_of_TK < 0).equal(ids_TK < 0)
    return ids_TK, expert_of_P, slot_of_TK


PLANS = pytest.mark.parametrize(
    ("num_nodes", "cross_node_copies"),
    [
        pytest.param(1, 0, id="one node"),
        pytest.param(2, 1, id="two nodes with batch-static copies"),
    ],
)


@PLANS
def test_reference_gives_the_bits_of_the_identity(num_nodes, cross_node_copies):
    ids_TK, expert_of_P, slot_of_TK = planned(num_nodes, cross_node_copies)
    inputs = make_inputs(CASE)
    gate_TK = torch.rand(T, K, generator=torch.Generator().manual_seed(1))
    weights = inputs.experts.gate_up_E2IH, inputs.experts.down_EHI
    by_plan = moe_by_rank(inputs.x_TH, slot_of_TK, gate_TK, *weights, expert_of_P, RANKS)
    at_home = moe_by_rank(inputs.x_TH, ids_TK, gate_TK, *weights, torch.arange(E), RANKS)
    assert_same_bits(actual=by_plan, expected=at_home)


@PLANS
def test_kernel_gives_the_bits_of_the_identity(num_nodes, cross_node_copies):
    ids_TK, expert_of_P, slot_of_TK = planned(num_nodes, cross_node_copies)
    inputs = make_inputs(CASE)
    placement = Placement(expert_of_P, slot_of_TK)
    by_plan = prepare_replay(ids_TK, E, placement, config=SMALL)
    at_home = prepare_replay(ids_TK, E, config=SMALL)
    call = inputs.x_TH, inputs.router_EH, inputs.experts, inputs.router
    assert_same_bits(
        actual=moe(*call, replay=by_plan, placement=placement, config=SMALL).y_TH,
        expected=moe(*call, replay=at_home, config=SMALL).y_TH,
    )
