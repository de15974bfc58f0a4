"""The listing reads sources; what it says is what the modules hold."""

import torch

from perf.__main__ import main
from perf.listing import list_providers, list_scenarios, list_shapes, sees_gpu
from perf.problems.cases import SCENARIOS, SHAPES
from perf.problems.peers import ALL_PROVIDERS
from perf.problems.training import OURS_TRAINING
from perf.suites.table import SUITES


def test_everything_that_can_be_chosen_is_listed(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    names = [*SUITES, *SHAPES, *SCENARIOS, *(provider.name for provider in ALL_PROVIDERS)]
    names += [provider.name for provider in OURS_TRAINING]
    assert [name for name in names if name not in out] == []


def test_shapes_are_those_of_the_models():
    shapes = [
        (one.name, one.num_experts, one.top_k, one.hidden, one.intermediate)
        for one in SHAPES.values()
    ]
    assert sorted(list_shapes()) == sorted(shapes)


def test_scenarios_are_those_of_the_cases():
    assert list_scenarios() == {
        name: make.__doc__.splitlines()[0] for name, make in SCENARIOS.items()
    }


def test_providers_are_missing_for_the_reason_they_would_give():
    for device in ("cpu", "cuda"):
        providers = (*ALL_PROVIDERS, *OURS_TRAINING)
        expected = {one.name: one.why_missing(torch.device(device)) for one in providers}
        assert list_providers(has_gpu=device == "cuda") == expected


def test_the_driver_agrees_with_torch():
    assert sees_gpu() == torch.cuda.is_available()
