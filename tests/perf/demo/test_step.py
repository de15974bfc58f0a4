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
    Job,
    Trained,
    errors,
    find_step_failures,
    gather,
    kind_of,
    mapper,
    same_gradients,
    take_step,
    train_all,
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
    advantage_G = torch.tensor([1.0, -0.5])  # short samples may all have the same reward
    return [
        replace(
            batch,
            advantage_G=advantage_G,
            # Not whom the router would choose now, so that a replay makes a difference.
            expert_of_TLK=(batch.expert_of_TLK + 1) % SMALL.num_experts,
        )
        for batch in (micro_batch_of(rollouts, prompt) for prompt in (0, 3))
    ]


@pytest.fixture(scope="module")
def truth(model, batches):
    oracle = DemoModel(SMALL).double()
    oracle.load_state_dict(model.state_dict())
    return train_in_reference("truth", oracle, batches)


@pytest.fixture(scope="module")
def eager(model, batches):
    return train_in_reference("eager", model, batches)


@pytest.fixture(scope="module")
def trained(model, batches):
    first, second = batches
    jobs = [Job("one", first, PLACED), Job("one", second, PLACED), Job("none", first, None)]
    return train_all(model, [*jobs, Job("other", first, OTHER)], num_processes=1)


def test_a_step_in_the_layer_keeps_all_promises(truth, eager, trained):
    assert [part.name for part in trained] == ["one", "one", "none", "other"]
    assert all(part.launches == [(1, 1)] for part in trained)
    ours = gather("ours", trained[:2])
    assert find_step_failures(truth, eager, ours, trained[2:]) == []
    assert max(errors(ours, truth).values()) < 1e-5
    assert min(errors(eager, truth).values()) > 0, "there is something to be off by"
    assert not same_gradients(*trained[:2]), "another micro-batch has other gradients"


def test_every_parameter_has_a_gradient(model, trained):
    names = {name for name, _ in model.named_parameters()}
    assert set(trained[0].gradients) == names
    assert {kind_of(name) for name in names} == set(KINDS)
    assert all(trained[0].gradients[name].abs().max() > 0 for name in names)


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


def part(gradient=1.0, launches=(1, 1), loss=0.0):
    gradients = {f"blocks.0.{name}": torch.ones(2) for name in ("router_weight_EH", "down_EHI")}
    gradients |= {"blocks.0.gate_up_E2IH": torch.tensor([gradient, 1.0]), "norm_H": torch.ones(2)}
    return Trained("a part", torch.tensor(loss), gradients, [launches], seconds=0.0)


def way(*given, **changed):
    return gather("a way", [part(*given, **changed)])


@pytest.mark.parametrize(
    ("ours", "again", "message"),
    [
        pytest.param(way(1.1), [], "of the gradient of gate_up is over", id="error"),
        pytest.param(way(float("nan")), [], "error nan", id="nan"),
        pytest.param(way(launches=(1, 2)), [], "layer 0 took (1, 2) launches", id="twice"),
        pytest.param(way(), [part(launches=(0, 1))], "took (0, 1) launches", id="no-forward"),
        pytest.param(way(), [part(1.0 + 2**-23)], "other bits of the gradients", id="last-bit"),
        pytest.param(way(), [part(), part(loss=0.5)], "other bits of the gradients", id="loss"),
    ],
)
def test_each_broken_promise_is_a_failure(ours, again, message):
    truth, eager = way(), way(1.0 + 1e-6)
    assert find_step_failures(truth, eager, way(), [part()]) == []
    (failure,) = find_step_failures(truth, eager, ours, again)
    assert message in failure


def test_nan_is_never_the_same_bits():
    assert same_gradients(part(), part())
    assert not same_gradients(part(float("nan")), part(float("nan")))


def test_an_error_of_nothing_is_the_size_of_what_is_there():
    nothing = replace(way(), gradients={n: g * 0 for n, g in way().gradients.items()})
    assert errors(nothing, nothing) == dict.fromkeys(KINDS, 0.0)
    assert errors(way(), nothing)["down"] == pytest.approx(2**0.5)


@pytest.mark.slow
def test_processes_of_their_own_compute_the_same(model, batches, trained):
    (other,) = train_all(model, [Job("none", batches[0], None)], num_processes=2)
    assert same_gradients(other, trained[0])
    assert other.launches == trained[0].launches


def test_one_process_starts_no_other():
    with mapper(1) as spread:
        assert spread is map
