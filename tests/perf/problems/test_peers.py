"""Peers are imported only when they are prepared; those installed here agree."""

import ast
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import perf.problems.peers
from perf.problems.cases import TINY, Case
from perf.problems.peers import ALL_PROVIDERS, PEERS, liger_cute, transformers_batched_mm
from perf.problems.ready import prepare
from perf.problems.tensors import make_problem
from perf.problems.training import prepare_steps
from tests.helpers.peers import STAND_INS
from tests.helpers.sources import ROOT


def test_importing_peers_imports_no_peer():
    tree = ast.parse(Path(perf.problems.peers.__file__).read_text())
    names = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    names += [a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names]
    packages = {peer.package for peer in PEERS}
    assert not packages & {name.split(".")[0] for name in names}


def test_names_are_distinct_and_ours_come_first():
    names = [provider.name for provider in ALL_PROVIDERS]
    assert len(set(names)) == len(names)
    assert [p.is_ours for p in ALL_PROVIDERS] == sorted(
        (p.is_ours for p in ALL_PROVIDERS), reverse=True
    )


def test_the_page_of_peers_names_everyone():
    lines = (ROOT / "perf" / "peers.md").read_text().splitlines()
    first_cells = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    named = {name for cell in first_cells for name in cell.split(", ")}
    assert [peer.name for peer in PEERS if peer.name not in named] == []


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_an_installed_peer_agrees_with_the_reference(peer):
    if reason := peer.why_missing(torch.device("cpu")):
        pytest.skip(reason)
    assert find_spec(peer.package)
    problem = make_problem(Case(TINY, 20, "zipf"), torch.device("cpu"))
    assert list(prepare(problem, (peer,)).calls) == [peer.name]


@pytest.fixture(params=STAND_INS)
def stood_in(request, monkeypatch):
    """A peer whose package is stood in for, on a CPU."""
    STAND_INS[request.param](monkeypatch)
    perf.problems.peers.configure_liger_cute.cache_clear()
    (peer,) = (peer for peer in PEERS if peer.name == request.param)
    yield replace(peer, needs_gpu=False)
    perf.problems.peers.configure_liger_cute.cache_clear()


def test_a_peer_is_called_as_its_package_wants_it(stood_in):
    problem = make_problem(Case(TINY, 20, "zipf"), torch.device("cpu"))
    ready = prepare(problem, (stood_in,))
    assert not ready.skipped
    assert list(ready.calls) == [stood_in.name]


def test_a_peer_that_trains_has_the_right_gradients(stood_in):
    if not stood_in.trains:
        pytest.skip(f"{stood_in.name} has no training step here")
    problem = make_problem(Case(TINY, 20, "zipf"), torch.device("cpu"), torch.float32)
    steps, skipped, _ = prepare_steps(problem, (stood_in,))
    assert not skipped
    assert list(steps) == [stood_in.name]


def test_liger_cute_refuses_what_its_memory_cannot_hold(monkeypatch):
    STAND_INS["LigerCute"](monkeypatch)
    monkeypatch.setattr(perf.problems.peers, "CUTE_MAX_TOKENS", 19)
    perf.problems.peers.configure_liger_cute.cache_clear()
    problem = make_problem(Case(TINY, 20), torch.device("cpu"))
    with pytest.raises(ValueError, match="exceeds configured capacity"):
        liger_cute(problem)()
    perf.problems.peers.configure_liger_cute.cache_clear()


def test_copied_weights_have_a_limit(monkeypatch):
    problem = make_problem(Case(TINY, 20), torch.device("cpu"))
    bytes_of_an_expert = 3 * TINY.hidden * TINY.intermediate * 2
    monkeypatch.setattr(perf.problems.peers, "MOST_COPIED_BYTES", 40 * bytes_of_an_expert - 1)
    with pytest.raises(ValueError, match=f"at most .* bytes, got {40 * bytes_of_an_expert}"):
        transformers_batched_mm(problem)


@pytest.mark.gpu
def test_peers_on_the_gpu_agree_or_say_why_not(device):
    problem = make_problem(Case(TINY, 64, "zipf"), device)
    ready = prepare(problem, PEERS)
    assert set(ready.calls) | set(ready.skipped) == {peer.name for peer in PEERS}
    assert not ready.failed
