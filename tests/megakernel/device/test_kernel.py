"""What the launch computes: right numbers, and the same bits whatever the plan."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from megakernel import Experts, Placement, Router, moe_routed, prepare_replay
from megakernel.config import INTERPRETER
from megakernel.launch.workspace import workspace_for
from tests.helpers.cases import CASES, DTYPES, SHAPES, Case, name_of
from tests.helpers.compare import assert_same_bits, relative_error
from tests.helpers.inputs import SMALL, Inputs, eager, make_inputs, run, truth

PRIME = next(case for case in SHAPES if case.name == "prime-experts")
BFLOAT16 = DTYPES[0]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_live_layer_is_no_worse_than_eager_against_float64(case):
    inputs = make_inputs(case)
    out = run(inputs)
    expected = truth(inputs, out.expert_of_TK)
    error = relative_error(actual=out.y_TH, expected=expected)
    eager_error = relative_error(actual=eager(inputs, out.expert_of_TK.long()), expected=expected)
    floor = torch.finfo(case.dtype).eps
    assert error <= eager_error + floor
    assert error <= {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[case.dtype]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gate_chooses_and_weighs_as_the_reference_does_on_the_same_logits(case):
    inputs = make_inputs(case)
    out = run(inputs)
    expected_TE = inputs.x_TH.double() @ inputs.router_EH.double().T
    assert (out.logits_TE - expected_TE).abs().max() <= 2e-6 * expected_TE.abs().max()
    chosen_TK = reference.select(out.logits_TE, case.K)
    assert torch.equal(out.expert_of_TK, chosen_TK.int())
    gate_TK = reference.weigh(out.logits_TE.double(), chosen_TK, True)
    assert (out.gate_TK - gate_TK).abs().max() < 1e-6


@pytest.mark.parametrize("renormalize", [True, False])
def test_weights_sum_to_one_only_when_renormalised(renormalize):
    inputs = make_inputs(PRIME)
    out = run(inputs, router=Router(PRIME.K, renormalize=renormalize))
    gate_TK = reference.weigh(out.logits_TE.double(), out.expert_of_TK, renormalize)
    assert (out.gate_TK - gate_TK).abs().max() < 1e-6
    assert bool((out.gate_TK.sum(1) < 0.999).any()) is not renormalize
    expected = truth(inputs, out.expert_of_TK, renormalize)
    assert relative_error(actual=out.y_TH, expected=expected) < 1e-6


def test_small_integers_come_out_exactly():
    """Weights and tokens in {-1, 0, 1} and gates of powers of two leave nothing to round."""
    generator = torch.Generator().manual_seed(1)
    T, K, E, H, I = 20, 2, 4, 32, 16
    x_TH = torch.randint(-1, 2, (T, H), generator=generator).float()
    up_EIH = torch.randint(-1, 2, (E, I, H), generator=generator).float()
    down_EHI = torch.randint(-1, 2, (E, H, I), generator=generator).float()
    # A gate row of 32 · x[0] with x[0] = 1 makes silu(32) = 32 in float32.
    gate_EIH = torch.zeros(E, I, H)
    x_TH[:, 0], gate_EIH[:, :, 0] = 1.0, 32.0
    experts = Experts(torch.cat([gate_EIH, up_EIH], 1), down_EHI)
    ids_TK = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    gate_TK = torch.tensor([0.5, 0.25]).repeat(T, 1)
    y_TH = moe_routed(x_TH, ids_TK, gate_TK, experts, config=SMALL)
    expected = reference.moe_by_token(x_TH, ids_TK, gate_TK, experts.gate_up_E2IH, down_EHI)
    assert torch.equal(y_TH.double(), expected.round(decimals=3))


def replicas_of(inputs: Inputs, extra: list[int]) -> Placement:
    """Reverse the experts, add copies and an empty slot."""
    E = inputs.case.E
    return Placement(torch.tensor([*reversed(range(E)), -1, *extra]))


@pytest.mark.parametrize("num_workers", [1, 2, 7, 40])
def test_bits_do_not_depend_on_the_number_of_workers(num_workers):
    inputs = make_inputs(BFLOAT16)
    expected = run(inputs, config=replace(SMALL, num_workers=3))
    actual = run(inputs, config=replace(SMALL, num_workers=num_workers))
    for got, want in zip(actual, expected, strict=True):
        assert_same_bits(actual=got, expected=want)


@pytest.mark.parametrize(
    "change",
    [
        {"column_groups": 1},
        {"column_groups": 5, "tile_group": 1, "num_stages": 1},
        {"blocks_per_task": 1},
        {"blocks_per_task": 3, "least_tasks": 1, "column_groups": 2},
        {"blocks_per_task": 9, "least_tasks": 1, "column_groups": 1},
        {"half_tails": False},
        {"look_ahead": False, "cache_hints": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", [PRIME, BFLOAT16], ids=name_of)
def test_bits_do_not_depend_on_how_the_same_sums_are_dealt_to_tasks(case, change):
    inputs = make_inputs(case)
    expected = run(inputs, config=replace(SMALL, blocks_per_task=1, half_tails=False))
    actual = run(inputs, config=replace(SMALL, **change))
    assert_same_bits(actual=actual.y_TH, expected=expected.y_TH)


@pytest.mark.parametrize(
    "case", [pytest.param(PRIME, marks=pytest.mark.slow), BFLOAT16], ids=name_of
)
def test_bits_do_not_depend_on_placement_split_or_replay(case):
    inputs = make_inputs(case)
    live = run(inputs)
    placement = replicas_of(inputs, [0, 0, 3, 5, 0])
    last_slot_TK = torch.stack(
        [(placement.expert_of_P == e).nonzero()[-1, 0] for e in live.expert_of_TK.flatten()]
    ).view_as(live.expert_of_TK)
    named = Placement(placement.expert_of_P, last_slot_TK)
    ids_TK, gate_TK = live.expert_of_TK, live.gate_TK
    outputs = {
        "even split": run(inputs, placement=placement).y_TH,
        "named slots": run(inputs, placement=named).y_TH,
        "given": moe_routed(inputs.x_TH, ids_TK, gate_TK, inputs.experts, config=SMALL),
        "given, int64, named slots": moe_routed(
            inputs.x_TH, ids_TK.long(), gate_TK, inputs.experts, placement=named, config=SMALL
        ),
    }
    for name, plan in (("none", None), ("even", placement), ("named", named)):
        replay = prepare_replay(ids_TK, case.E, plan, SMALL)
        replayed = run(inputs, replay=replay, placement=plan)
        assert_same_bits(actual=replayed.gate_TK, expected=gate_TK)
        outputs[f"replay, {name}"] = replayed.y_TH
    for y_TH in outputs.values():
        assert_same_bits(actual=y_TH, expected=live.y_TH)


@settings(max_examples=8)
@given(st.data())
def test_no_plan_changes_the_bits(data):
    inputs = make_inputs(PRIME)
    extra = data.draw(st.lists(st.integers(-1, PRIME.E - 1), max_size=8))
    slots = data.draw(st.permutations([*range(PRIME.E), *extra]))
    ids_TK = torch.from_numpy(np.array([[1, 2, 3], [4, 0, 12]])).repeat(25, 1)
    candidates = [[p for p, e in enumerate(slots) if e == i] for i in ids_TK.flatten().tolist()]
    chosen = [data.draw(st.sampled_from(slots_of)) for slots_of in candidates]
    slot_TK = torch.tensor(chosen).view_as(ids_TK)
    gate_TK = torch.full(ids_TK.shape, 0.25)
    expected = moe_routed(inputs.x_TH, ids_TK, gate_TK, inputs.experts, config=SMALL)
    plan = Placement(torch.tensor(slots), slot_TK)
    actual = moe_routed(inputs.x_TH, ids_TK, gate_TK, inputs.experts, placement=plan, config=SMALL)
    assert_same_bits(actual=actual, expected=expected)


def test_bits_do_not_depend_on_the_other_tokens_of_the_call():
    inputs = make_inputs(BFLOAT16)
    whole = run(inputs)
    for tokens in (slice(0, 1), slice(7, 30), slice(39, 40)):
        part = Inputs(inputs.case, inputs.x_TH[tokens], inputs.router_EH, inputs.experts)
        out = run(part)
        for got, want in zip(out[:4], whole[:4], strict=True):
            assert_same_bits(actual=got, expected=want[tokens])


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_bad_token_touches_no_other_token(value):
    inputs = make_inputs(BFLOAT16)
    clean = run(inputs)
    dirty_TH = inputs.x_TH.clone()
    dirty_TH[5], dirty_TH[20, 3] = value, value
    dirty = run(Inputs(inputs.case, dirty_TH, inputs.router_EH, inputs.experts))
    others = torch.ones(len(dirty_TH), dtype=torch.bool)
    others[[5, 20]] = False
    for got, want in zip(dirty[:4], clean[:4], strict=True):
        assert_same_bits(actual=got[others], expected=want[others])
    assert not dirty.y_TH[5].isfinite().any()
    assert dirty.expert_of_TK[5].unique().numel() == inputs.case.K


def test_ties_go_to_the_lower_expert_id():
    inputs = make_inputs(PRIME)
    flat = Inputs(inputs.case, inputs.x_TH, torch.zeros_like(inputs.router_EH), inputs.experts)
    assert torch.equal(run(flat).expert_of_TK, torch.arange(3).int().repeat(PRIME.T, 1))


def test_replay_forces_ids_and_keeps_weights_live():
    inputs = make_inputs(PRIME)
    forced_TK = torch.arange(PRIME.T * 3).view(PRIME.T, 3) % PRIME.E
    out = run(inputs, replay=prepare_replay(forced_TK, PRIME.E, None, SMALL))
    gate_TK = reference.weigh(out.logits_TE.double(), forced_TK, True)
    assert (out.gate_TK - gate_TK).abs().max() < 1e-6
    assert relative_error(actual=out.y_TH, expected=truth(inputs, forced_TK)) < 1e-6


def test_id_minus_one_is_skipped_and_a_token_without_experts_is_zero():
    inputs = make_inputs(PRIME)
    ids_TK = run(inputs).expert_of_TK.clone()
    ids_TK[3] = -1
    ids_TK[4, 1] = -1
    gate_TK = torch.full(ids_TK.shape, 0.5)
    given_TH = moe_routed(inputs.x_TH, ids_TK, gate_TK, inputs.experts, config=SMALL)
    expected = reference.moe_by_token(
        inputs.x_TH, ids_TK, gate_TK, inputs.experts.gate_up_E2IH, inputs.experts.down_EHI
    )
    assert relative_error(actual=given_TH, expected=expected) < 1e-6
    assert torch.equal(given_TH[3], torch.zeros(PRIME.H))
    replayed = run(inputs, replay=prepare_replay(ids_TK, PRIME.E, None, SMALL))
    assert torch.equal(replayed.y_TH[3], torch.zeros(PRIME.H))
    assert torch.equal(replayed.gate_TK[3], torch.zeros(3))
    assert relative_error(actual=replayed.y_TH, expected=truth(inputs, ids_TK)) < 1e-6


@pytest.mark.parametrize("route", ["live", "given", "replay"])
def test_no_tokens_give_no_output(route):
    case = Case("empty", 0, 2, 4, 32, 16, "T = 0")
    inputs = make_inputs(case)
    none_TK = torch.empty(0, 2, dtype=torch.int32)
    if route == "given":
        y_TH = moe_routed(inputs.x_TH, none_TK, torch.empty(0, 2), inputs.experts)
    else:
        replay = prepare_replay(none_TK, 4) if route == "replay" else None
        y_TH = run(inputs, replay=replay, config=None).y_TH
    assert y_TH.shape == (0, 32)


def test_a_replay_in_which_nobody_is_served_gives_zeros():
    inputs = make_inputs(PRIME)
    nobody_TK = torch.full((PRIME.T, 3), -1)
    out = run(inputs, replay=prepare_replay(nobody_TK, PRIME.E, None, SMALL))
    assert torch.equal(out.y_TH, torch.zeros_like(inputs.x_TH))


def test_counters_are_zero_after_every_launch():
    inputs = make_inputs(PRIME)
    for num_workers in (1, 7):
        run(inputs, config=replace(SMALL, num_workers=num_workers))
        control = workspace_for(inputs.x_TH.device).control
        assert int(control.counters.count_nonzero()) == 0
        assert int(control.error.count_nonzero()) == 0


def test_default_config_computes_the_same_numbers():
    inputs = make_inputs(PRIME)
    out = run(inputs, config=None)
    assert relative_error(actual=out.y_TH, expected=truth(inputs, out.expert_of_TK)) < 1e-6
    fewer = replace(INTERPRETER, num_workers=2)
    assert_same_bits(actual=out.y_TH, expected=run(inputs, config=fewer).y_TH)
