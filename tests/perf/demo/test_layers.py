import pytest
import torch

import reference
from perf.demo.layers import MegakernelLayer, ReferenceLayer, TrainedLayer, WatchedLayer, watch
from perf.demo.model import MoEWeights

TOP_K = 2


@pytest.fixture
def case():
    torch.manual_seed(0)
    x_TH, router_EH = torch.randn(9, 16), torch.randn(6, 16)
    return x_TH, MoEWeights(router_EH, torch.randn(6, 32, 16) / 4, torch.randn(6, 16, 16) / 4)


def test_a_watched_layer_reports_and_answers_as_the_layer(case):
    x_TH, weights = case
    done = []
    (watched,) = watch([ReferenceLayer(TOP_K)], lambda: done.append(1))
    y_TH, ids_TK = watched(x_TH, weights)
    assert torch.equal(y_TH, reference.moe(x_TH, *weights, top_k=TOP_K))
    assert torch.equal(watched.call()[1], ids_TK)
    assert watched.launches == 0 and done == [1]


def test_reference_layer_forces_ids(case):
    x_TH, weights = case
    forced_TK = torch.tensor([[4, 1]]).expand(9, 2)
    y_TH, ids_TK = ReferenceLayer(TOP_K, forced_TK)(x_TH, weights)
    assert torch.equal(ids_TK, forced_TK)
    assert torch.equal(y_TH, reference.moe(x_TH, *weights, top_k=TOP_K, expert_of_TK=forced_TK))


@pytest.mark.parametrize("forced", [False, True], ids=["router-free", "replayed"])
def test_megakernel_layer_is_one_launch_of_the_same_layer(case, forced):
    x_TH, weights = case
    forced_TK = torch.tensor([[4, 1]]).expand(9, 2) if forced else None
    watched = WatchedLayer(MegakernelLayer(TOP_K, 6, forced_TK), lambda: None)
    y_TH, ids_TK = watched(x_TH, weights)
    wanted_TH, wanted_TK = ReferenceLayer(TOP_K, forced_TK)(x_TH, weights)
    assert torch.equal(ids_TK.long(), wanted_TK)
    torch.testing.assert_close(y_TH, wanted_TH, rtol=1e-5, atol=1e-5)
    assert watched.launches == 1


def test_a_trained_layer_counts_both_ways_and_has_the_gradients_of_the_layer(case):
    x_TH, weights = case
    inputs = [tensor.requires_grad_() for tensor in (x_TH, *weights)]
    counter = TrainedLayer(MegakernelLayer(TOP_K, 6))
    y_TH, ids_TK = counter(x_TH, weights)
    assert not ids_TK.requires_grad
    found = torch.autograd.grad(y_TH.square().sum(), inputs)
    assert (counter.forward, counter.backward) == (["moe_kernel"], ["backward_kernel"])
    plain_TH, _ = counter.layer(x_TH, weights)
    wanted = torch.autograd.grad(plain_TH.square().sum(), inputs)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_a_reference_layer_trains_without_a_launch(case):
    x_TH, weights = case
    counter = TrainedLayer(ReferenceLayer(TOP_K))
    counter(x_TH.requires_grad_(), weights)[0].sum().backward()
    assert x_TH.grad is not None and counter.forward == counter.backward == []
