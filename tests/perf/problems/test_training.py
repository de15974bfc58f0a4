"""A training step gives the gradients of the whole layer, or is not timed."""

from dataclasses import replace

import pytest
import torch

import reference
from perf.problems.cases import TINY, Case
from perf.problems.peers import ALL_PROVIDERS, PEERS
from perf.problems.providers import OURS, PLAIN, Provider, eager
from perf.problems.tensors import make_problem
from perf.problems.training import (
    OURS_TRAINING,
    PASSES,
    Gradients,
    make_step,
    make_upstream,
    prepare_steps,
    true_gradients,
    why_wrong_gradients,
)


@pytest.fixture(scope="module")
def problem():
    return make_problem(Case(TINY, 20, "zipf"), torch.device("cpu"))


@pytest.fixture(scope="module")
def truth(problem):
    return true_gradients(problem)


def test_the_truth_is_what_autograd_says_of_the_whole_layer(problem, truth):
    leaves = [getattr(problem, name).double().requires_grad_() for name in Gradients._fields]
    y_TH = reference.moe(*leaves, problem.top_k)
    y_TH.backward(make_upstream(problem).double())
    for name, leaf, true in zip(Gradients._fields, leaves, truth, strict=True):
        assert torch.allclose(leaf.grad, true, rtol=1e-9, atol=1e-12), name


def test_those_who_are_always_here_and_train_are_ready(problem):
    steps, skipped, _ = prepare_steps(problem, PLAIN)
    assert list(steps) == ["eager loop", "grouped_mm"]
    assert not skipped


def test_a_step_leaves_the_problem_without_gradients(problem):
    make_step(PLAIN[1], problem)()
    assert not problem.x_TH.requires_grad
    assert problem.gate_up_E2IH.grad is None


def test_a_provider_without_gradients_is_refused(problem):
    with pytest.raises(ValueError, match="provider must train, got 'ours given'"):
        make_step(OURS[2], problem)


def test_who_trains_computes_the_router():
    assert [one.name for one in ALL_PROVIDERS if one.trains and not one.has_router] == []


@pytest.fixture(scope="module")
def ours(problem):
    """A checked backward of each way to train our layer."""
    steps, skipped, failed = prepare_steps(problem, OURS_TRAINING, part="backward")
    assert not skipped and not failed
    return steps


def test_every_way_to_train_our_layer_is_right(ours):
    assert list(ours) == [provider.name for provider in OURS_TRAINING]


def test_a_backward_runs_its_forward_once_and_gives_what_the_whole_step_gives(problem):
    calls = []

    def prepare(problem):
        call = PLAIN[1].prepare(problem)
        return lambda: calls.append(1) or call()

    provider = Provider("counted", prepare, trains=True)
    whole, alone = (make_step(provider, problem, part) for part in PASSES[::-1])
    expected = whole()
    assert len(calls) == 1
    for _ in range(3):
        for found, true in zip(alone(), expected, strict=True):
            assert torch.equal(found, true)
    assert len(calls) == 2


def test_float32_gradients_are_overwritten_or_added_as_the_name_says(ours):
    over, added = (ours[f"ours {how}"] for how in ("to float32", "added to float32"))
    for step, factor in ((over, 1.0), (added, 2.0)):
        first = step.main_grad.down_EHI.clone()  # of the run that was checked
        gradients = step()
        assert gradients.down_EHI is step.main_grad.down_EHI
        assert gradients.down_EHI.dtype == torch.float32
        assert torch.allclose(gradients.down_EHI, factor * first, rtol=1e-6, atol=0)
        assert first.abs().max() > 0


def test_a_wrong_gradient_of_ours_is_a_failure_and_an_error_is_raised(problem):
    wrong = replace(scaled("down_EHI", 1.2), is_ours=True)
    steps, skipped, failed = prepare_steps(problem, (wrong,), part="backward")
    assert not steps and not skipped
    assert failed[wrong.name].startswith("wrong gradient of down_EHI: error")

    def breaks(problem):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        prepare_steps(problem, (Provider("ours", breaks, is_ours=True, trains=True),))


def scaled(name, factor):
    """A provider that is right but for one gradient."""

    def prepare(problem):
        tensor = getattr(problem, name)
        # The values stay, and only the gradient is scaled.
        wrong = tensor.detach() + (tensor - tensor.detach()) * factor
        return eager(replace(problem, **{name: wrong}))

    return Provider(f"{name} times {factor}", prepare, trains=True)


@pytest.mark.parametrize("name", Gradients._fields)
def test_one_wrong_gradient_is_enough_to_be_skipped(problem, name):
    steps, skipped, _ = prepare_steps(problem, (scaled(name, 1.0), scaled(name, 1.2)))
    assert list(steps) == [f"{name} times 1.0"]
    assert skipped[f"{name} times 1.2"].startswith(f"wrong gradient of {name}: error")


def test_a_gradient_of_another_shape_is_wrong(truth):
    cut = truth._replace(x_TH=truth.x_TH[1:])
    assert why_wrong_gradients(cut, truth, (1.0,) * 4) == "wrong gradient of x_TH: (19, 64)"


def test_who_is_not_here_or_breaks_is_skipped_with_the_reason(problem):
    def breaks(problem):
        raise RuntimeError("no kernel image\nfor this device")

    missing = Provider("missing", breaks, package="no_such_package", trains=True)
    broken = Provider("broken", breaks, trains=True)
    given = replace(OURS[2], is_ours=False)
    steps, skipped, _ = prepare_steps(problem, (missing, broken, given))
    assert not steps
    assert skipped == {
        "missing": "no_such_package is not installed",
        "broken": "RuntimeError: no kernel image",
        "ours given": "ValueError: provider must train, got 'ours given'",
    }


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.trains], ids=lambda p: p.name)
def test_an_installed_peer_has_the_right_gradients(problem, peer):
    if reason := peer.why_missing(torch.device("cpu")):
        pytest.skip(reason)
    steps, skipped, _ = prepare_steps(problem, (peer,))
    assert not skipped
    assert list(steps) == [peer.name]


@pytest.mark.gpu
def test_training_peers_on_the_gpu_agree_or_say_why_not(device):
    problem = make_problem(Case(TINY, 64, "zipf"), device)
    who_train = [peer for peer in PEERS if peer.trains]
    steps, skipped, _ = prepare_steps(problem, who_train)
    assert set(steps) | set(skipped) == {peer.name for peer in who_train}
