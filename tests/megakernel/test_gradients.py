"""Gradients of the layer: right, exact where they can be, the same bits whatever the plan."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel import (
    Experts,
    Placement,
)
from tests.helpers.compare import assert_same_bits
from tests.helpers.dialects import HELD, Dialect
from tests.helpers.gradients import LAYERS, Incoming, make_problem
from tests.helpers.training import (
    CONFIG,
    errors_beyond,
    train,
)

QUICK = {
    "given-absent", "replay-even", "live-slot", "gpt-oss", "deepseek", "capacity",
    "over-all-replay", "shared-live", "nemotron", "router-fp32",
}  # fmt: skip
DIALECT = {dialect.name: dialect for dialect in LAYERS}


def name_of(dialect: Dialect) -> str:
    """Return the id pytest shows."""
    return dialect.name


def all_but(names: set[str]) -> list:
    """Return every dialect of the layer; those not named are slow."""
    slow = pytest.mark.slow
    return [d if d.name in names else pytest.param(d, marks=slow) for d in LAYERS]


@pytest.mark.parametrize("dialect", all_but(QUICK), ids=lambda d: d.name)
def test_gradients_of_every_dialect_are_as_near_as_eagers(dialect: Dialect):
    problem = make_problem(dialect)
    assert errors_beyond(problem, train(problem, dialect), dialect.dtype) == {}


PLANS = {
    "again": {},
    "one worker": {"config": replace(CONFIG, num_workers=1)},
    "17 workers": {"config": replace(CONFIG, num_workers=17)},
    "nothing saved": {"save": "nothing"},
    "replayed": {"replays": True},
    "copies take turns": {"placement": Placement(HELD)},
    "replayed on copies": {"placement": Placement(HELD), "replays": True, "save": "nothing"},
    "reordered": {"placement": Placement(torch.tensor([3, 1, 0, 2]))},
    "other queues": {"config": replace(CONFIG, tile_group=1, blocks_per_task=1, look_ahead=False)},
}


@pytest.fixture(scope="module")
def baseline():
    dialect = DIALECT["live"]
    problem = make_problem(dialect)
    return dialect, problem, train(problem, dialect)


@pytest.mark.parametrize("plan", PLANS)
def test_bits_of_all_gradients_do_not_depend_on(plan: str, baseline):
    dialect, problem, expected = baseline
    trained = train(problem, dialect, **PLANS[plan])
    assert_same_bits(actual=trained.y_TH, expected=expected.y_TH)
    for name, gradient in expected.gradients.items():
        assert_same_bits(actual=trained.gradients[name], expected=gradient)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shared-live", "gpt-oss", "bfloat16"])
@pytest.mark.parametrize("plan", ["17 workers", "nothing saved", "replayed on copies"])
def test_bits_do_not_depend_on_the_plan_in_other_dialects(name: str, plan: str):
    dialect = DIALECT[name]
    problem = make_problem(dialect)
    expected, trained = train(problem, dialect), train(problem, dialect, **PLANS[plan])
    for tensor, gradient in expected.gradients.items():
        assert_same_bits(actual=trained.gradients[tensor], expected=gradient)


def test_a_tokens_own_gradients_do_not_depend_on_the_other_tokens():
    dialect = DIALECT["given"]
    problem = make_problem(dialect)
    few = replace(
        problem,
        inputs=replace(problem.inputs, x_TH=problem.inputs.x_TH[5:22].contiguous()),
        expert_of_TK=problem.expert_of_TK[5:22].contiguous(),
        given_TK=problem.given_TK[5:22].contiguous(),
        incoming=Incoming(problem.incoming.y_TH[5:22].contiguous()),
    )
    every, own = train(problem, dialect).gradients, train(few, dialect).gradients
    for name in ("x_TH", "routing.gate_TK"):
        assert_same_bits(actual=own[name], expected=every[name][5:22])


def small_integers(generator: torch.Generator, most: int):
    """Return a function that draws float32 integers between -most and most."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-most, most + 1, shape, generator=generator).float()

    return draw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_give_exact_gradients_to_the_last_bit(dtype: torch.dtype):
    """Sums of small integers are exact in any order, so every bit is known."""
    draw = small_integers(torch.Generator().manual_seed(3), 1)
    T, H, I, E = 19, 20, 12, 4
    x, gate_up, down = draw(T, H), draw(E, 2 * I, H), draw(E, H, I)
    sparse = (torch.rand(T, H) < 0.2).float()
    problem = replace(make_problem(DIALECT["given"]), given_TK=draw(T, 2).to(dtype))
    ids_TK = problem.expert_of_TK[:T].contiguous()
    experts = Experts((gate_up * (gate_up > 0)).to(dtype), down.to(dtype), activation="relu")
    inputs = replace(problem.inputs, x_TH=(x * sparse).to(dtype), experts=experts)
    dy_TH = (draw(T, H) * (torch.rand(T, H) < 0.1)).to(dtype)
    problem = replace(problem, inputs=inputs, expert_of_TK=ids_TK, incoming=Incoming(dy_TH))
    trained = train(problem, DIALECT["given"])
    for name, truth in problem.gradients().items():
        assert truth.abs().max() < 256, name  # bfloat16 holds them
        assert torch.equal(trained.gradients[name].double(), truth), name


