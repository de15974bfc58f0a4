"""A training step: one launch each way, gradients as the reference's, no bit from the plan."""

from dataclasses import replace

import pytest
import torch

from megakernel import Placement
from perf.demo.model import DemoModel, ModelConfig
from perf.demo.policy import micro_batch_of
from perf.demo.rollout import RolloutConfig, roll_out
from perf.demo.step import (
    KINDS,
    Way,
    errors,
    find_step_failures,
    kind_of,
    mapper,
    same_gradients,
    take_step,
    train_all_ways,
    train_in_reference,
)

SMALL = ModelConfig(num_layers=1, hidden=16, num_heads=2, num_experts=4, top_k=2, intermediate=16)
PLACED = [Placement(torch.tensor([3, 1, 0, 2, 1]))]
OTHER = [Placement(torch.tensor([0, 0, 1, 2, 3, 3]))]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DemoModel(SMALL)


@pytest.fixture(scope="module")
def batches(model):
    with torch.no_grad():
        rollouts = roll_out(model, RolloutConfig(2, prompt_bytes=4, new_bytes=5))
    return [micro_batch_of(rollouts, prompt) for prompt in (0, 3)]


@pytest.fixture(scope="module")
def truth(model, batches):
    oracle = DemoModel(SMALL).double()
    oracle.load_state_dict(model.state_dict())
    return train_in_reference("truth", oracle, batches)


@pytest.fixture(scope="module")
def eager(model, batches):
    return train_in_reference("eager", model, batches)


@pytest.fixture(scope="module")
def ways(model, batches):
    placements = {"none": [None, None], "one": [PLACED] * 2, "other": [OTHER, PLACED]}
    return train_all_ways(model, batches, placements, num_processes=1)


def test_a_step_in_the_layer_keeps_all_promises(truth, eager, ways):
    assert [way.name for way in ways] == ["none", "one", "other"]
    assert all(way.launches == [[(1, 1)], [(1, 1)]] for way in ways)
    assert find_step_failures(truth, eager, ways) == []
    assert max(errors(ways[0], truth).values()) < 1e-5
    assert min(errors(eager, truth).values()) > 0, "there is something to be off by"


def test_every_parameter_has_a_gradient(model, ways):
    names = {name for name, _ in model.named_parameters()}
    assert set(ways[0].gradients) == names
    assert {kind_of(name) for name in names} == set(KINDS)
    assert all(ways[0].gradients[name].abs().max() > 0 for name in names)


def test_a_step_is_the_mean_of_its_micro_batches(model, batches, eager):
    alone = [train_in_reference("one", model, [batch]) for batch in batches]
    for name, gradient in eager.gradients.items():
        mean = (alone[0].gradients[name] + alone[1].gradients[name]) / 2
        torch.testing.assert_close(gradient, mean)
    assert eager.loss == (alone[0].loss + alone[1].loss) / 2


def test_the_optimizer_lowers_the_loss(model, batches, eager):
    changed = DemoModel(SMALL)
    changed.load_state_dict(model.state_dict())
    assert take_step(changed, eager, batches) < eager.loss


def way(gradient=1.0, launches=(1, 1), loss=0.0):
    gradients = {f"blocks.0.{name}": torch.ones(2) for name in ("router_weight_EH", "down_EHI")}
    gradients |= {"blocks.0.gate_up_E2IH": torch.tensor([gradient, 1.0]), "norm_H": torch.ones(2)}
    return Way("a way", torch.tensor(loss), gradients, [[launches]], seconds=0.0)


@pytest.mark.parametrize(
    ("place", "broken", "message"),
    [
        pytest.param(0, way(1.1), "of the gradient of gate_up is over", id="error"),
        pytest.param(0, way(float("nan")), "error nan", id="nan"),
        pytest.param(1, way(launches=(1, 2)), "layer 0 took (1, 2) launches", id="backward-twice"),
        pytest.param(1, way(launches=(0, 1)), "layer 0 took (0, 1) launches", id="no-forward"),
        pytest.param(1, way(1.0 + 2**-23), "changed the bits", id="last-bit"),
        pytest.param(1, way(loss=0.5), "changed the bits", id="loss"),
    ],
)
def test_each_broken_promise_is_a_failure(place, broken, message):
    truth, eager = way(), way(1.0 + 1e-6)
    good = [way(), way()]
    assert find_step_failures(truth, eager, good) == []
    found = find_step_failures(truth, eager, [*good[:place], broken, *good[place + 1 :]])
    assert any(message in failure for failure in found)


def test_nan_is_never_the_same_bits():
    assert same_gradients(way(), way())
    assert not same_gradients(way(float("nan")), way(float("nan")))


def test_an_error_of_nothing_is_the_size_of_what_is_there():
    nothing = replace(way(), gradients={n: g * 0 for n, g in way().gradients.items()})
    assert errors(nothing, nothing) == dict.fromkeys(KINDS, 0.0)
    assert errors(way(), nothing)["down"] == pytest.approx(2**0.5)


@pytest.mark.slow
def test_processes_of_their_own_compute_the_same(model, batches, ways):
    both = train_all_ways(model, batches, {"none": [None, None]}, num_processes=2)
    assert same_gradients(both[0], ways[0])
    assert both[0].launches == ways[0].launches


def test_one_process_starts_no_other():
    with mapper(1) as spread:
        assert spread is map
