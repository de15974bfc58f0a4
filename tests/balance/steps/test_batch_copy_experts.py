"""Experts with batch-static copies: picks that lower the node level, for any number of nodes."""

import numpy as np
import pytest
import torch

from balance.exact.bounds import node_level
from balance.steps.batch_copy_experts import choose_experts


def mean_imbalance(load_BLE, node_LE, speed_N, copies_per_node):
    copy_LJ, node_of_J = choose_experts(load_BLE, node_LE, speed_N, copies_per_node)
    num_micro_batches, _, num_experts = load_BLE.shape
    level_F = node_level(
        torch.from_numpy(load_BLE.reshape(-1, num_experts)),
        torch.from_numpy(node_LE).repeat(num_micro_batches, 1),
        torch.from_numpy(copy_LJ).repeat(num_micro_batches, 1),
        torch.from_numpy(node_of_J),
        torch.from_numpy(speed_N),
    )
    return (level_F.numpy() / (load_BLE.sum(2).ravel() / speed_N.sum())).mean(), copy_LJ, node_of_J


@pytest.mark.parametrize("num_nodes", [2, 5, 10], ids=["two", "five", "ten: by flow"])
def test_each_copy_more_lowers_the_level(num_nodes):
    rng = np.random.default_rng(num_nodes)
    load_BLE = rng.lognormal(5, 1, (4, 2, 4 * num_nodes)).astype(int)
    node_LE = np.tile(np.repeat(np.arange(num_nodes), 4), (2, 1))
    speed_N = np.full(num_nodes, 8.0)
    levels = []
    for copies_per_node in (0, 1, 2):
        level, copy_LJ, node_of_J = mean_imbalance(load_BLE, node_LE, speed_N, copies_per_node)
        levels.append(level)
        for copy_J, node_E in zip(copy_LJ, node_LE, strict=True):
            pairs = [(e, n) for e, n in zip(copy_J, node_of_J, strict=True) if e >= 0]
            assert len(set(pairs)) == len(pairs), "a node holds a copy twice"
            assert all(node_E[expert] != node for expert, node in pairs), "a copy at home"
    assert levels[0] > levels[1] >= levels[2]
    assert levels[2] - 1 < 0.3 * (levels[0] - 1)


def test_balanced_nodes_need_none():
    _, copy_LJ, _ = mean_imbalance(
        np.full((2, 1, 4), 7), np.array([[0, 0, 1, 1]]), np.array([2.0, 2.0]), 2
    )
    assert (copy_LJ == -1).all()


def test_one_node_has_nowhere_to_go():
    _, copy_LJ, _ = mean_imbalance(np.ones((1, 1, 3), int), np.zeros((1, 3), int), np.ones(1), 2)
    assert (copy_LJ == -1).all()


def test_two_equally_slow_nodes_need_two_picks():
    # Nodes 0 and 2 serve 60 each and node 1 serves 2: one copy alone does not lower the maximum.
    load_BLE = np.array([[[50, 10, 1, 1, 30, 30]]])
    node_LE = np.array([[0, 0, 1, 1, 2, 2]])
    level, copy_LJ, node_of_J = mean_imbalance(load_BLE, node_LE, np.ones(3), 2)
    assert level == pytest.approx(1.0)
    assert (copy_LJ[:, node_of_J == 1] >= 0).all()
