"""Placements: the tables the kernel reads, and what is refused on construction."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megakernel import Placement
from megakernel.plan.buffers import flatten


def test_tables_of_a_small_example():
    placement = Placement(torch.tensor([1, 0, -1, 1]))
    slots = placement.slots
    assert placement.num_experts == 2
    assert placement.max_copies == 2
    assert slots.expert_of_P.tolist() == [1, 0, -1, 1]
    assert slots.copy_of_P.tolist() == [0, 0, 0, 1]
    assert slots.copies_of_E.tolist() == [1, 2]
    assert slots.slots_of_EV.tolist() == [[1, -1], [0, 3]]


@given(st.integers(1, 6), st.lists(st.integers(-1, 5), max_size=9), st.randoms())
def test_tables_are_inverse_to_each_other(num_experts, extra, rng):
    experts = [*range(num_experts), *(e for e in extra if e < num_experts)]
    rng.shuffle(experts)
    slots = Placement(torch.tensor(experts)).slots
    for slot, expert in enumerate(experts):
        if expert >= 0:
            assert slots.slots_of_EV[expert, slots.copy_of_P[slot]] == slot
    assert slots.copies_of_E.tolist() == [experts.count(e) for e in range(num_experts)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor([0.0]),), "expert_of_P must be an integer tensor, got torch.float32"),
        (([0, 1],), "expert_of_P must be an integer tensor, got list"),
        ((torch.tensor([[0]]),), r"expert_of_P must have 1 axes, got shape \(1, 1\)"),
        ((torch.tensor([-1, -1]),), r"expert_of_P must hold an expert, got \[-1, -1\]"),
        ((torch.tensor([], dtype=torch.int64),), r"expert_of_P must hold an expert, got \[\]"),
        ((torch.tensor([0]), torch.tensor([0])), "slot_of_TK must have 2 axes"),
        ((torch.tensor([0]), torch.empty(1, 1, dtype=torch.int32, device="meta")), "meta"),
    ],
    ids=["float", "list", "two axes", "all empty", "no slots", "slots of one axis", "device"],
)
def test_maps_that_make_no_placement_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Placement(*arguments)


def test_arrays_and_tensors_make_equal_placements():
    experts, slots_TK = np.array([1, 0, 1]), np.array([[0, 1]], dtype=np.int16)
    from_arrays = Placement(experts, slots_TK)
    from_tensors = Placement(torch.from_numpy(experts).int(), torch.from_numpy(slots_TK).long())
    assert from_arrays == from_tensors and hash(from_arrays) == hash(from_tensors)
    assert isinstance(from_arrays.expert_of_P, torch.Tensor)


@pytest.mark.parametrize(
    "other",
    [
        Placement(torch.tensor([0, 1, 1]), torch.tensor([[0, 1]])),
        Placement(torch.tensor([1, 0, 1]), torch.tensor([[2, 1]])),
        Placement(torch.tensor([1, 0, 1])),
        None,
    ],
    ids=["another order", "another slot", "no named slots", "no placement"],
)
def test_other_maps_make_another_placement(other):
    assert Placement(torch.tensor([1, 0, 1]), torch.tensor([[0, 1]])) != other


def test_a_frozen_array_is_copied_and_later_changes_are_not_seen():
    experts = np.array([0, 1])
    placement = Placement(experts)
    experts[:] = 7
    assert placement.expert_of_P.tolist() == [0, 1]


def test_a_ranks_part_of_a_plan_says_which_experts_it_lacks():
    part = Placement(torch.tensor([5, 2, -1]))
    assert part.num_experts == 6
    assert part.missing_of(7) == [0, 1, 3, 4, 6]
    assert part.slots.copies_of_E.tolist() == [0, 0, 1, 0, 0, 1]


class Plan:
    """As much of a plan as a placement is made from."""

    def expert_of_P(self, micro_batch: int, layer: int) -> np.ndarray:
        return np.array([1, 0, 1])

    def slot_of_TK(self, micro_batch: int, layer: int) -> np.ndarray:
        return np.array([[0, 1]], dtype=np.int32)


def test_what_is_kept_of_maps_made_in_inference_mode_serves_autograd():
    with torch.inference_mode():
        experts_P, slots_TK = torch.tensor([1, 0, 1]), torch.tensor([[0, 1]], dtype=torch.int32)
        placements = [
            Placement(experts_P, slots_TK),
            Placement(experts_P.numpy(), slots_TK.numpy()),
            Placement.from_plan(Plan(), 0, 0),
        ]
    for placement in placements:
        kept = {"named": placement.slot_int32_TK, **flatten(placement.slots)}
        assert [name for name, tensor in kept.items() if tensor.is_inference()] == []
    assert not any(one.expert_of_P.is_inference() for one in placements[1:])