# Errors that other implementations had, by what went wrong.


def given_problem(ids_TK: torch.Tensor):
    """Return a problem whose routing is given so."""
    problem = make_problem(DIALECT["given"])
    return replace(problem, expert_of_TK=ids_TK.int().contiguous())


def test_absent_experts_get_exact_zeros_from_a_launch_that_zeroes_nothing():
    ids_TK = torch.tensor([[1, 2]]).repeat(37, 1)
    problem = given_problem(ids_TK)
    trained = train(problem, DIALECT["given"])
    assert errors_beyond(problem, trained, torch.float32) == {}
    for name in ("experts.gate_up_E2IH", "experts.down_EHI"):
        gradient = trained.gradients[name][[0, 3]]
        assert_same_bits(actual=gradient, expected=torch.zeros_like(gradient))


def test_no_row_at_all_gives_zeros_everywhere():
    problem = given_problem(torch.full((37, 2), -1))
    for name, gradient in train(problem, DIALECT["given"]).gradients.items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), name


def test_one_token_for_one_expert_of_many_and_the_gate_weighs_downs_gradient():
    """A row tile of one row: what fills it up reaches no product, NaN in it or not."""
    ids_TK = torch.tensor([[0, 1]]).repeat(37, 1)
    ids_TK[20, 1] = 2
    problem = given_problem(ids_TK)
    trained = train(problem, DIALECT["given"])
    assert errors_beyond(problem, trained, torch.float32) == {}
    doubled = replace(problem, given_TK=2 * problem.given_TK)
    again = train(doubled, DIALECT["given"]).gradients["experts.down_EHI"]
    torch.testing.assert_close(again, 2 * trained.gradients["experts.down_EHI"])


def test_skipped_choices_of_a_token_with_nan_stay_by_themselves():
    """A token without an expert reaches no expert's gradient, whatever it holds."""
    ids_TK = torch.tensor([[0, 1]]).repeat(37, 1)
    ids_TK[5] = -1
    problem = given_problem(ids_TK)
    problem.inputs.x_TH[5] = torch.nan
    gradients = train(problem, DIALECT["given"]).gradients
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("name", ["replay", "over-all-replay"])
def test_padding_of_nan_reaches_no_gradient_of_a_weight(name: str):
    """Rows without an expert, as a packed batch ends in, may hold anything."""
    dialect = DIALECT[name]
    problem = make_problem(dialect)
    ids_TK = problem.expert_of_TK.clone()
    ids_TK[-3:] = -1
    incoming = problem.incoming._replace(gate_TK=None, logits_TE=None)
    problem = replace(problem, expert_of_TK=ids_TK, incoming=incoming)
    expected = train(problem, dialect).gradients
    problem.inputs.x_TH[-3:] = torch.nan
    for tensor, gradient in train(problem, dialect).gradients.items():
        assert_same_bits(actual=gradient, expected=expected[tensor])


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_any_shape_and_load_is_as_near_as_eager(data: st.DataObject):
    E = data.draw(st.integers(1, 6), label="E")
    sizes = {
        "E": E,
        "K": data.draw(st.integers(1, min(E, 3)), label="K"),
        "T": data.draw(st.integers(8, 40), label="T"),
        "H": data.draw(st.integers(1, 50), label="H"),
        "I": data.draw(st.integers(1, 40), label="I"),
    }
    route = data.draw(st.sampled_from(["live", "given", "replay"]), label="route")
    skip = data.draw(st.sampled_from(["", "some"]), label="skip") if route != "live" else ""
    save = data.draw(st.sampled_from(["preactivations", "nothing"]), label="save")
    dialect = Dialect("drawn", "any", route, sizes=sizes, skip=skip)
    problem = make_problem(dialect)
    assert errors_beyond(problem, train(problem, dialect, save=save), torch.float32) == {}
