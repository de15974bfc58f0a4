"""Row tables of a routing that is known ahead of the step."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megakernel.checks.tensors import check_integers
from megakernel.checks.values import (
    check_distinct_ids,
    check_held,
    check_known_experts,
    check_slot_shape,
    check_slots,
)
from megakernel.placement import Placement
from megakernel.plan.buffers import Rows, Slots


@dataclass(frozen=True, eq=False)
class Replay:
    """A recorded routing, sorted into rows of one tile height.

    Prepared with a config, it is for that height alone. Prepared without one, it is for the usual
    height, and makes tables for another when a call's config first asks for it: float32 weights,
    or a tuned config.

    Attributes:
        expert_of_TK: [T, K] int32, the forced ids.
        num_experts: E.
        block_rows: tile height the rows are padded to.
        num_tiles: row tiles that hold a row, exactly.
        rows: the kernel's tables.
        load_E: [E] int32, choices per expert.
        placement: what the tables were built for.
        is_fixed: whether a config was given.
        unplaced: the same without a placement, if there is one: a backward has rows by expert,
            whatever the placement, so that its bits do not depend on that.
    """

    expert_of_TK: Tensor
    num_experts: int
    block_rows: int
    num_tiles: int
    rows: Rows
    load_E: Tensor
    placement: Placement | None
    is_fixed: bool
    other_heights: dict[int, "Replay"] = field(default_factory=dict, repr=False)
    unplaced: "Replay | None" = field(default=None, repr=False)

    def of_height(self, block_rows: int) -> "Replay":
        """Return the replay for a tile height; builds tables (and synchronises) once per height.

        Raises:
            ValueError: if it was prepared for another height alone.
        """
        if block_rows == self.block_rows:
            return self
        if self.is_fixed:
            raise ValueError(
                f"replay must be prepared with block_rows={block_rows} as in config, "
                f"got {self.block_rows}"
            )
        if block_rows not in self.other_heights:
            self.other_heights[block_rows] = sort_into_rows(
                self.expert_of_TK, self.num_experts, self.placement, block_rows, is_fixed=True
            )
        return self.other_heights[block_rows]

    def by_expert(self) -> "Replay":
        """Return the replay whose slots are experts, as a backward has it."""
        return self.unplaced or self


@torch.inference_mode(False)  # tables are kept for later calls, of whatever mode
def sort_into_rows(
    ids_TK: Tensor,
    num_experts: int,
    placement: Placement | None,
    block_rows: int,
    is_fixed: bool,
) -> Replay:
    """Build the tables of checked int32 ids for one tile height."""
    slot_A, ordinal_A, num_slots = slots_of_assignments(ids_TK, num_experts, placement)
    rows_of_P = torch.bincount(slot_A[slot_A >= 0], minlength=num_slots)
    tiles_of_P = (rows_of_P + block_rows - 1) // block_rows
    tile_start_P = tiles_of_P.cumsum(0) - tiles_of_P
    num_tiles = int(tiles_of_P.sum())
    row_A = tile_start_P[slot_A.clamp(min=0)] * block_rows + ordinal_A
    row_A = torch.where(slot_A >= 0, row_A, -1)

    assignment_A = torch.arange(len(slot_A), device=ids_TK.device)
    assignment_of_C = torch.zeros(
        max(num_tiles, 1) * block_rows, dtype=torch.int64, device=ids_TK.device
    )
    assignment_of_C[row_A[row_A >= 0]] = assignment_A[row_A >= 0]
    slot_of_tile = torch.repeat_interleave(tiles_of_P)
    tile_of_slot = torch.arange(num_tiles, device=ids_TK.device) - tile_start_P[slot_of_tile]
    rows_left = rows_of_P[slot_of_tile] - tile_of_slot * block_rows
    rows_of_tile = rows_left.clamp(max=block_rows)
    expert_of_P = placement.expert_of_P if placement else torch.arange(num_experts)
    expert_of_tile = expert_of_P.to(ids_TK.device)[slot_of_tile]
    tables = (row_A.view(ids_TK.shape), assignment_of_C, expert_of_tile, rows_of_tile)
    rows = Rows(*(table.int() for table in tables))
    load_E = torch.bincount(ids_TK[ids_TK >= 0], minlength=num_experts).int()
    if placement is None:
        rows = rows._replace(first_row_of_E=(tile_start_P * block_rows).int(), rows_of_E=load_E)
    unplaced = (
        sort_into_rows(ids_TK, num_experts, None, block_rows, is_fixed) if placement else None
    )
    return Replay(
        ids_TK, num_experts, block_rows, num_tiles, rows, load_E, placement, is_fixed,
        unplaced=unplaced,
    )  # fmt: skip


def slots_of_assignments(
    ids_TK: Tensor, num_experts: int, placement: Placement | None
) -> tuple[Tensor, Tensor, int]:
    """Return each assignment's slot (-1 if skipped), its ordinal in that slot, and P."""
    expert_A = ids_TK.flatten().long()
    if placement is None:
        return expert_A, stable_rank(expert_A), num_experts
    if placement.slot_of_TK is not None:
        slot_A = torch.where(expert_A >= 0, placement.slot_of_TK.flatten().long(), -1)
        return slot_A, stable_rank(slot_A), placement.num_slots
    slots: Slots = placement.slots
    assert slots.copies_of_E is not None and slots.slots_of_EV is not None
    ordinal_A = stable_rank(expert_A)
    served_A = expert_A.clamp(min=0)
    copies_A = slots.copies_of_E[served_A].long().clamp(min=1)  # expert 0 may have no slot here
    slot_A = slots.slots_of_EV[served_A, ordinal_A % copies_A].long()
    return torch.where(expert_A >= 0, slot_A, -1), ordinal_A // copies_A, placement.num_slots


def stable_rank(class_A: Tensor) -> Tensor:
    """Return how many earlier assignments share each assignment's class.

    Example: classes [2, 0, 2, 2] give [0, 0, 1, 2].
    """
    order = torch.argsort(class_A, stable=True)
    in_order = class_A[order]
    first = torch.searchsorted(in_order, in_order)  # leftmost position of the same class
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - first
    return rank


def check_routing(expert_of_TK: Tensor, num_experts: int, placement: Placement | None) -> None:
    """Raise ValueError on ids or slots that the layer would have to skip (synchronises)."""
    check_integers("expert_of_TK", expert_of_TK, 2)
    if num_experts < 1:
        raise ValueError(f"num_experts must be positive, got {num_experts}")
    check_distinct_ids(expert_of_TK, num_experts)
    if placement is None:
        return
    check_known_experts(placement.num_experts, num_experts)
    if placement.expert_of_P.device != expert_of_TK.device:
        raise ValueError(
            f"placement must be on the device of expert_of_TK, {expert_of_TK.device}, "
            f"got {placement.expert_of_P.device}"
        )
    check_held(expert_of_TK, placement.missing_of(num_experts))
    if placement.slot_of_TK is not None:
        check_slot_shape(placement.slot_of_TK, tuple(expert_of_TK.shape))
        check_slots(expert_of_TK, placement.slot_of_TK, placement.expert_of_P)
