"""Loads of rank subsets: the table that makes the best split a closed form.

A set of at most eight ranks is a bit mask A in [0, 2^D). With w_e the load of expert e and m_e the
set of ranks that hold a copy of it, the load that cannot leave A is

    inside(A) = sum of w_e over all e with m_e inside A,

and by max-flow / min-cut (Hall) the least possible time of the slowest rank is

    max over A of inside(A) / speed(A).

All problems of a batch are solved at once: N problems, X experts each, D ranks, S extra copies.
"""

from __future__ import annotations

from functools import cache

import torch

MAX_RANKS = 8


def inside_NA(load_NX: torch.Tensor, mask_NX: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Load that cannot leave each set of ranks, by a subset-sum (zeta) transform.

    Args:
        load_NX: load of each expert, any numeric dtype, >= 0.
        mask_NX: int64 set of the ranks that hold the expert, in [0, 2^D).
        num_ranks: D, at most 8.
    """
    num_problems = load_NX.shape[0]
    table_NA = load_NX.new_zeros(num_problems, 1 << num_ranks)
    table_NA.scatter_add_(1, mask_NX, load_NX)
    for rank in range(num_ranks):
        halves = table_NA.view(num_problems, 1 << (num_ranks - rank - 1), 2, 1 << rank)
        halves[:, :, 1] += halves[:, :, 0]
    return table_NA


def total_of_A(value_D: torch.Tensor) -> torch.Tensor:
    """Sum of one value per rank over each set of ranks: [..., D] -> [..., 2^D]."""
    total_A = value_D.new_zeros(*value_D.shape[:-1], 1)
    for rank in range(value_D.shape[-1]):
        total_A = torch.cat([total_A, total_A + value_D[..., rank, None]], dim=-1)
    return total_A


@cache
def contains_MA(num_ranks: int) -> torch.Tensor:
    """[2^D, 2^D] bool: is the set of the row inside the set of the column?"""
    sets = torch.arange(1 << num_ranks)
    return (sets[:, None] & ~sets[None, :]) == 0


@cache
def sets_without_DH(num_ranks: int) -> torch.Tensor:
    """[D, 2^(D-1)] int64: for each rank, the sets it is not in, ascending."""
    sets = torch.arange(1 << num_ranks)
    return torch.stack([sets[(sets >> rank) & 1 == 0] for rank in range(num_ranks)])


@cache
def freed_DMH(num_ranks: int) -> torch.Tensor:
    """[D, 2^D, 2^(D-1)] float32: 1 where M without rank d is inside the h-th set without d.

    These are the sets that lose the expert's load when d joins its copies, and those that gain it
    when the copy on d goes.
    """
    without_DH = sets_without_DH(num_ranks)
    sets = torch.arange(1 << num_ranks)
    others_DM = sets[None] & ~(1 << torch.arange(num_ranks))[:, None]
    return ((others_DM[:, :, None] & ~without_DH[:, None, :]) == 0).float()


def copy_masks(
    home_NX: torch.Tensor, copy_NS: torch.Tensor, rank_of_S: torch.Tensor
) -> torch.Tensor:
    """Set of ranks that hold each expert.

    Args:
        home_NX: int64 rank of the home copy, in [0, D).
        copy_NS: int64 expert in each extra slot, in [0, X), or -1 for an empty slot.
        rank_of_S: int64 rank of each extra slot.
    """
    mask_NX = torch.ones_like(home_NX) << home_NX
    for slot, rank in enumerate(rank_of_S.tolist()):
        filled = (copy_NS[:, slot] >= 0).nonzero(as_tuple=True)[0]
        mask_NX[filled, copy_NS[filled, slot]] |= 1 << rank
    return mask_NX
