"""Which experts get a copy in which spare slot, for one micro-batch, layer and node.

Local search on the exact bottleneck. For given copies the best split takes as long as the tightest
set of ranks A (``balance.exact.rank_sets``). Only a copy of an expert locked inside A, on a rank outside
A, can relieve A; so a move puts one of the heaviest such experts into a slot outside A, replacing
what is there. Moves are compared by the smooth maximum over all sets of (time / bottleneck)^16,
exactly, since the table of sets changes in a known half. Problems that are stuck above the bound
are searched again after a forced move. Copies that are not needed are taken out.

All problems of a batch are searched at once: N problems, X experts each, D ranks, S spare slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from balance.exact import rank_sets as subsets


@dataclass(frozen=True)
class Search:
    """How hard to look.

    Args:
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


@dataclass
class _Problems:
    """State of a search. Loads are shares of the mean rank time, so that 1 is a perfect split."""

    share_NX: torch.Tensor
    mask_NX: torch.Tensor
    copy_NS: torch.Tensor
    usable_NS: torch.Tensor
    goal_N: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> _Problems:
        return _Problems(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def put(self, rows: torch.Tensor, other: _Problems) -> None:
        self.mask_NX[rows], self.copy_NS[rows] = other.mask_NX, other.copy_NS


@dataclass(frozen=True)
class _Ranks:
    """What all problems share: the rank of each slot, and 1 / speed of each set of ranks."""

    rank_of_S: torch.Tensor
    pace_A: torch.Tensor

    @property
    def num_ranks(self) -> int:
        return len(self.pace_A).bit_length() - 1


def choose_copies(
    load_NX: torch.Tensor,
    home_NX: torch.Tensor,
    rank_of_S: torch.Tensor,
    speed_D: torch.Tensor,
    bound_N: torch.Tensor,
    usable_NS: torch.Tensor | None = None,
    search: Search | None = None,
) -> torch.Tensor:
    """Choose copies for spare slots such that the best split over them is as balanced as possible.

    Args:
        load_NX: loads >= 0.
        home_NX: int64 rank of each expert's home copy.
        rank_of_S: int64 rank of each spare slot, at most eight ranks.
        speed_D: float64, > 0.
        bound_N: a lower bound of the level (load / speed), where the search may stop.
        usable_NS: bool, slots that may be filled; None means all.
        search: effort and tolerance.

    Returns:
        copy_NS int64: expert in each slot, -1 for empty. Never two copies of an expert on a rank,
        and never a level above the one without copies. More slots on a rank are opened only after
        the search with fewer has ended, so they never make the result worse.
    """
    search = search or Search()
    if usable_NS is None:
        usable_NS = torch.ones(len(load_NX), len(rank_of_S), dtype=torch.bool)
    copy_NS = torch.full(usable_NS.shape, -1)
    pace_A = 1 / subsets.total_of_A(speed_D)
    pace_A[0] = 0
    ranks = _Ranks(rank_of_S, pace_A.float())
    mean_N = load_NX.double().sum(1) / speed_D.sum()
    for rows in torch.arange(len(load_NX)).split(search.problems_per_chunk):
        busy = rows[mean_N[rows] > 0]
        share_NX = load_NX[busy].double() / mean_N[busy, None]
        light_NX = load_NX[busy] < search.min_load
        problems = _Problems(
            share_NX=share_NX.float(),
            mask_NX=torch.ones_like(home_NX[busy]) << home_NX[busy],
            copy_NS=copy_NS[busy],
            usable_NS=usable_NS[busy],
            goal_N=(bound_N[busy] / mean_N[busy] * (1 + search.tolerance)).float(),
        )
        copy_NS[busy] = _solve(problems, light_NX, ranks, search)
    return copy_NS


def _solve(
    problems: _Problems, light_NX: torch.Tensor, ranks: _Ranks, search: Search
) -> torch.Tensor:
    depth_of_S = _depth_of_S(ranks.rank_of_S)
    usable_NS = problems.usable_NS
    for depth in range(int(depth_of_S.max()) + 1 if len(depth_of_S) else 0):
        problems.usable_NS = usable_NS & (depth_of_S <= depth)
        _grow(problems, light_NX, ranks, search)
        _escape(problems, light_NX, ranks, search)
    _prune(problems, ranks)
    return problems.copy_NS


def _depth_of_S(rank_of_S: torch.Tensor) -> torch.Tensor:
    """How many earlier slots are on the same rank."""
    same_SS = rank_of_S[:, None] == rank_of_S[None, :]
    return same_SS.tril(-1).sum(1)


def _levels(problems: _Problems, ranks: _Ranks) -> torch.Tensor:
    inside_NA = subsets.inside_NA(problems.share_NX, problems.mask_NX, ranks.num_ranks)
    return (inside_NA * ranks.pace_A).amax(1)


def _grow(
    problems: _Problems, light_NX: torch.Tensor, ranks: _Ranks, search: Search
) -> torch.Tensor:
    """Make the best move on every problem until it reaches its goal or no move helps.

    Leaves the best state seen in ``problems`` and returns its level_N.
    """
    best_N = _levels(problems, ranks)
    rows = (best_N > problems.goal_N).nonzero(as_tuple=True)[0]
    active, light_NX = problems[rows], light_NX[rows]
    for _ in range(search.max_moves):
        if not len(rows):
            break
        moved = _move(active, light_NX, ranks, search)
        rows, active, light_NX = rows[moved], active[moved], light_NX[moved]
        level_N = _levels(active, ranks)
        better = level_N < best_N[rows]
        problems.put(rows[better], active[better])
        best_N[rows[better]] = level_N[better]
        open_N = level_N > active.goal_N
        rows, active, light_NX = rows[open_N], active[open_N], light_NX[open_N]
    return best_N


def _move(
    problems: _Problems, light_NX: torch.Tensor, ranks: _Ranks, search: Search
) -> torch.Tensor:
    """Apply to each problem its best move; returns moved_N bool, False where none helps."""
    score_NV, slot_NV, expert_NV, now_N = _best_moves(problems, light_NX, ranks, search, 1)
    moved = score_NV[:, 0] < now_N * (1 - 1e-6)
    rows = moved.nonzero(as_tuple=True)[0]
    _fill(problems, ranks, rows, slot_NV[rows, 0], expert_NV[rows, 0])
    return moved


def _best_moves(
    problems: _Problems, light_NX: torch.Tensor, ranks: _Ranks, search: Search, num_moves: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The V best moves: score (inf where there is none), slot and expert; and the score of now."""
    inside_NA = subsets.inside_NA(problems.share_NX, problems.mask_NX, ranks.num_ranks)
    time_NA = inside_NA * ranks.pace_A
    level_N, tight_N = time_NA.max(1)
    expert_NK, heavy_NK = _locked_experts(problems, light_NX, tight_N, search.num_experts)
    slot_NJ, open_NJ = _free_slots(problems, ranks, time_NA, tight_N, search.num_slots)
    score_NKJ = _scores(problems, ranks, inside_NA, level_N, expert_NK, slot_NJ)
    legal_NKJ = heavy_NK[:, :, None] & open_NJ[:, None, :]
    score_NKJ = torch.where(legal_NKJ, score_NKJ, torch.inf).flatten(1)
    num_moves = min(num_moves, score_NKJ.shape[1])
    score_NV, choice_NV = score_NKJ.topk(num_moves, dim=1, largest=False)
    slot_NV = slot_NJ.gather(1, choice_NV % slot_NJ.shape[1])
    expert_NV = expert_NK.gather(1, choice_NV // slot_NJ.shape[1])
    return score_NV, slot_NV, expert_NV, _smooth_max(time_NA / level_N[:, None])


def _locked_experts(
    problems: _Problems, light_NX: torch.Tensor, tight_N: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The heaviest experts with all copies inside the tight set: ids, and which ids are real."""
    locked_NX = (problems.mask_NX & ~tight_N[:, None]) == 0
    share_NX = torch.where(locked_NX & ~light_NX, problems.share_NX, 0)
    share_NK, expert_NK = share_NX.topk(min(num_experts, share_NX.shape[1]), dim=1)
    return expert_NK, share_NK > 0


def _free_slots(
    problems: _Problems,
    ranks: _Ranks,
    time_NA: torch.Tensor,
    tight_N: torch.Tensor,
    num_slots: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Usable slots outside the tight set, least loaded ranks first: ids, and which are real."""
    outside_NS = (tight_N[:, None] >> ranks.rank_of_S) & 1 == 0
    alone_NS = time_NA[:, 1 << ranks.rank_of_S]
    order_NS = torch.where(outside_NS & problems.usable_NS, alone_NS, torch.inf)
    time_NJ, slot_NJ = order_NS.topk(min(num_slots, order_NS.shape[1]), dim=1, largest=False)
    return slot_NJ, time_NJ < torch.inf


def _scores(
    problems: _Problems,
    ranks: _Ranks,
    inside_NA: torch.Tensor,
    level_N: torch.Tensor,
    expert_NK: torch.Tensor,
    slot_NJ: torch.Tensor,
) -> torch.Tensor:
    """Smooth maximum over all sets after putting expert k into slot j, for all pairs.

    Only sets without the slot's rank change: those that held the expert in full lose it, those
    that hold all other copies of the replaced expert gain that one.
    """
    rank_NJ = ranks.rank_of_S[slot_NJ]
    without_NJH = subsets.sets_without_DH(ranks.num_ranks)[rank_NJ]
    freed_DMH = subsets.freed_DMH(ranks.num_ranks)
    old_NJ = problems.copy_NS.gather(1, slot_NJ)
    lost_NJ = torch.where(old_NJ >= 0, problems.share_NX.gather(1, old_NJ.clamp(min=0)), 0)
    old_mask_NJ = problems.mask_NX.gather(1, old_NJ.clamp(min=0))
    before_NJH = inside_NA.gather(1, without_NJH.flatten(1)).view(without_NJH.shape)
    before_NJH = before_NJH + lost_NJ[:, :, None] * freed_DMH[rank_NJ, old_mask_NJ]
    mask_NK = problems.mask_NX.gather(1, expert_NK)
    time_NKJH = freed_DMH[rank_NJ[:, None, :], mask_NK[:, :, None]]
    time_NKJH.mul_(-problems.share_NX.gather(1, expert_NK)[:, :, None, None])
    time_NKJH.add_(before_NJH[:, None])
    pace_NJH = ranks.pace_A[without_NJH] / level_N[:, None, None]
    changed_NKJ = _smooth_max(time_NKJH.mul_(pace_NJH[:, None]))
    with_NJH = without_NJH + (1 << rank_NJ)[:, :, None]
    same_NJH = inside_NA.gather(1, with_NJH.flatten(1)).view(with_NJH.shape)
    same_NJH = same_NJH * ranks.pace_A[with_NJH] / level_N[:, None, None]
    return changed_NKJ + _smooth_max(same_NJH)[:, None]


def _smooth_max(time: torch.Tensor) -> torch.Tensor:
    """Sum of 16th powers over the last axis; overwrites its argument."""
    for _ in range(4):
        time.mul_(time)
    return time.sum(-1)


def _fill(
    problems: _Problems,
    ranks: _Ranks,
    rows: torch.Tensor,
    slot_N: torch.Tensor,
    expert_N: torch.Tensor,
) -> None:
    """Put an expert (-1 for none) into a slot of the given problems."""
    bit_N = 1 << ranks.rank_of_S[slot_N]
    old_N = problems.copy_NS[rows, slot_N]
    held = old_N >= 0
    problems.mask_NX[rows[held], old_N[held]] &= ~bit_N[held]
    filled = expert_N >= 0
    problems.mask_NX[rows[filled], expert_N[filled]] |= bit_N[filled]
    problems.copy_NS[rows, slot_N] = expert_N


def _escape(problems: _Problems, light_NX: torch.Tensor, ranks: _Ranks, search: Search) -> None:
    """Where the goal was not reached, force a move that looks bad, hold it, and search on.

    Finds chains such as: the hottest expert to the emptiest rank, the one it drives out elsewhere.
    """
    level_N = _levels(problems, ranks)
    rows = (level_N > problems.goal_N).nonzero(as_tuple=True)[0]
    for _ in range(search.max_escapes):
        if not len(rows):
            return
        tries, tried_NV = _forced(problems[rows], light_NX[rows], ranks, search)
        best_N, choice_N = tried_NV.min(1)
        better = best_N < level_N[rows] * (1 - 1e-6)
        winner_N = torch.arange(len(rows)) * tried_NV.shape[1] + choice_N
        problems.put(rows[better], tries[winner_N[better]])
        level_N[rows] = torch.minimum(level_N[rows], best_N)
        rows = rows[better & (best_N > problems.goal_N[rows])]


def _forced(
    problems: _Problems, light_NX: torch.Tensor, ranks: _Ranks, search: Search
) -> tuple[_Problems, torch.Tensor]:
    """Search results [N·V] after each of the V best moves is made and its slot held; level_NV."""
    score_NV, slot_NV, expert_NV, _ = _best_moves(
        problems, light_NX, ranks, search, search.num_forced
    )
    num_forced = score_NV.shape[1]
    parent = torch.arange(len(score_NV)).repeat_interleave(num_forced)
    tries = problems[parent]
    real = (score_NV.flatten() < torch.inf).nonzero(as_tuple=True)[0]
    slot_N = slot_NV.flatten()[real]
    _fill(tries, ranks, real, slot_N, expert_NV.flatten()[real])
    tries.usable_NS[real, slot_N] = False
    level_N = _grow(tries, light_NX[parent], ranks, search)
    return tries, level_N.view(-1, num_forced)


def _prune(problems: _Problems, ranks: _Ranks) -> None:
    """Take out copies, the most dispensable first, while goal or level stay as they are."""
    limit_N = torch.maximum(_levels(problems, ranks) * (1 + 1e-6), problems.goal_N)
    rows = torch.arange(len(limit_N))
    while len(rows) and problems.copy_NS.shape[1]:
        active = problems[rows]
        level_NS = _levels_without(active, ranks)
        level_N, slot_N = level_NS.min(1)
        spare = level_N <= limit_N[rows]
        rows, slot_N = rows[spare], slot_N[spare]
        _fill(problems, ranks, rows, slot_N, torch.full_like(slot_N, -1))


def _levels_without(problems: _Problems, ranks: _Ranks) -> torch.Tensor:
    """Level of each problem after emptying one slot, for every slot; inf for empty ones."""
    level_NS = torch.full(problems.copy_NS.shape, torch.inf)
    for slot in range(problems.copy_NS.shape[1]):
        rows = (problems.copy_NS[:, slot] >= 0).nonzero(as_tuple=True)[0]
        trial = problems[rows]
        every, nothing = torch.arange(len(rows)), torch.full_like(rows, -1)
        _fill(trial, ranks, every, torch.full_like(rows, slot), nothing)
        level_NS[rows, slot] = _levels(trial, ranks)
    return level_NS
