"""Which pairs of experts should trade places so that no place is slow in any micro-batch?

A place is a node or a rank. All seats of all places are taken, empty ones by experts without
load, so a move into a free seat is a swap too. For each layer the search takes the place that is
slowest most (weighted by how much), tries to swap each of its experts with each expert elsewhere,
and makes the best swap, until no swap of any place lowers

    sum over micro-batches of (max over places of load / speed) - weight · (travel saved) / places.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from balance.steps.nearness import Nearness


@dataclass(frozen=True)
class Limits:
    """Which swaps are allowed.

    Attributes:
        before_LE: ranks from which moves are counted; None means where the search starts.
        budget: most experts of a layer on another rank than before; None for any number.
        group_of_D: only ranks of the same group may trade; None for any.
    """

    before_LE: np.ndarray | None = None
    budget: int | None = None
    group_of_D: np.ndarray | None = None


def improve_by_swaps(
    load_LBE: np.ndarray,
    rank_LE: np.ndarray,
    seats_D: np.ndarray,
    speed_D: np.ndarray,
    place_of_D: np.ndarray,
    limits: Limits | None = None,
    nearness: Nearness | None = None,
) -> np.ndarray:
    """Swap experts between places while it helps; a swap exchanges their ranks.

    Args:
        load_LBE: loads >= 0.
        rank_LE: int64 rank of each expert to start from; no rank over its seats.
        seats_D: experts that each rank can hold.
        speed_D: speed of each rank, > 0.
        place_of_D: place of each rank, numbered from 0 without gaps.
        limits: which swaps are allowed.
        nearness: what saves travel.

    Returns:
        rank_LE int64; the sum over micro-batches of the slowest place never rises unless travel
        is saved for it.
    """
    num_experts = rank_LE.shape[1]
    limits = limits or Limits()
    table = _Table.make(load_LBE, rank_LE, seats_D, speed_D, place_of_D, limits, nearness)
    stuck_L = np.zeros(len(rank_LE), dtype=np.int64)
    while True:
        layers = np.flatnonzero(stuck_L < table.num_places)
        if table.num_places == 1 or not len(layers):
            return table.rank_LX[:, :num_experts]
        swapped = table.swap_best(layers, stuck_L[layers])
        stuck_L[layers] = np.where(swapped, 0, stuck_L[layers] + 1)


@dataclass
class _Table:
    """Search state.

    X counts seats: the experts, then one without load for each empty seat. Seats x of one place
    are tried against all X, in the layers l that are still open.
    """

    num_experts: int
    load_LBX: np.ndarray
    rank_LX: np.ndarray
    before_LX: np.ndarray
    load_LBG: np.ndarray
    speed_G: np.ndarray
    place_of_D: np.ndarray
    limits: Limits
    nearness: Nearness | None

    @classmethod
    def make(
        cls,
        load_LBE: np.ndarray,
        rank_LE: np.ndarray,
        seats_D: np.ndarray,
        speed_D: np.ndarray,
        place_of_D: np.ndarray,
        limits: Limits,
        nearness: Nearness | None,
    ) -> Self:
        """Seat everybody, and add up the load of every place."""
        num_layers, num_micro_batches, num_experts = load_LBE.shape
        num_empty = int(seats_D.sum()) - num_experts
        load_LBX = np.pad(load_LBE.astype(np.float32), ((0, 0), (0, 0), (0, num_empty)))
        rank_LX = np.stack([seat_all(rank_E, seats_D) for rank_E in rank_LE])
        before_LX = rank_LX.copy()
        if limits.before_LE is not None:
            before_LX[:, :num_experts] = limits.before_LE
        speed_G = np.bincount(place_of_D, speed_D)
        load_LBG = np.zeros((num_layers, num_micro_batches, len(speed_G)), np.float32)
        for place in range(len(speed_G)):
            here_LX = place_of_D[rank_LX] == place
            load_LBG[:, :, place] = np.einsum("lbx,lx->lb", load_LBX, here_LX.astype(np.float32))
        if nearness is not None:
            nearness = nearness.padded(num_empty)
        return cls(
            num_experts,
            load_LBX,
            rank_LX,
            before_LX,
            load_LBG,
            speed_G,
            place_of_D,
            limits,
            nearness,
        )

    @property
    def num_places(self) -> int:
        """G."""
        return len(self.speed_G)

    def swap_best(self, layers: np.ndarray, nth: np.ndarray) -> np.ndarray:
        """In each layer make the best swap of its nth slowest place; True where one helped."""
        time_lBG = self.load_LBG[layers] / self.speed_G.astype(np.float32)
        slowest_lB = time_lBG.max(2)
        excess_lBG = (time_lBG == slowest_lB[:, :, None]) * (slowest_lB - time_lBG.mean(2))[
            :, :, None
        ]
        order_lG = np.argsort(-excess_lBG.sum(1), axis=1, kind="stable")
        place_l = order_lG[np.arange(len(layers)), nth]
        member_lx, is_member_lx = self._members(layers, place_l)
        cost_lxX = self._straggler_cost(layers, place_l, member_lx, time_lBG)
        if self.nearness is not None:
            place_lX = self.place_of_D[self.rank_LX[layers]]
            cost_lxX -= self.nearness.saved_by_swaps(
                layers, place_lX, place_l, member_lx, self.place_of_D
            )
        legal_lxX = is_member_lx[:, :, None] & self._legal(layers, place_l, member_lx)
        flat = np.where(legal_lxX, cost_lxX, np.inf).reshape(len(layers), -1)
        choice_l = flat.argmin(1)
        now_l = slowest_lB.sum(1, dtype=np.float64)
        helps_l = flat[np.arange(len(layers)), choice_l] < now_l * (1 - 1e-6)
        mine_l = member_lx[np.arange(len(layers)), choice_l // cost_lxX.shape[2]]
        self._exchange(layers[helps_l], mine_l[helps_l], (choice_l % cost_lxX.shape[2])[helps_l])
        return helps_l

    def _members(self, layers: np.ndarray, place_l: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seats of each layer's place, member_lx, and which of them are real, bool [l, x]."""
        here_lX = self.place_of_D[self.rank_LX[layers]] == place_l[:, None]
        most = int(here_lX.sum(1).max())
        member_lx = np.argsort(~here_lX, axis=1, kind="stable")[:, :most]
        return member_lx, np.take_along_axis(here_lX, member_lx, 1)

    def _straggler_cost(
        self, layers: np.ndarray, place_l: np.ndarray, member_lx: np.ndarray, time_lBG: np.ndarray
    ) -> np.ndarray:
        """Sum over micro-batches of the slowest place's time after swapping x with X."""
        every = np.arange(len(layers))
        other_lX = self.place_of_D[self.rank_LX[layers]]
        my_pace_l = (1 / self.speed_G[place_l]).astype(np.float32)[:, None, None]
        pace_lX = (1 / self.speed_G[other_lX]).astype(np.float32)[:, None, :]
        cost_lxX = np.zeros((*member_lx.shape, other_lX.shape[1]))
        for b in range(time_lBG.shape[1]):
            load_lX = self.load_LBX[layers, b]
            less_lxX = np.take_along_axis(load_lX, member_lx, 1)[:, :, None] - load_lX[:, None, :]
            time_lG = time_lBG[:, b].copy()
            mine_l = time_lG[every, place_l]
            time_lG[every, place_l] = 0
            theirs_lX = np.take_along_axis(time_lG, other_lX, 1)
            rest_lX = np.take_along_axis(_max_without_each(time_lG), other_lX, 1)
            after_lxX = np.maximum(
                mine_l[:, None, None] - less_lxX * my_pace_l, rest_lX[:, None, :]
            )
            less_lxX *= pace_lX
            less_lxX += theirs_lX[:, None, :]
            cost_lxX += np.maximum(after_lxX, less_lxX, out=after_lxX)
        return cost_lxX

    def _legal(self, layers: np.ndarray, place_l: np.ndarray, member_lx: np.ndarray) -> np.ndarray:
        """Which swaps of x with X cross places, keep groups and stay in the budget: [l, x, X]."""
        rank_lX = self.rank_LX[layers]
        legal_lxX = np.repeat(
            (self.place_of_D[rank_lX] != place_l[:, None])[:, None, :], member_lx.shape[1], 1
        )
        my_rank_lx = np.take_along_axis(rank_lX, member_lx, 1)
        if self.limits.group_of_D is not None:
            group_of_D = self.limits.group_of_D
            legal_lxX &= group_of_D[my_rank_lx][:, :, None] == group_of_D[rank_lX][:, None, :]
        if self.limits.budget is not None:
            moved_lxX = self._moved_after(layers, member_lx, my_rank_lx, rank_lX)
            legal_lxX &= moved_lxX <= self.limits.budget
        return legal_lxX

    def _moved_after(
        self,
        layers: np.ndarray,
        member_lx: np.ndarray,
        my_rank_lx: np.ndarray,
        rank_lX: np.ndarray,
    ) -> np.ndarray:
        """Experts away from their rank of before, once x and X have traded ranks."""
        before_lX = self.before_LX[layers].copy()
        # A seat without an expert moves for free: it is at home wherever it is.
        before_lX[:, self.num_experts :] = -1
        is_free_X = np.arange(before_lX.shape[1]) >= self.num_experts
        away_lX = (rank_lX != before_lX) & ~is_free_X
        my_before_lx = np.take_along_axis(before_lX, member_lx, 1)
        mine_lxX = (rank_lX[:, None, :] != my_before_lx[:, :, None]) & (my_before_lx >= 0)[
            ..., None
        ]
        theirs_lxX = (my_rank_lx[:, :, None] != before_lX[:, None, :]) & ~is_free_X
        moved_lxX = away_lX.sum(1)[:, None, None] + mine_lxX.astype(np.int64) + theirs_lxX
        moved_lxX -= np.take_along_axis(away_lX, member_lx, 1)[:, :, None]
        return moved_lxX - away_lX[:, None, :]

    def _exchange(self, layers: np.ndarray, mine_l: np.ndarray, theirs_l: np.ndarray) -> None:
        """Trade the ranks of two seats in each layer."""
        rank_l, other_l = self.rank_LX[layers, mine_l], self.rank_LX[layers, theirs_l]
        less_lB = self.load_LBX[layers, :, mine_l] - self.load_LBX[layers, :, theirs_l]
        self.load_LBG[layers, :, self.place_of_D[rank_l]] -= less_lB
        self.load_LBG[layers, :, self.place_of_D[other_l]] += less_lB
        self.rank_LX[layers, mine_l], self.rank_LX[layers, theirs_l] = other_l, rank_l


def seat_all(rank_E: np.ndarray, seats_D: np.ndarray) -> np.ndarray:
    """Ranks of the experts, then of one stand-in for every seat they leave empty."""
    empty_D = seats_D - np.bincount(rank_E, minlength=len(seats_D))
    return np.concatenate([rank_E, np.repeat(np.arange(len(seats_D)), empty_D)])


def _max_without_each(time_lG: np.ndarray) -> np.ndarray:
    """For each place, the largest time among the others; 0 when there is no other."""
    if time_lG.shape[1] == 1:
        return np.zeros_like(time_lG)
    second_l, first_l = np.partition(time_lG, -2, axis=1)[:, -2:].T
    is_first_lG = np.arange(time_lG.shape[1]) == time_lG.argmax(1)[:, None]
    return np.where(is_first_lG, second_l[:, None], first_l[:, None])
