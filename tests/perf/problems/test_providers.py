"""Everyone who is always here computes the layer, ours on all three routes."""

from importlib import metadata

import torch

from megakernel.config import INTERPRETER
from perf.problems.cases import TINY, Case
from perf.problems.providers import OURS, PLAIN, Provider, configured_call
from perf.problems.ready import prepare
from perf.problems.tensors import make_problem

CPU = torch.device("cpu")


def test_ours_and_plain_pytorch_are_ready():
    problem = make_problem(Case(TINY, 20, "zipf"), CPU)
    ready = prepare(problem, (*OURS, *PLAIN))
    assert list(ready.calls) == [
        "ours live", "ours replay", "ours given", "eager loop", "grouped_mm",
    ]  # fmt: skip
    assert not ready.skipped and not ready.failed


def test_one_config_gives_equal_bits_on_both_routes():
    problem = make_problem(Case(TINY, 12), CPU)
    live, replay = (configured_call(problem, route, INTERPRETER)() for route in ("live", "replay"))
    assert torch.equal(live, replay)


def test_results_name_other_people_s_layers_with_their_version():
    # A module that is always here, and whose package has another name.
    named = Provider("peer", lambda problem: problem, package="functorch")
    assert named.label == f"peer {metadata.version('torch')}"
    assert Provider("other", lambda problem: problem, package="no_such_module").label == "other"
    assert [one.label for one in OURS] == [one.name for one in OURS]
