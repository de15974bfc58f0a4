"""Loads of rank subsets: the table that makes the best split a closed form.

A set of at most eight ranks is a bit mask u in [0, 2^D). With w_x the load of expert x and m_x the
set of ranks that hold a copy of it, the load that cannot leave u is

    inside(u) = sum of w_x over all x with m_x inside u,

and by max-flow / min-cut (Hall) the least possible time of the slowest rank is

    max over u of inside(u) / speed(u).

All problems of a batch are solved at once: F problems of X experts, D ranks and J extra slots; U =
2^D sets of ranks, Y = 2^(D-1) sets without a given rank.
"""

from functools import cache

import torch

MAX_RANKS = 8


def inside_FU(load_FX: torch.Tensor, mask_FX: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Load that cannot leave each set of ranks, by a subset-sum (zeta) transform.

    Args:
        load_FX: load of each expert, any numeric dtype, >= 0.
        mask_FX: int64 set of the ranks that hold the expert, in [0, 2^D).
        num_ranks: D, at most 8.
    """
    num_problems = load_FX.shape[0]
    table_FU = load_FX.new_zeros(num_problems, 1 << num_ranks)
    table_FU.scatter_add_(1, mask_FX, load_FX)
    for rank in range(num_ranks):
        halves = table_FU.view(num_problems, 1 << (num_ranks - rank - 1), 2, 1 << rank)
        halves[:, :, 1] += halves[:, :, 0]
    return table_FU


def total_of_U(value_D: torch.Tensor) -> torch.Tensor:
    """Sum of one value per rank over each set of ranks: [..., D] -> [..., U]."""
    total_U = value_D.new_zeros(*value_D.shape[:-1], 1)
    for rank in range(value_D.shape[-1]):
        total_U = torch.cat([total_U, total_U + value_D[..., rank, None]], dim=-1)
    return total_U


@cache
def contains_UU(num_ranks: int) -> torch.Tensor:
    """[U, U] bool: is the set of the row inside the set of the column?"""
    sets = torch.arange(1 << num_ranks)
    return (sets[:, None] & ~sets[None, :]) == 0


@cache
def sets_without_DY(num_ranks: int) -> torch.Tensor:
    """[D, Y] int64: for each rank, the sets it is not in, ascending."""
    sets = torch.arange(1 << num_ranks)
    return torch.stack([sets[(sets >> rank) & 1 == 0] for rank in range(num_ranks)])


@cache
def freed_DUY(num_ranks: int) -> torch.Tensor:
    """[D, U, Y] float32: 1 where set u without rank d is inside the y-th set without d.

    These are the sets that lose the expert's load when d joins its copies, and those that gain it
    when the copy on d goes.
    """
    without_DY = sets_without_DY(num_ranks)
    sets = torch.arange(1 << num_ranks)
    others_DU = sets[None] & ~(1 << torch.arange(num_ranks))[:, None]
    return ((others_DU[:, :, None] & ~without_DY[:, None, :]) == 0).float()


def copy_masks(
    home_FX: torch.Tensor, copy_FJ: torch.Tensor, rank_of_J: torch.Tensor
) -> torch.Tensor:
    """Set of ranks that hold each expert.

    Args:
        home_FX: int64 rank of the home copy, in [0, D).
        copy_FJ: int64 expert in each extra slot, in [0, X), or -1 for an empty slot.
        rank_of_J: int64 rank of each extra slot.
    """
    mask_FX = torch.ones_like(home_FX) << home_FX
    for slot, rank in enumerate(rank_of_J.tolist()):
        filled = (copy_FJ[:, slot] >= 0).nonzero(as_tuple=True)[0]
        mask_FX[filled, copy_FJ[filled, slot]] |= 1 << rank
    return mask_FX
