"""Row tables of a recorded routing: the same rows the launch would choose."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megakernel import KernelConfig, Placement, moe_routed, prepare_replay
from megakernel.config import INTERPRETER, ROWS64
from megakernel.launch.workspace import workspace_for
from megakernel.plan.buffers import flatten
from megakernel.replay import stable_rank
from tests.helpers.cases import SHAPES
from tests.helpers.compare import assert_same_bits
from tests.helpers.inputs import SMALL, make_inputs, run

NUM_EXPERTS = 5


@st.composite
def routings(draw: st.DrawFn) -> torch.Tensor:
    """Draw distinct ids per token, some of them -1."""
    token = st.permutations(range(NUM_EXPERTS)).map(lambda ids: ids[:3])
    ids = torch.tensor(draw(st.lists(token, min_size=1, max_size=40)))
    skipped = draw(st.lists(st.integers(0, ids.numel() - 1), max_size=4))
    ids.view(-1)[skipped] = -1
    return ids


PLACEMENTS = {
    "identity": None,
    "even": Placement(torch.tensor([4, 0, 1, -1, 2, 3, 0, 2, 0])),
}


def test_stable_rank_counts_earlier_members_of_the_class():
    assert stable_rank(torch.tensor([2, 0, 2, -1, 2, -1])).tolist() == [0, 0, 1, 0, 2, 1]


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
@given(routings())
def test_every_assignment_has_one_row_of_a_tile_of_its_expert(placement, ids_TK):
    replay = prepare_replay(ids_TK, NUM_EXPERTS, placement, SMALL)
    rows = replay.rows
    row_A, expert_A = rows.row_of_TK.flatten(), ids_TK.flatten()
    served_A = expert_A >= 0
    assert torch.equal(row_A < 0, ~served_A)
    assert max(Counter(row_A[served_A].tolist()).values(), default=1) == 1
    tile_A = row_A[served_A] // SMALL.block_rows
    assert torch.equal(rows.expert_of_tile[tile_A], expert_A[served_A].int())
    assert bool((row_A[served_A] % SMALL.block_rows < rows.rows_of_tile[tile_A]).all())
    assert torch.equal(rows.assignment_of_C[row_A[served_A]], served_A.nonzero().flatten().int())
    assert int(rows.rows_of_tile.sum()) == int(served_A.sum())
    assert replay.num_tiles == len(rows.rows_of_tile)
    assert bool((rows.rows_of_tile > 0).all())


@pytest.mark.parametrize("placement", ["identity", "even", "named"])
def test_rows_are_those_of_the_live_dispatch(placement):
    case = SHAPES[5]  # 13 experts
    inputs = make_inputs(case)
    generator = torch.Generator().manual_seed(3)
    ids_TK = torch.rand(case.T, case.E, generator=generator).argsort(1)[:, : case.K].contiguous()
    if placement != "identity":
        slots_TK = ids_TK.clone() if placement == "named" else None
        if slots_TK is not None:
            slots_TK[::2][slots_TK[::2] == 3] = case.E  # every other token takes the first copy
        placement = Placement(torch.tensor([*range(case.E), 3, 3, -1, 0]), slots_TK)
    else:
        placement = None
    gate_TK = torch.ones(case.T, case.K)
    workspace = workspace_for(inputs.x_TH.device)
    workspace.views.clear()
    moe_routed(inputs.x_TH, ids_TK, gate_TK, inputs.experts, placement=placement, config=SMALL)
    (live,) = workspace.views.values()
    replay = prepare_replay(ids_TK, case.E, placement, SMALL)
    assert int(live.scratch.num_tiles_1) == replay.num_tiles
    tiles = replay.num_tiles
    for name in ("expert_of_tile", "rows_of_tile"):
        table = getattr(live.rows, name)[:tiles]
        assert_same_bits(actual=table, expected=getattr(replay.rows, name))
    assert_same_bits(actual=live.rows.row_of_TK, expected=replay.rows.row_of_TK)
    filled = replay.rows.row_of_TK.flatten().long()
    assert_same_bits(
        actual=live.rows.assignment_of_C[filled], expected=replay.rows.assignment_of_C[filled]
    )


def test_named_slots_are_used():
    ids_TK = torch.tensor([[0, 1], [1, 0]])
    placement = Placement(torch.tensor([0, 1, 1]), torch.tensor([[0, 2], [1, 0]]))
    rows = prepare_replay(ids_TK, 2, placement, SMALL).rows
    assert (rows.row_of_TK // SMALL.block_rows).tolist() == [[0, 2], [1, 0]]


def test_without_a_config_a_replay_serves_any_height_and_sorts_once_for_each():
    inputs = make_inputs(SHAPES[0])
    live = run(inputs)
    replay = prepare_replay(live.expert_of_TK, inputs.case.E)
    for _ in range(2):
        assert_same_bits(actual=run(inputs, replay=replay).y_TH, expected=live.y_TH)
    assert list(replay.other_heights) == [SMALL.block_rows]
    with pytest.raises(ValueError, match=r"block_rows=16 as in config, got 32"):
        prepare_replay(live.expert_of_TK, inputs.case.E, config=INTERPRETER).of_height(16)


def test_the_experts_to_come_decide_the_default_height(monkeypatch):
    inputs = make_inputs(SHAPES[0])
    ids_TK = torch.arange(inputs.case.K).repeat(inputs.case.T, 1)
    monkeypatch.setattr("megakernel.api.default_config", lambda *_: ROWS64)
    assert prepare_replay(ids_TK, inputs.case.E, experts=inputs.experts).block_rows == 64
    assert prepare_replay(ids_TK, inputs.case.E).block_rows == INTERPRETER.block_rows


def test_the_default_height_is_that_of_the_default_config():
    replay = prepare_replay(torch.zeros(8, 1, dtype=torch.int64), 1)
    assert replay.block_rows == 32  # interpreted
    tall = prepare_replay(torch.zeros(8, 1, dtype=torch.int64), 1, config=KernelConfig())
    assert tall.block_rows == 128


def test_a_replay_may_hold_the_part_of_one_rank_and_no_more():
    """A rank has slots for some experts only; the ids it does not serve are -1."""
    inputs = make_inputs(SHAPES[0])
    live = run(inputs)
    part = Placement(torch.tensor([3, 1, -1]))
    own_TK = torch.where(
        torch.isin(live.expert_of_TK, torch.tensor([1, 3])), live.expert_of_TK, -1
    )
    E = inputs.case.E
    assert_same_bits(
        actual=run(inputs, replay=prepare_replay(own_TK, E, part, SMALL)).y_TH,
        expected=run(inputs, replay=prepare_replay(own_TK, E, None, SMALL)).y_TH,
    )
    with pytest.raises(
        ValueError, match=r"expert_of_TK\[\d+, \d\] must be -1 or an expert that a slot"
    ):
        prepare_replay(live.expert_of_TK, E, part, SMALL)


def test_an_equal_placement_is_as_good_as_the_one_the_replay_was_made_for():
    inputs = make_inputs(SHAPES[0])
    experts_P = torch.tensor([3, 2, 1, 0, 0])
    replay = prepare_replay(run(inputs).expert_of_TK, 4, Placement(experts_P), SMALL)
    out = run(inputs, replay=replay, placement=Placement(experts_P.clone()))
    assert_same_bits(actual=out.y_TH, expected=run(inputs).y_TH)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_tables_made_in_inference_mode_serve_autograd(placement):
    """A rollout may prepare what training replays, and training ask for another height later."""
    with torch.inference_mode():
        ids_TK = torch.arange(8, dtype=torch.int32).view(4, 2) % NUM_EXPERTS
        replay = prepare_replay(ids_TK, NUM_EXPERTS, PLACEMENTS[placement])
        taller = replay.of_height(64)
    for one in (replay, taller):
        kept = {"ids": one.expert_of_TK, "load": one.load_E, **flatten(one.rows)}
        assert [name for name, tensor in kept.items() if tensor.is_inference()] == []


@pytest.mark.parametrize("named", [False, True], ids=["copies take turns", "named copies"])
def test_a_backward_has_rows_by_expert_whatever_the_placement(named: bool):
    ids_TK = torch.tensor([[0, 2], [1, -1], [2, 0], [2, 1]])
    slots_TK = torch.tensor([[0, 3], [1, 0], [2, 0], [3, 1]]) if named else None
    placement = Placement(torch.tensor([0, 1, 2, 2]), slots_TK)
    plain = prepare_replay(ids_TK, 3, config=SMALL)
    placed = prepare_replay(ids_TK, 3, placement, SMALL)
    assert plain.by_expert() is plain
    assert placed.num_tiles > placed.by_expert().num_tiles == plain.num_tiles
    for own, expected in zip(placed.by_expert().rows, plain.rows, strict=True):
        assert torch.equal(own, expected)
    assert plain.rows.rows_of_E.tolist() == [2, 2, 3]
    assert plain.rows.first_row_of_E.tolist() == [0, 16, 32]
