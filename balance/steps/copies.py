"""Which experts get a copy in which spare slot, for one micro-batch, layer and node.

Local search on the exact bottleneck. For given copies the best split takes as long as the tightest
set of ranks (``balance.exact.rank_sets``). Only a copy of an expert locked inside that set, on a
rank outside it, can relieve it; so a move (``balance.steps.copy_moves``) puts one of the heaviest
such experts into a slot outside, replacing what is there. Problems that are stuck above the bound
are searched again after a forced move. Copies that are not needed are taken out.

All problems of a batch are searched at once: F problems of X experts, D ranks and J extra slots.
"""

from dataclasses import dataclass

import torch

from balance.exact import rank_sets
from balance.steps.copy_moves import Problems, Ranks, best_moves, fill, rank_levels


@dataclass(frozen=True)
class Search:
    """How hard to look.

    Attributes:
        tolerance: stop at (1 + tolerance) × lower bound.
        min_load: an expert with less load than this gets no copy.
        num_experts: heaviest locked experts tried per move.
        num_slots: slots tried per move, those on the least loaded ranks.
        max_moves: moves per search; each problem needs about one per copy.
        num_forced: moves that are forced, one at a time, on a problem that is stuck.
        max_escapes: rounds of forcing moves.
        problems_per_chunk: searched at a time, so that the tables stay in cache.
    """

    tolerance: float = 5e-4
    min_load: int = 1
    num_experts: int = 8
    num_slots: int = 8
    max_moves: int = 64
    num_forced: int = 8
    max_escapes: int = 3
    problems_per_chunk: int = 128


def choose_copies(
    load_FX: torch.Tensor,
    home_FX: torch.Tensor,
    rank_of_J: torch.Tensor,
    speed_D: torch.Tensor,
    bound_F: torch.Tensor,
    usable_FJ: torch.Tensor | None = None,
    search: Search | None = None,
) -> torch.Tensor:
    """Choose copies for spare slots such that the best split over them is as balanced as possible.

    Args:
        load_FX: loads >= 0.
        home_FX: int64 rank of each expert's home copy.
        rank_of_J: int64 rank of each spare slot, at most eight ranks.
        speed_D: float64, > 0.
        bound_F: a lower bound of the level (load / speed), where the search may stop.
        usable_FJ: bool, slots that may be filled; None means all.
        search: effort and tolerance.

    Returns:
        copy_FJ int64: expert in each slot, -1 for empty. Never two copies of an expert on a rank,
        and never a level above the one without copies. More slots on a rank are opened only after
        the search with fewer has ended, so they never make the result worse.
    """
    search = search or Search()
    if usable_FJ is None:
        usable_FJ = torch.ones(len(load_FX), len(rank_of_J), dtype=torch.bool)
    copy_FJ = torch.full(usable_FJ.shape, -1)
    pace_U = 1 / rank_sets.total_of_U(speed_D)
    pace_U[0] = 0
    ranks = Ranks(rank_of_J, pace_U.float())
    mean_F = load_FX.double().sum(1) / speed_D.sum()
    for rows in torch.arange(len(load_FX)).split(search.problems_per_chunk):
        busy = rows[mean_F[rows] > 0]
        share_FX = load_FX[busy].double() / mean_F[busy, None]
        problems = Problems(
            share_FX=share_FX.float(),
            light_FX=load_FX[busy] < search.min_load,
            mask_FX=torch.ones_like(home_FX[busy]) << home_FX[busy],
            copy_FJ=copy_FJ[busy],
            usable_FJ=usable_FJ[busy],
            goal_F=(bound_F[busy] / mean_F[busy] * (1 + search.tolerance)).float(),
        )
        copy_FJ[busy] = _search_chunk(problems, ranks, search)
    return copy_FJ


def _search_chunk(problems: Problems, ranks: Ranks, search: Search) -> torch.Tensor:
    """copy_FJ of some problems, slot by slot of each rank."""
    depth_of_J = _depth_of_J(ranks.rank_of_J)
    usable_FJ = problems.usable_FJ
    for depth in range(int(depth_of_J.max()) + 1 if len(depth_of_J) else 0):
        problems.usable_FJ = usable_FJ & (depth_of_J <= depth)
        _climb(problems, ranks, search)
        _escape(problems, ranks, search)
    _take_out_needless(problems, ranks)
    return problems.copy_FJ


def _depth_of_J(rank_of_J: torch.Tensor) -> torch.Tensor:
    """How many earlier slots are on the same rank."""
    same_JJ = rank_of_J[:, None] == rank_of_J[None, :]
    return same_JJ.tril(-1).sum(1)


