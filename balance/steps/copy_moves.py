"""Moves of a search for copies: which there are, how good each is, and making one.

The load of every set of ranks is a table (``balance.exact.rank_sets``), in which a move changes a
known half. So moves are compared exactly, by the smooth maximum over all sets of
(time / bottleneck)^16: unlike the maximum, it also sees the second tightest set.

All problems of a batch are moved at once: F problems of X experts, D ranks and J extra slots, over
U sets of ranks (Y of them without a given rank). Experts tried are x, slots tried are j, and O are
the moves looked at.
"""

from dataclasses import dataclass, fields

import torch

from balance.exact import rank_sets


@dataclass
class Problems:
    """State of a search. Loads are shares of the mean rank time, so that 1 is a perfect split.

    Attributes:
        share_FX: load of each expert, float32.
        light_FX: bool, experts with too little load for a copy.
        mask_FX: set of ranks that hold each expert.
        copy_FJ: expert in each extra slot, -1 for none.
        usable_FJ: bool, slots that may be filled.
        goal_F: level at which the search stops.
    """

    share_FX: torch.Tensor
    light_FX: torch.Tensor
    mask_FX: torch.Tensor
    copy_FJ: torch.Tensor
    usable_FJ: torch.Tensor
    goal_F: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> "Problems":
        """Some of the problems, copied."""
        return Problems(*(getattr(self, field.name)[rows] for field in fields(self)))

    def adopt(self, rows: torch.Tensor, other: "Problems") -> None:
        """Take over the copies of other states of some problems."""
        self.mask_FX[rows], self.copy_FJ[rows] = other.mask_FX, other.copy_FJ


@dataclass(frozen=True)
class Ranks:
    """What all problems share.

    Attributes:
        rank_of_J: rank of each extra slot.
        pace_U: 1 / speed of each set of ranks, float32; 0 for the empty set.
    """

    rank_of_J: torch.Tensor
    pace_U: torch.Tensor

    @property
    def num_ranks(self) -> int:
        """D."""
        return len(self.pace_U).bit_length() - 1


def table_of_sets(problems: Problems, ranks: Ranks) -> torch.Tensor:
    """Load that cannot leave each set of ranks, inside_FU float32."""
    return rank_sets.inside_FU(problems.share_FX, problems.mask_FX, ranks.num_ranks)


def rank_levels(problems: Problems, ranks: Ranks) -> torch.Tensor:
    """Time of the slowest rank after the best split over the copies there are, level_F."""
    return (table_of_sets(problems, ranks) * ranks.pace_U).amax(1)


