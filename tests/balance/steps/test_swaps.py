"""Swaps: local optima by exhaustion, groups, and what nearness is worth."""

import itertools

import numpy as np
import pytest

from balance.steps.nearness import Nearness
from balance.steps.swaps import Limits, improve_by_swaps


def cost(load_BE, rank_E, num_ranks):
    return sum(np.bincount(rank_E, load_E, num_ranks).max() for load_E in load_BE)


@pytest.mark.parametrize("seed", range(5))
def test_no_swap_is_left_that_helps(seed):
    rng = np.random.default_rng(seed)
    load_LBE = rng.integers(0, 50, (1, 3, 9)).astype(float)
    start_LE = np.array([[0, 0, 0, 1, 1, 1, 2, 2, 2]])
    places = np.arange(3)
    rank_LE = improve_by_swaps(load_LBE, start_LE, np.full(3, 3), np.ones(3), places)
    found = cost(load_LBE[0], rank_LE[0], 3)
    assert found <= cost(load_LBE[0], start_LE[0], 3)
    for a, b in itertools.combinations(range(9), 2):
        traded_E = rank_LE[0].copy()
        traded_E[[a, b]] = traded_E[[b, a]]
        assert cost(load_LBE[0], traded_E, 3) >= found * (1 - 1e-5)


def test_only_ranks_of_a_group_trade():
    load_LBE = np.array([[[9.0, 8.0, 1.0, 1.0]]])
    ranks, groups = np.arange(4), np.array([0, 1, 0, 1])
    rank_LE = improve_by_swaps(
        load_LBE, ranks[None], np.full(4, 2), np.ones(4), ranks, Limits(group_of_D=groups)
    )
    assert (groups[rank_LE[0]] == groups).all()


def test_experts_move_to_their_tokens():
    # Equal loads: only travel counts. Expert 0's tokens are on rank 1, expert 1's on rank 0.
    near_LED = np.array([[[0.0, 8.0], [8.0, 0.0]]])
    arguments = (np.ones((1, 1, 2)), np.array([[0, 1]]), np.ones(2, int), np.ones(2), np.arange(2))
    rank_LE = improve_by_swaps(*arguments, nearness=Nearness(0.1, near_LED))
    assert rank_LE.tolist() == [[1, 0]]
    assert improve_by_swaps(*arguments).tolist() == [[0, 1]]


def test_experts_that_fire_together_meet():
    together_LEE = np.zeros((1, 4, 4))
    together_LEE[0, [0, 2, 1, 3], [2, 0, 3, 1]] = 5.0
    rank_LE = improve_by_swaps(
        np.ones((1, 1, 4)),
        np.array([[0, 0, 1, 1]]),
        np.full(2, 2),
        np.ones(2),
        np.arange(2),
        nearness=Nearness(0.1, np.zeros((1, 4, 2)), together_LEE),
    )
    assert rank_LE[0, 0] == rank_LE[0, 2] != rank_LE[0, 1] == rank_LE[0, 3]


def test_locality_is_weighed_against_balance():
    # Both hot experts want rank 0. A light weight keeps them apart, a heavy one lets them meet.
    near_LED = np.zeros((1, 4, 2))
    near_LED[0, :2, 0] = 10
    arguments = (np.array([[[10.0, 10, 1, 1]]]), np.array([[0, 1, 0, 1]]), np.full(2, 2))
    for weight, meet in ((0.1, False), (10.0, True)):
        rank_LE = improve_by_swaps(
            *arguments, np.ones(2), np.arange(2), nearness=Nearness(weight, near_LED)
        )
        assert (rank_LE[0, 0] == rank_LE[0, 1]) == meet


def test_one_place_changes_nothing():
    arguments = (np.ones((1, 1, 3)), np.zeros((1, 3), int), np.array([3]), np.ones(1))
    assert improve_by_swaps(*arguments, np.zeros(1, int)).tolist() == [[0, 0, 0]]
