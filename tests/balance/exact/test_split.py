"""Splits: equal to the linear program, whole tokens, and a certificate for every level."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy.optimize import linprog

from balance.exact import flow, split
from balance.exact import rank_sets as subsets
from tests.helpers.strategies import split_problems


def tensors(problem):
    return tuple(torch.from_numpy(array) for array in problem)


def holds_NXD(home_NX, copy_NS, rank_of_S, num_ranks):
    """[N, X, D] bool, the obvious way."""
    holds = np.zeros((*home_NX.shape, num_ranks), dtype=bool)
    for n, x in np.ndindex(*home_NX.shape):
        holds[n, x, home_NX[n, x]] = True
    for n, s in np.ndindex(*copy_NS.shape):
        if copy_NS[n, s] >= 0:
            holds[n, copy_NS[n, s], rank_of_S[s]] = True
    return holds


def level_by_linear_program(load_X, holds_XD, speed_D):
    """Minimise t: shares of every expert sum to its load, no rank takes longer than t."""
    experts, ranks = holds_XD.nonzero()
    columns = np.arange(len(experts))
    total_XF = np.zeros((len(load_X), len(experts) + 1))
    total_XF[experts, columns] = 1
    time_DF = np.zeros((len(speed_D), len(experts) + 1))
    time_DF[ranks, columns] = 1 / speed_D[ranks]
    time_DF[:, -1] = -1
    cost_F = np.eye(len(experts) + 1)[-1]
    zeros_D = np.zeros(len(speed_D))
    solved = linprog(cost_F, time_DF, zeros_D, total_XF, load_X, method="highs")
    assert solved.status == 0
    return solved.fun


def rank_load_ND(problem, quota_NS):
    load_NX, home_NX, copy_NS, rank_of_S, speed_D = problem
    load_ND = np.zeros((len(load_NX), len(speed_D)), dtype=np.int64)
    rest_NX = load_NX.copy()
    for n, s in np.ndindex(*copy_NS.shape):
        if copy_NS[n, s] >= 0:
            rest_NX[n, copy_NS[n, s]] -= quota_NS[n, s]
            load_ND[n, rank_of_S[s]] += quota_NS[n, s]
    assert (rest_NX >= 0).all()
    for n, x in np.ndindex(*load_NX.shape):
        load_ND[n, home_NX[n, x]] += rest_NX[n, x]
    return load_ND


@given(problem=split_problems())
@settings(max_examples=40, deadline=None)
def test_subset_formula_equals_the_linear_program(problem):
    load_NX, home_NX, copy_NS, rank_of_S, speed_D = problem
    level_N, _ = split.bottleneck(*tensors(problem))
    for n, holds_XD in enumerate(holds_NXD(home_NX, copy_NS, rank_of_S, len(speed_D))):
        truth = level_by_linear_program(load_NX[n], holds_XD, speed_D)
        assert level_N[n].item() == pytest.approx(truth, rel=1e-9, abs=1e-9)


@given(problem=split_problems())
@settings(max_examples=60, deadline=None)
def test_flow_equals_the_subset_formula(problem):
    load_NX, home_NX, copy_NS, rank_of_S, speed_D = problem
    level_N, _ = split.bottleneck(*tensors(problem))
    for n, holds_XD in enumerate(holds_NXD(home_NX, copy_NS, rank_of_S, len(speed_D))):
        level, tight_D = flow.best_level(load_NX[n].astype(float), holds_XD, speed_D)
        assert level == pytest.approx(level_N[n].item(), rel=1e-9, abs=1e-9)
        inside_X = ~(holds_XD & ~tight_D).any(1)
        assert load_NX[n, inside_X].sum() / speed_D[tight_D].sum() == pytest.approx(
            level, abs=1e-9
        )


@given(problem=split_problems())
@settings(max_examples=60, deadline=None)
def test_the_tight_set_proves_the_level(problem):
    load_NX, home_NX, copy_NS, rank_of_S, speed_D = problem
    level_N, tight_ND = split.bottleneck(*tensors(problem))
    for n, holds_XD in enumerate(holds_NXD(home_NX, copy_NS, rank_of_S, len(speed_D))):
        tight_D = tight_ND[n].numpy()
        inside_X = ~(holds_XD & ~tight_D).any(1)
        proof = load_NX[n, inside_X].sum() / speed_D[tight_D].sum()
        assert proof == pytest.approx(level_N[n].item(), rel=1e-12)


@pytest.mark.parametrize("num_ranks_of_table", [8, 0], ids=["by table", "by flow"])
@given(problem=split_problems())
@settings(max_examples=40, deadline=None)
def test_quotas_are_conserved_and_optimal_among_whole_tokens(num_ranks_of_table, problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subsets, "MAX_RANKS", num_ranks_of_table)
        quota_NS = split.integer_quotas(*tensors(problem)).numpy()
    load_NX, _, copy_NS, _, speed_D = problem
    load_ND = rank_load_ND(problem, quota_NS)
    assert (quota_NS >= 0).all() and (quota_NS[copy_NS < 0] == 0).all()
    assert (load_ND.sum(1) == load_NX.sum(1)).all()
    level_N = split.bottleneck(*tensors(problem))[0].numpy()
    time_N = (load_ND / speed_D).max(1)
    assert (time_N >= level_N - 1e-9).all()
    if (speed_D == 1).all():
        assert (time_N == np.ceil(level_N - 1e-9)).all()
    else:
        assert (time_N <= level_N + 1 / speed_D.min() + 1e-9).all()


def test_seventy_two_ranks():
    # A chain in which rank d can pass load to rank d + 1 only: one hot rank must fill them all.
    num_ranks = 72
    load_NX = torch.full((1, num_ranks), 10)
    load_NX[0, 0] = 20
    home_NX = torch.arange(num_ranks)[None]
    copy_NS = (torch.arange(num_ranks) - 1)[None]
    rank_of_S, speed_D = torch.arange(num_ranks), torch.ones(num_ranks, dtype=torch.float64)
    problem = (load_NX, home_NX, copy_NS, rank_of_S, speed_D)
    level_N, tight_ND = split.bottleneck(*problem)
    assert level_N.item() == pytest.approx(730 / 72)
    assert tight_ND.all()
    load_ND = rank_load_ND([t.numpy() for t in problem], split.integer_quotas(*problem).numpy())
    assert load_ND.max() == 11 and load_ND.sum() == 730


def test_wishes_are_kept_where_the_optimum_leaves_a_choice():
    # Expert 0 (4 tokens) on ranks 0 and 1; expert 1 (6 tokens) makes rank 2 the slowest anyway.
    problem = tensors(
        (
            np.array([[4, 6]]),
            np.array([[0, 2]]),
            np.array([[0]]),
            np.array([1]),
            np.ones(3),
        )
    )
    for wish in (0, 1, 4):
        assert split.integer_quotas(*problem, torch.tensor([[wish]])).item() == wish
    assert split.integer_quotas(*problem, torch.tensor([[9]])).item() == 4
    assert split.integer_quotas(*problem).item() == 2


def test_unequal_speeds_get_unequal_tokens():
    # 10 tokens, rank 1 is four times as fast: 2 and 8.
    problem = tensors(
        (np.array([[10]]), np.array([[0]]), np.array([[0]]), np.array([1]), np.array([1.0, 4.0]))
    )
    assert split.integer_quotas(*problem).item() == 8


def test_no_problems():
    empty = torch.zeros(0, 3, dtype=torch.int64)
    slots = torch.zeros(0, 2, dtype=torch.int64)
    ranks = torch.arange(2)
    assert split.integer_quotas(empty, empty, slots, ranks, torch.ones(2)).shape == (0, 2)
