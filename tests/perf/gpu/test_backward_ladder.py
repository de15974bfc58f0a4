"""The rungs of the backward, rehearsed on the CPU: right ones pass, one wrong element is found."""

from pathlib import Path

import pytest

from perf.gpu.child import Context
from perf.gpu.training import ours, time_backward
from perf.suites.training import PREDICTED
from tests.gpu import backward_ladder, gradients
from tests.gpu.gradients import WEIGHTS, Way, compare_buffers, train
from tests.helpers.cases import SHAPES
from tests.helpers.inputs import SMALL, make_inputs


def context(folder: Path, fault: str = "") -> Context:
    """Return the context of a rehearsed step."""
    return Context(folder, folder, rehearse=True, fault=fault)


def test_a_layer_is_right_and_one_wrong_element_is_not(tmp_path: Path) -> None:
    done = backward_ladder.one_layer(context(tmp_path), "rows16", "64")
    assert done["text"].startswith("error at most ")
    with pytest.raises(AssertionError, match=r"rows16 experts\.down_EHI: error .*worst at"):
        backward_ladder.one_layer(context(tmp_path, "wrong"), "rows16", "64")


RUNGS = {
    "small_cases": ("1 layers, error at most", r"plain float32 experts\.down_EHI: error "),
    "same_bits": ("live = replay = saving nothing", r"replay, .*experts\.down_EHI differs"),
    "repeats": ("2 steps with equal bits", r"2 of 2 steps differ.*experts\.down_EHI': 1"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("rung", "texts"), RUNGS.items(), ids=RUNGS)
def test_a_rung_passes_and_sees_a_wrong_element(
    rung: str, texts: tuple[str, str], tmp_path: Path
) -> None:
    function = getattr(backward_ladder, rung)
    assert function(context(tmp_path))["text"].startswith(texts[0])
    with pytest.raises(AssertionError, match=texts[1]):
        function(context(tmp_path, "wrong"))


@pytest.mark.slow
def test_a_lost_signal_is_told_by_name(tmp_path: Path) -> None:
    assert "dH tasks" in backward_ladder.stall(context(tmp_path))["text"]


@pytest.fixture(scope="module")
def steps():
    """A plain step, and float32 buffers that were overwritten and added to."""
    inputs = make_inputs(SHAPES[0])
    ways = (Way(), Way(main_grad=True), Way(main_grad=True, adds=gradients.ADDED_TO))
    return [train(inputs, SMALL, way) for way in ways]


@pytest.mark.parametrize("place", [1, 2], ids=["overwritten", "added"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_buffer_that_is_off_in_one_place_is_seen(name: str, place: int, steps) -> None:
    plain, over, added = steps
    compare_buffers("layer", over, added, plain)
    value = steps[place].gradients[name].view(-1)[-1:]
    right = value.clone()
    value += 1
    try:
        with pytest.raises(AssertionError, match=f"layer (to|added to) float32: {name} differs"):
            compare_buffers("layer", over, added, plain)
    finally:
        value.copy_(right)


def test_buffers_are_full_of_nan_before_they_are_overwritten() -> None:
    experts = make_inputs(SHAPES[0]).experts
    assert gradients.make_buffers(experts, Way()) is None
    over = gradients.make_buffers(experts, Way(main_grad=True))
    assert over.down_EHI.isnan().all() and not over.grad_added_to_main_grad
    added = gradients.make_buffers(experts, Way(main_grad=True, adds=2.0))
    assert (added.down_EHI == 2).all() and added.grad_added_to_main_grad


def test_what_is_timed_can_be_predicted() -> None:
    assert {one.name for one in ours(SMALL)} <= set(PREDICTED)
    assert all(one.trains and one.is_ours for one in ours(SMALL))


@pytest.mark.slow
def test_a_backward_is_checked_then_timed(tmp_path: Path) -> None:
    done = time_backward(context(tmp_path), "Qwen3-30B-A3B", "8192")
    assert set(done["us"]) == {*(one.name for one in ours(SMALL)), "grouped_mm"}
    assert (tmp_path / "backward_tiny_8192.csv").exists()