def _climb(problems: Problems, ranks: Ranks, search: Search) -> torch.Tensor:
    """Make the best move on every problem until it reaches its goal or no move helps.

    Leaves the best state seen in ``problems`` and returns its level_F.
    """
    best_F = rank_levels(problems, ranks)
    rows = (best_F > problems.goal_F).nonzero(as_tuple=True)[0]
    active = problems[rows]
    for _ in range(search.max_moves):
        if not len(rows):
            break
        moved = _move(active, ranks, search)
        rows, active = rows[moved], active[moved]
        level_F = rank_levels(active, ranks)
        better = level_F < best_F[rows]
        problems.adopt(rows[better], active[better])
        best_F[rows[better]] = level_F[better]
        open_F = level_F > active.goal_F
        rows, active = rows[open_F], active[open_F]
    return best_F


def _move(problems: Problems, ranks: Ranks, search: Search) -> torch.Tensor:
    """Apply to each problem its best move; returns moved_F bool, False where none helps."""
    score_FO, slot_FO, expert_FO, now_F = best_moves(
        problems, ranks, search.num_experts, search.num_slots, 1
    )
    moved = score_FO[:, 0] < now_F * (1 - 1e-6)
    rows = moved.nonzero(as_tuple=True)[0]
    fill(problems, ranks, rows, slot_FO[rows, 0], expert_FO[rows, 0])
    return moved


def _escape(problems: Problems, ranks: Ranks, search: Search) -> None:
    """Where the goal was not reached, force a move that looks bad, hold it, and search on.

    Finds chains such as: the hottest expert to the emptiest rank, the one it drives out elsewhere.
    """
    level_F = rank_levels(problems, ranks)
    rows = (level_F > problems.goal_F).nonzero(as_tuple=True)[0]
    for _ in range(search.max_escapes):
        if not len(rows):
            return
        tries, tried_FO = _forced(problems[rows], ranks, search)
        best_F, choice_F = tried_FO.min(1)
        better = best_F < level_F[rows] * (1 - 1e-6)
        winner_F = torch.arange(len(rows)) * tried_FO.shape[1] + choice_F
        problems.adopt(rows[better], tries[winner_F[better]])
        level_F[rows] = torch.minimum(level_F[rows], best_F)
        rows = rows[better & (best_F > problems.goal_F[rows])]


def _forced(problems: Problems, ranks: Ranks, search: Search) -> tuple[Problems, torch.Tensor]:
    """Search results after each of the best moves is made and its slot held.

    Returns F·O problems, the moves of one problem side by side, and their level_FO.
    """
    score_FO, slot_FO, expert_FO, _ = best_moves(
        problems, ranks, search.num_experts, search.num_slots, search.num_forced
    )
    num_forced = score_FO.shape[1]
    tries = problems[torch.arange(len(score_FO)).repeat_interleave(num_forced)]
    real = (score_FO.flatten() < torch.inf).nonzero(as_tuple=True)[0]
    slot_F = slot_FO.flatten()[real]
    fill(tries, ranks, real, slot_F, expert_FO.flatten()[real])
    tries.usable_FJ[real, slot_F] = False
    level_F = _climb(tries, ranks, search)
    return tries, level_F.view(-1, num_forced)


def _take_out_needless(problems: Problems, ranks: Ranks) -> None:
    """Take out copies, the most dispensable first, while goal or level stay as they are."""
    limit_F = torch.maximum(rank_levels(problems, ranks) * (1 + 1e-6), problems.goal_F)
    rows = torch.arange(len(limit_F))
    while len(rows) and problems.copy_FJ.shape[1]:
        level_FJ = _levels_without(problems[rows], ranks)
        level_F, slot_F = level_FJ.min(1)
        spare = level_F <= limit_F[rows]
        rows, slot_F = rows[spare], slot_F[spare]
        fill(problems, ranks, rows, slot_F, torch.full_like(slot_F, -1))


def _levels_without(problems: Problems, ranks: Ranks) -> torch.Tensor:
    """Level of each problem after emptying one slot, for every slot; inf for empty ones."""
    level_FJ = torch.full(problems.copy_FJ.shape, torch.inf)
    for slot in range(problems.copy_FJ.shape[1]):
        rows = (problems.copy_FJ[:, slot] >= 0).nonzero(as_tuple=True)[0]
        trial = problems[rows]
        every, nothing = torch.arange(len(rows)), torch.full_like(rows, -1)
        fill(trial, ranks, every, torch.full_like(rows, slot), nothing)
        level_FJ[rows, slot] = rank_levels(trial, ranks)
    return level_FJ
