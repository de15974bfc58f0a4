"""Checks of what integer maps hold: ids and slots. They look at values, and so synchronise."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_distinct_ids(expert_of_TK: Tensor, num_experts: int) -> None:
    """Raise ValueError on an id outside [-1, E) or one that a token holds twice."""
    bad_TK = (expert_of_TK < -1) | (expert_of_TK >= num_experts)
    refuse(bad_TK, expert_of_TK, f"must be -1 or in [0, {num_experts})", "expert_of_TK")
    ordered_TK = expert_of_TK.sort(dim=1).values
    twice_T = ((ordered_TK[:, 1:] == ordered_TK[:, :-1]) & (ordered_TK[:, 1:] >= 0)).any(1)
    if bool(twice_T.any()):
        token = int(twice_T.nonzero()[0])
        raise ValueError(
            f"expert_of_TK[{token}] must not hold an id twice, got {expert_of_TK[token].tolist()}"
        )


def check_held(expert_of_TK: Tensor, missing: Sequence[int]) -> None:
    """Raise ValueError on an id among the ``missing`` experts, which no slot holds."""
    if missing:
        bad_TK = torch.isin(expert_of_TK, torch.tensor(missing).to(expert_of_TK))
        refuse(bad_TK, expert_of_TK, "must be -1 or an expert that a slot holds", "expert_of_TK")


def check_slots(expert_of_TK: Tensor, slot_of_TK: Tensor, expert_of_P: Tensor) -> None:
    """Raise ValueError on a slot that does not hold the chosen expert."""
    num_slots = len(expert_of_P)
    in_range_TK = (slot_of_TK >= 0) & (slot_of_TK < num_slots)
    held_TK = expert_of_P[slot_of_TK.clamp(0, num_slots - 1).long()]
    bad_TK = (expert_of_TK >= 0) & (~in_range_TK | (held_TK != expert_of_TK))
    refuse(bad_TK, slot_of_TK, "must be a slot that holds the chosen expert", "slot_of_TK")


def check_known_experts(num_held: int, num_experts: int) -> None:
    """Raise ValueError on a slot that holds an expert the layer does not have."""
    if num_held > num_experts:
        raise ValueError(f"expert_of_P must hold ids in [0, {num_experts}), got {num_held - 1}")


def check_all_experts(missing: Sequence[int], num_experts: int) -> None:
    """Raise ValueError if no slot holds some expert, where any may be chosen."""
    if missing:
        raise ValueError(
            f"expert_of_P must hold all {num_experts} experts unless a replay forces the ids, "
            f"got no slot for expert {missing[0]}"
        )


def check_slot_shape(slot_of_TK: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless slot_of_TK names a slot for each choice."""
    if tuple(slot_of_TK.shape) != shape:
        raise ValueError(f"slot_of_TK must have shape {shape}, got {tuple(slot_of_TK.shape)}")


def refuse(bad_TK: Tensor, values_TK: Tensor, rule: str, name: str) -> None:
    """Raise ValueError with the place and value of the first bad entry, if there is one."""
    if bool(bad_TK.any()):
        token, choice = bad_TK.nonzero()[0].tolist()
        value = int(values_TK[token, choice])
        raise ValueError(f"{name}[{token}, {choice}] {rule}, got {value}")
