"""Where experts lie: which expert each slot holds, and which slot serves each choice."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megakernel.device.kernel import Slots


@dataclass(frozen=True, eq=False)
class Placement:
    """Experts in slots, reordered and replicated; built once, used for many calls.

    On one device a replica shares its expert's weights, so nothing is copied.

    Attributes:
        expert_of_P: [P] integer, the expert each slot holds; -1 is an empty slot. Every expert up
            to the largest id has at least one slot. (vLLM, SGLang: physical_to_logical_map.)
        slot_of_TK: [T, K] integer, the slot that serves each choice, or None to let the copies of
            an expert take turns in token order, which splits its tokens evenly.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """

    expert_of_P: Tensor
    slot_of_TK: Tensor | None = None
    num_experts: int = field(init=False, repr=False)
    slots: Slots = field(init=False, repr=False)  # the kernel's tables
    slot_int32_TK: Tensor | None = field(init=False, repr=False)  # as the kernel reads it

    def __post_init__(self) -> None:
        """Check the maps and derive the tables, ahead of any launch."""
        check_ids("expert_of_P", self.expert_of_P, 1)
        if self.slot_of_TK is not None:
            check_ids("slot_of_TK", self.slot_of_TK, 2)
            if self.slot_of_TK.device != self.expert_of_P.device:
                raise ValueError(
                    f"slot_of_TK must be on the device of expert_of_P, {self.expert_of_P.device}, "
                    f"got {self.slot_of_TK.device}"
                )
        experts = self.expert_of_P.tolist()
        low = min(experts, default=-1)
        if low < -1:
            raise ValueError(f"expert_of_P must hold expert ids or -1, got {low}")
        held = set(experts) - {-1}
        missing = next((e for e in range(max(held, default=0) + 1) if e not in held), None)
        if missing is not None:
            raise ValueError(
                f"expert_of_P must hold every expert, got no slot for expert {missing}"
            )
        object.__setattr__(self, "num_experts", len(held))
        object.__setattr__(self, "slots", make_slots(experts, self.expert_of_P.device))
        slot_TK = self.slot_of_TK
        slot_int32_TK = None if slot_TK is None else slot_TK.int().contiguous()
        object.__setattr__(self, "slot_int32_TK", slot_int32_TK)

    @property
    def num_slots(self) -> int:
        """P."""
        return len(self.expert_of_P)

    @property
    def max_copies(self) -> int:
        """V."""
        assert self.slots.slots_of_EV is not None
        return self.slots.slots_of_EV.shape[1]


def check_ids(name: str, ids: Tensor, ndim: int) -> None:
    """Raise ValueError unless ``ids`` is an integer tensor with ``ndim`` axes."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{name} must be an integer tensor, got {got}")
    if ids.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes, got shape {tuple(ids.shape)}")


def make_slots(experts: list[int], device: torch.device) -> Slots:
    """Derive the kernel's tables from the expert of each slot.

    Example: experts [1, 0, 1] give copy_of_P [0, 0, 1], copies_of_E [1, 2] and
    slots_of_EV [[1, -1], [0, 2]].
    """
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
