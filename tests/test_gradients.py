"""The oracle of the backward against the gradients by hand, for each dialect of a launch."""

import math

import pytest
import torch

import reference
from megakernel import Router
from reference import ExpertKind
from reference.backward import Layer, layer_backward
from reference.backward_router import RouterKind
from reference.dropping import drop_over_capacity
from tests.helpers.dialects import DIALECTS, Dialect
from tests.helpers.gradients import (
    LAYERS,
    Gradients,
    Problem,
    chosen_ids,
    make_problem,
    relative_error,
)

# Where a gradient of the oracle is in the record of the reference.
FIELD_OF = {
    "x_TH": "x_TH",
    "experts.gate_up_E2IH": "gate_up_E2IH",
    "experts.down_EHI": "down_EHI",
    "experts.gate_up_bias_E2I": "gate_up_bias_E2I",
    "experts.down_bias_EH": "down_bias_EH",
    "routing.gate_TK": "gate_TK",
    "router.weight_EH": "router_weight_EH",
    "router.bias_E": "router_bias_E",
    "shared.gate_JH": "shared_gate_JH",
    "shared.up_JH": "shared_up_JH",
    "shared.down_HJ": "shared_down_HJ",
    "shared.token_gate_1H": "token_gate_1H",
}


def layer_of(problem: Problem) -> Layer:
    """Return the tensors of a problem as the reference groups them."""
    inputs, experts, shared = problem.inputs, problem.inputs.experts, problem.inputs.experts.shared
    has_router = problem.given_TK is None
    return Layer(
        inputs.x_TH, experts.gate_up_E2IH, experts.down_EHI, experts.gate_up_bias_E2I,
        experts.down_bias_EH, problem.given_TK, inputs.router_EH if has_router else None,
        problem.router.bias_E if has_router else None, getattr(shared, "gate_JH", None),
        getattr(shared, "up_JH", None), getattr(shared, "down_HJ", None),
        getattr(shared, "token_gate_1H", None),
    )  # fmt: skip


def by_hand(problem: Problem, served_TK: torch.Tensor | None) -> Gradients:
    """Return the gradients of the reference by the names of the oracle."""
    experts, router, above = problem.inputs.experts, problem.router, problem.incoming
    kind = ExpertKind(experts.activation, experts.has_gate, experts.interleaved, experts.limit)
    out = layer_backward(
        layer_of(problem), problem.expert_of_TK, above.y_TH, served_TK=served_TK, kind=kind,
        dgate_TK=above.gate_TK, dlogits_TE=above.logits_TE,
        router=RouterKind(router.score, router.renormalize, router.scale),
    )  # fmt: skip
    found = {name: getattr(out, field) for name, field in FIELD_OF.items()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("dialect", LAYERS, ids=lambda dialect: dialect.name)
def test_the_oracle_says_what_is_written_by_hand(dialect: Dialect) -> None:
    problem = make_problem(dialect)
    capacity, served_TK = problem.router.capacity, None
    if capacity is not None:
        served_TK = drop_over_capacity(problem.expert_of_TK, capacity)
        assert int((served_TK < 0).sum()) > 0
    oracle, wanted = problem.gradients(served_TK), by_hand(problem, served_TK)
    assert set(oracle) == set(wanted)
    errors = {name: relative_error(oracle[name], wanted[name]) for name in wanted}
    assert max(errors.values()) < 1e-13, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_eager_in_16_bits_is_near_the_oracle_and_not_it(dtype: torch.dtype) -> None:
    problem = make_problem(Dialect("qwen2", "all parts", dtype=dtype, shared=(24, True)))
    oracle, eager = problem.gradients(), problem.gradients(dtype=dtype)
    assert {gradient.dtype for gradient in eager.values()} == {dtype}
    errors = [relative_error(eager[name], oracle[name]) for name in oracle]
    unit = torch.finfo(dtype).eps
    assert unit / 16 < min(errors) and max(errors) < 4 * unit


def test_a_router_in_float32_keeps_its_dtype_in_eager() -> None:
    by_name = {dialect.name: dialect for dialect in DIALECTS}
    eager = make_problem(by_name["router-fp32"]).gradients(dtype=torch.bfloat16)
    assert eager["router.weight_EH"].dtype == torch.float32
    assert eager["x_TH"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        pytest.param([], (1, 1), id="plain"),
        pytest.param(["bias_E"], (1, 1), id="biased"),
        pytest.param(["correction_bias_E"], (1, 1), id="corrected"),
        pytest.param(["bias_E", "correction_bias_E"], (3, 1), id="one-group-of-three"),
    ],
)
def test_chosen_ids_are_those_before_any_is_dropped(
    names: list[str], groups: tuple[int, int]
) -> None:
    x_TH, weight_EH = torch.randn(40, 8), torch.randn(6, 8)
    biases = {name: torch.randn(6) for name in names}
    counts = {"num_groups": groups[0], "top_groups": groups[1]}
    router = Router(2, "sigmoid", capacity=3, random_second_seed=1, **biases, **counts)
    wanted_TK = reference.route(
        x_TH.double(), weight_EH.double(), 2, kind="sigmoid", groups=groups, **biases
    ).expert_of_TK
    assert torch.equal(chosen_ids(x_TH, weight_EH, router), wanted_TK)


def test_an_error_beside_an_oracle_of_zeros_is_its_own_norm() -> None:
    zeros, ours = torch.zeros(2), torch.tensor([3.0, 4.0])
    assert relative_error(ours, zeros) == 5.0 and relative_error(zeros, zeros) == 0.0
    assert relative_error(2 * ours, ours) == 1.0
    assert math.isnan(relative_error(zeros / 0, zeros))
