"""Where experts lie: which expert each slot holds, and which slot serves each choice."""

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from megakernel.checks.tensors import check_integers
from megakernel.plan.buffers import Slots


@dataclass(frozen=True, eq=False)
class Placement:
    """Experts in slots, reordered and replicated; built once, used for many calls.

    On one device a replica shares its expert's weights, so nothing is copied. Two placements are
    equal if their maps are (which looks at the maps, and on a GPU synchronises).

    Attributes:
        expert_of_P: [P] integer, the expert each slot holds; -1 is an empty slot. A placement that
            holds only some experts, such as a rank's part of a plan, serves replays of ids that
            it holds. (vLLM, SGLang: physical_to_logical_map.)
        slot_of_TK: [T, K] integer, the slot that serves each choice, or None to let the copies of
            an expert take turns in token order, which splits its tokens evenly.

    Tensors, or NumPy arrays, which become tensors on the CPU.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """

    expert_of_P: Tensor
    slot_of_TK: Tensor | None = None
    slots: Slots = field(init=False, repr=False)  # the kernel's tables
    slot_int32_TK: Tensor | None = field(init=False, repr=False)  # as the kernel reads it
    held_experts: frozenset[int] = field(init=False, repr=False)

    @torch.inference_mode(False)  # tables serve later calls, of whatever mode
    def __post_init__(self) -> None:
        """Check the maps and derive the tables, ahead of any launch."""
        for name in ("expert_of_P", "slot_of_TK"):
            if isinstance(getattr(self, name), np.ndarray):
                object.__setattr__(self, name, torch.from_numpy(getattr(self, name).copy()))
        check_integers("expert_of_P", self.expert_of_P, 1)
        if self.slot_of_TK is not None:
            check_integers("slot_of_TK", self.slot_of_TK, 2)
            if self.slot_of_TK.device != self.expert_of_P.device:
                raise ValueError(
                    f"slot_of_TK must be on the device of expert_of_P, {self.expert_of_P.device}, "
                    f"got {self.slot_of_TK.device}"
                )
        experts = self.expert_of_P.tolist()
        low = min(experts, default=-1)
        if low < -1:
            raise ValueError(f"expert_of_P must hold expert ids or -1, got {low}")
        if max(experts, default=-1) < 0:
            raise ValueError(f"expert_of_P must hold an expert, got {experts}")
        object.__setattr__(self, "slots", make_slots(experts, self.expert_of_P.device))
        slot_TK = self.slot_of_TK
        slot_int32_TK = None if slot_TK is None else as_kept(slot_TK)
        object.__setattr__(self, "slot_int32_TK", slot_int32_TK)
        object.__setattr__(self, "held_experts", frozenset(experts) - {-1})

    @classmethod
    @torch.inference_mode(False)
    def from_plan(
        cls, plan: Any, micro_batch: int, layer: int, device: torch.device | str | None = None
    ) -> Self:
        """Return the placement that a plan has for one layer in one micro-batch.

        Args:
            plan: a ``balance.Plan``, or anything with its ``expert_of_P`` and ``slot_of_TK``.
            micro_batch: index of the micro-batch.
            layer: index of the layer among the plan's.
            device: where the tables shall lie; the CPU by default.
        """
        maps = plan.expert_of_P(micro_batch, layer), plan.slot_of_TK(micro_batch, layer)
        return cls(*(torch.tensor(values, device=device) for values in maps))

    def __eq__(self, other: object) -> bool:
        """Whether both maps are the same."""
        if not isinstance(other, Placement):
            return NotImplemented
        if self.expert_of_P.device != other.expert_of_P.device:
            return False
        slots_TK, other_TK = self.slot_int32_TK, other.slot_int32_TK
        if slots_TK is None or other_TK is None:
            same_split = slots_TK is other_TK
        else:
            same_split = torch.equal(slots_TK, other_TK)
        return same_split and self.expert_of_P.tolist() == other.expert_of_P.tolist()

    def __hash__(self) -> int:
        """Equal placements have equal sizes."""
        return hash((self.num_slots, self.num_experts, self.slot_of_TK is None))

    def missing_of(self, num_experts: int) -> list[int]:
        """Return the experts of a layer that no slot holds."""
        return sorted(frozenset(range(num_experts)) - self.held_experts)

    @property
    def num_slots(self) -> int:
        """P."""
        return len(self.expert_of_P)

    @property
    def num_experts(self) -> int:
        """One more than the largest expert id."""
        assert self.slots.copies_of_E is not None
        return len(self.slots.copies_of_E)

    @property
    def max_copies(self) -> int:
        """V."""
        assert self.slots.slots_of_EV is not None
        return self.slots.slots_of_EV.shape[1]


@torch.inference_mode(False)
def as_kept(integers: Tensor) -> Tensor:
    """Return integers as the kernel reads them, int32 and contiguous, to be used in any mode.

    What is kept for later calls may meet autograd there, which refuses tensors of inference mode.
    """
    kept = integers.int().contiguous()
    return kept.clone() if kept.is_inference() else kept


def make_slots(experts: list[int], device: torch.device) -> Slots:
    """Derive the kernel's tables from the expert of each slot; see Slots for an example."""
    slots_of_E: list[list[int]] = [[] for _ in range(max(experts) + 1)]
    copy_of_P = []
    for slot, expert in enumerate(experts):
        copy_of_P.append(len(slots_of_E[expert]) if expert >= 0 else 0)
        if expert >= 0:
            slots_of_E[expert].append(slot)
    most = max(map(len, slots_of_E))
    padded = [slots + [-1] * (most - len(slots)) for slots in slots_of_E]

    def table(values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return Slots(table(experts), table(copy_of_P), table([*map(len, slots_of_E)]), table(padded))
