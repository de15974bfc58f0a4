"""What saves travel: experts near their tokens, and experts of the same tokens together."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Nearness:
    """How much less travels for where experts are.

    Attributes:
        weight: straggler load given up per assignment and place that need not travel; 0 for none.
        near_LED: assignments to an expert from tokens on each rank.
        together_LEE: tokens that chose both experts, symmetric; None counts as zero.
    """

    weight: float
    near_LED: np.ndarray
    together_LEE: np.ndarray | None = None

    def of_ranks(self, ranks: np.ndarray) -> "Nearness":
        """The same with some of the ranks."""
        return Nearness(self.weight, self.near_LED[:, :, ranks], self.together_LEE)

    def padded(self, num_empty: int) -> "Nearness":
        """The same with experts added that no token chose: all seats X, also empty ones."""
        together_LEE = self.together_LEE
        if together_LEE is not None:
            together_LEE = np.pad(together_LEE, ((0, 0), (0, num_empty), (0, num_empty)))
        near_LED = np.pad(self.near_LED, ((0, 0), (0, num_empty), (0, 0)))
        return Nearness(self.weight, near_LED, together_LEE)

    def saved_by_swaps(
        self,
        layers: np.ndarray,
        place_lX: np.ndarray,
        place_l: np.ndarray,
        member_lx: np.ndarray,
        place_of_D: np.ndarray,
    ) -> np.ndarray:
        """Weighted travel that swapping seat x with seat X saves, per place: [l, x, X].

        Args:
            layers: which layers.
            place_lX: place of every seat now.
            place_l: the place whose seats are to be swapped.
            member_lx: its seats.
            place_of_D: place of each rank.
        """
        num_places = int(place_of_D.max()) + 1
        pull_lXG = self._pull(layers, place_lX, np.eye(num_places), place_of_D)
        stay_lX = np.take_along_axis(pull_lXG, place_lX[:, :, None], 2)[:, :, 0]
        at_mine_lX = np.take_along_axis(pull_lXG, place_l[:, None, None], 2)[:, :, 0]
        mine_lxG = np.take_along_axis(pull_lXG, member_lx[:, :, None], 1)
        saved_lxX = np.take_along_axis(mine_lxG, place_lX[:, None, :], 2)
        saved_lxX -= np.take_along_axis(stay_lX, member_lx, 1)[:, :, None]
        saved_lxX += (at_mine_lX - stay_lX)[:, None, :]
        if self.together_LEE is not None:
            # Two that trade places are no nearer to one another than before.
            pair_lXX = self.together_LEE[layers]
            saved_lxX -= 2 * np.take_along_axis(pair_lXX, member_lx[:, :, None], 1)
        return saved_lxX * (self.weight / num_places)

    def _pull(
        self,
        layers: np.ndarray,
        place_lX: np.ndarray,
        one_hot_GG: np.ndarray,
        place_of_D: np.ndarray,
    ) -> np.ndarray:
        """Travel that a seat saves at each place, [l, X, G]: its tokens, its companions there."""
        pull_lXG = self.near_LED[layers] @ one_hot_GG[place_of_D]
        if self.together_LEE is None:
            return pull_lXG
        return pull_lXG + self.together_LEE[layers] @ one_hot_GG[place_lX]
