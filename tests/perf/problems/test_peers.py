"""Peers are imported only when they are prepared; those installed here agree."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import perf.problems.peers
from perf.problems.cases import TINY, Case
from perf.problems.peers import ALL_PROVIDERS, PEERS
from perf.problems.ready import prepare
from perf.problems.tensors import make_problem


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


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_an_installed_peer_agrees_with_the_reference(peer):
    if reason := peer.why_missing(torch.device("cpu")):
        pytest.skip(reason)
    assert find_spec(peer.package)
    problem = make_problem(Case(TINY, 20, "zipf"), torch.device("cpu"))
    assert list(prepare(problem, (peer,)).calls) == [peer.name]


@pytest.mark.gpu
def test_peers_on_the_gpu_agree_or_say_why_not(device):
    problem = make_problem(Case(TINY, 64, "zipf"), device)
    ready = prepare(problem, PEERS)
    assert set(ready.calls) | set(ready.skipped) == {peer.name for peer in PEERS}
    assert not ready.failed