def best_moves(
    problems: Problems, ranks: Ranks, num_experts: int, num_slots: int, num_moves: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best ways to put an expert locked inside the tight set into a slot outside it.

    Args:
        problems: where the search stands.
        ranks: what the problems share.
        num_experts: heaviest locked experts tried.
        num_slots: slots tried, those on the least loaded ranks.
        num_moves: how many to return.

    Returns:
        score_FO (inf where there is no such move), slot_FO and expert_FO, best first; and the
        score_F of leaving all as it is.
    """
    inside_FU = table_of_sets(problems, ranks)
    time_FU = inside_FU * ranks.pace_U
    level_F, tight_F = time_FU.max(1)
    expert_Fx, heavy_Fx = _locked_experts(problems, tight_F, num_experts)
    slot_Fj, open_Fj = _free_slots(problems, ranks, time_FU, tight_F, num_slots)
    score_Fxj = _scores(problems, ranks, inside_FU, level_F, expert_Fx, slot_Fj)
    legal_Fxj = heavy_Fx[:, :, None] & open_Fj[:, None, :]
    score_Fxj = torch.where(legal_Fxj, score_Fxj, torch.inf).flatten(1)
    num_moves = min(num_moves, score_Fxj.shape[1])
    score_FO, choice_FO = score_Fxj.topk(num_moves, dim=1, largest=False)
    slot_FO = slot_Fj.gather(1, choice_FO % slot_Fj.shape[1])
    expert_FO = expert_Fx.gather(1, choice_FO // slot_Fj.shape[1])
    return score_FO, slot_FO, expert_FO, _sum_of_powers(time_FU / level_F[:, None])


def fill(
    problems: Problems,
    ranks: Ranks,
    rows: torch.Tensor,
    slot_F: torch.Tensor,
    expert_F: torch.Tensor,
) -> None:
    """Put an expert (-1 for none) into one slot of each of the given problems."""
    bit_F = 1 << ranks.rank_of_J[slot_F]
    old_F = problems.copy_FJ[rows, slot_F]
    held = old_F >= 0
    problems.mask_FX[rows[held], old_F[held]] &= ~bit_F[held]
    filled = expert_F >= 0
    problems.mask_FX[rows[filled], expert_F[filled]] |= bit_F[filled]
    problems.copy_FJ[rows, slot_F] = expert_F


def _locked_experts(
    problems: Problems, tight_F: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The heaviest experts with all copies inside the tight set: ids, and which ids are real."""
    locked_FX = (problems.mask_FX & ~tight_F[:, None]) == 0
    share_FX = torch.where(locked_FX & ~problems.light_FX, problems.share_FX, 0)
    share_Fx, expert_Fx = share_FX.topk(min(num_experts, share_FX.shape[1]), dim=1)
    return expert_Fx, share_Fx > 0


def _free_slots(
    problems: Problems,
    ranks: Ranks,
    time_FU: torch.Tensor,
    tight_F: torch.Tensor,
    num_slots: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Usable slots outside the tight set, least loaded ranks first: ids, and which are real."""
    outside_FJ = (tight_F[:, None] >> ranks.rank_of_J) & 1 == 0
    alone_FJ = time_FU[:, 1 << ranks.rank_of_J]
    order_FJ = torch.where(outside_FJ & problems.usable_FJ, alone_FJ, torch.inf)
    time_Fj, slot_Fj = order_FJ.topk(min(num_slots, order_FJ.shape[1]), dim=1, largest=False)
    return slot_Fj, time_Fj < torch.inf


def _scores(
    problems: Problems,
    ranks: Ranks,
    inside_FU: torch.Tensor,
    level_F: torch.Tensor,
    expert_Fx: torch.Tensor,
    slot_Fj: torch.Tensor,
) -> torch.Tensor:
    """Smooth maximum over all sets after putting expert x into slot j, for all pairs [F, x, j].

    Only sets without the slot's rank change: those that held the expert in full lose it, those
    that hold all other copies of the replaced expert gain that one.
    """
    rank_Fj = ranks.rank_of_J[slot_Fj]
    without_FjY = rank_sets.sets_without_DY(ranks.num_ranks)[rank_Fj]
    freed_DUY = rank_sets.freed_DUY(ranks.num_ranks)
    old_Fj = problems.copy_FJ.gather(1, slot_Fj)
    lost_Fj = torch.where(old_Fj >= 0, problems.share_FX.gather(1, old_Fj.clamp(min=0)), 0)
    old_mask_Fj = problems.mask_FX.gather(1, old_Fj.clamp(min=0))
    before_FjY = inside_FU.gather(1, without_FjY.flatten(1)).view(without_FjY.shape)
    before_FjY = before_FjY + lost_Fj[:, :, None] * freed_DUY[rank_Fj, old_mask_Fj]
    mask_Fx = problems.mask_FX.gather(1, expert_Fx)
    # The largest array of the planner, so it is worked on in place.
    time_FxjY = freed_DUY[rank_Fj[:, None, :], mask_Fx[:, :, None]]
    time_FxjY.mul_(-problems.share_FX.gather(1, expert_Fx)[:, :, None, None])
    time_FxjY.add_(before_FjY[:, None])
    pace_FjY = ranks.pace_U[without_FjY] / level_F[:, None, None]
    changed_Fxj = _sum_of_powers(time_FxjY.mul_(pace_FjY[:, None]))
    with_FjY = without_FjY + (1 << rank_Fj)[:, :, None]
    same_FjY = inside_FU.gather(1, with_FjY.flatten(1)).view(with_FjY.shape)
    same_FjY = same_FjY * ranks.pace_U[with_FjY] / level_F[:, None, None]
    return changed_Fxj + _sum_of_powers(same_FjY)[:, None]


def _sum_of_powers(time: torch.Tensor) -> torch.Tensor:
    """Sum of 16th powers over the last axis; overwrites its argument."""
    for _ in range(4):
        time.mul_(time)
    return time.sum(-1)
