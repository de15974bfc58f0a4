"""Splits: equal to the linear program, whole tokens, and a certificate for every level."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy.optimize import linprog

from balance.exact import flow, rank_sets, split
from tests.helpers.strategies import split_problems


def tensors(problem):
    return tuple(torch.from_numpy(array) for array in problem)


def holds_FXD(home_FX, copy_FJ, rank_of_J, num_ranks):
    """[F, X, D] bool, the obvious way."""
    holds = np.zeros((*home_FX.shape, num_ranks), dtype=bool)
    for f, x in np.ndindex(*home_FX.shape):
        holds[f, x, home_FX[f, x]] = True
    for f, j in np.ndindex(*copy_FJ.shape):
        if copy_FJ[f, j] >= 0:
            holds[f, copy_FJ[f, j], rank_of_J[j]] = True
    return holds


def level_by_linear_program(load_X, holds_XD, speed_D):
    """Minimise t: shares of every expert sum to its load, no rank takes longer than t."""
    experts, ranks = holds_XD.nonzero()
    columns = np.arange(len(experts))
    total = np.zeros((len(load_X), len(experts) + 1))
    total[experts, columns] = 1
    time = np.zeros((len(speed_D), len(experts) + 1))
    time[ranks, columns] = 1 / speed_D[ranks]
    time[:, -1] = -1
    cost = np.eye(len(experts) + 1)[-1]
    zeros_D = np.zeros(len(speed_D))
    solved = linprog(cost, time, zeros_D, total, load_X, method="highs")
    assert solved.status == 0
    return solved.fun


def rank_load_FD(problem, quota_FJ):
    load_FX, home_FX, copy_FJ, rank_of_J, speed_D = problem
    load_FD = np.zeros((len(load_FX), len(speed_D)), dtype=np.int64)
    rest_FX = load_FX.copy()
    for f, j in np.ndindex(*copy_FJ.shape):
        if copy_FJ[f, j] >= 0:
            rest_FX[f, copy_FJ[f, j]] -= quota_FJ[f, j]
            load_FD[f, rank_of_J[j]] += quota_FJ[f, j]
    assert (rest_FX >= 0).all()
    for f, x in np.ndindex(*load_FX.shape):
        load_FD[f, home_FX[f, x]] += rest_FX[f, x]
    return load_FD


@given(problem=split_problems())
@settings(max_examples=40, deadline=None)
def test_subset_formula_equals_the_linear_program(problem):
    load_FX, home_FX, copy_FJ, rank_of_J, speed_D = problem
    level_F, _ = split.bottleneck(*tensors(problem))
    for f, holds_XD in enumerate(holds_FXD(home_FX, copy_FJ, rank_of_J, len(speed_D))):
        truth = level_by_linear_program(load_FX[f], holds_XD, speed_D)
        assert level_F[f].item() == pytest.approx(truth, rel=1e-9, abs=1e-9)


@given(problem=split_problems())
@settings(max_examples=60, deadline=None)
def test_flow_equals_the_subset_formula(problem):
    load_FX, home_FX, copy_FJ, rank_of_J, speed_D = problem
    level_F, _ = split.bottleneck(*tensors(problem))
    for f, holds_XD in enumerate(holds_FXD(home_FX, copy_FJ, rank_of_J, len(speed_D))):
        level, tight_D = flow.best_level(load_FX[f].astype(float), holds_XD, speed_D)
        assert level == pytest.approx(level_F[f].item(), rel=1e-9, abs=1e-9)
        inside_X = ~(holds_XD & ~tight_D).any(1)
        assert load_FX[f, inside_X].sum() / speed_D[tight_D].sum() == pytest.approx(
            level, abs=1e-9
        )


@given(problem=split_problems())
@settings(max_examples=60, deadline=None)
def test_the_tight_set_proves_the_level(problem):
    load_FX, home_FX, copy_FJ, rank_of_J, speed_D = problem
    level_F, tight_FD = split.bottleneck(*tensors(problem))
    for f, holds_XD in enumerate(holds_FXD(home_FX, copy_FJ, rank_of_J, len(speed_D))):
        tight_D = tight_FD[f].numpy()
        inside_X = ~(holds_XD & ~tight_D).any(1)
        proof = load_FX[f, inside_X].sum() / speed_D[tight_D].sum()
        assert proof == pytest.approx(level_F[f].item(), rel=1e-12)


@pytest.mark.parametrize("num_ranks_of_table", [8, 0], ids=["by table", "by flow"])
@given(problem=split_problems())
@settings(max_examples=40, deadline=None)
def test_quotas_are_conserved_and_optimal_among_whole_tokens(num_ranks_of_table, problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_sets, "MAX_RANKS", num_ranks_of_table)
        quota_FJ = split.integer_quotas(*tensors(problem)).numpy()
    load_FX, _, copy_FJ, _, speed_D = problem
    load_FD = rank_load_FD(problem, quota_FJ)
    assert (quota_FJ >= 0).all() and (quota_FJ[copy_FJ < 0] == 0).all()
    assert (load_FD.sum(1) == load_FX.sum(1)).all()
    level_F = split.bottleneck(*tensors(problem))[0].numpy()
    time_F = (load_FD / speed_D).max(1)
    assert (time_F >= level_F - 1e-9).all()
    if (speed_D == 1).all():
        assert (time_F == np.ceil(level_F - 1e-9)).all()
    else:
        assert (time_F <= level_F + 1 / speed_D.min() + 1e-9).all()


def test_seventy_two_ranks():
    # A chain in which rank d can pass load to rank d + 1 only: one hot rank must fill them all.
    num_ranks = 72
    load_FX = torch.full((1, num_ranks), 10)
    load_FX[0, 0] = 20
    home_FX = torch.arange(num_ranks)[None]
    copy_FJ = (torch.arange(num_ranks) - 1)[None]
    rank_of_J, speed_D = torch.arange(num_ranks), torch.ones(num_ranks, dtype=torch.float64)
    problem = (load_FX, home_FX, copy_FJ, rank_of_J, speed_D)
    level_F, tight_FD = split.bottleneck(*problem)
    assert level_F.item() == pytest.approx(730 / 72)
    assert tight_FD.all()
    load_FD = rank_load_FD([t.numpy() for t in problem], split.integer_quotas(*problem).numpy())
    assert load_FD.max() == 11 and load_FD.sum() == 730


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
