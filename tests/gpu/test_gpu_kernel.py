"""On the device: right numbers on every case and on real layers, and the same bits always."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import reference
from megakernel import Experts, MoEOutput, Placement, Router, moe, moe_routed, prepare_replay
from megakernel.config import ROWS16, ROWS64, ROWS128
from tests.gpu.checks import (
    MOST_ERROR,
    MOST_ROW_ERROR,
    assert_gate_is_right,
    fitting,
    times_eager_error,
)
from tests.gpu.layers import (
    eager_rows,
    make_layer,
    spread_tokens,
    truth_of_tokens,
    worst_row_error,
)
from tests.helpers.cases import CASES, SHAPES, Case, name_of
from tests.helpers.compare import assert_same_bits, relative_error
from tests.helpers.inputs import SMALL, Inputs, eager, make_inputs, poison_scratch, run, truth

pytestmark = pytest.mark.gpu

QWEN = "Qwen3-30B-A3B"
PRIME = next(case for case in SHAPES if case.name == "prime-experts")


def per_token(out: MoEOutput) -> list[Tensor]:
    """Return the outputs that have a row for each token."""
    return [out.y_TH, out.expert_of_TK, out.gate_TK, out.logits_TE]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_case_of_the_interpreter(case: Case, device: torch.device) -> None:
    inputs = make_inputs(case, device)
    out = run(inputs)
    assert_gate_is_right(inputs, out)
    expected_TH = truth(inputs, out.expert_of_TK)
    error = relative_error(actual=out.y_TH, expected=expected_TH)
    eager_error = relative_error(
        actual=eager(inputs, out.expert_of_TK.long()), expected=expected_TH
    )
    most = times_eager_error(case.dtype, device) * eager_error + torch.finfo(case.dtype).eps
    assert error <= most
    assert error <= MOST_ERROR[case.dtype]


SLOW = pytest.mark.slow  # together with the others, for their compilations
REAL = [
    pytest.param(QWEN, 4096, id="Qwen3-30B-A3B: most tasks per byte of weight"),
    pytest.param("gpt-oss-120b", 4096, id="gpt-oss-120b: 2880 is no multiple of a tile"),
    pytest.param("DeepSeek-V3 routed", 4096, id="DeepSeek-V3: 11e9 weights pass 2^31 elements"),
    pytest.param("Mixtral-8x7B", 4096, id="Mixtral-8x7B: few wide experts", marks=SLOW),
    pytest.param("Qwen3-235B-A22B", 4096, id="Qwen3-235B-A22B", marks=SLOW),
    pytest.param("OLMoE", 4096, id="OLMoE", marks=SLOW),
    pytest.param("JoyAI-LLM Flash", 4096, id="JoyAI-LLM Flash", marks=SLOW),
    pytest.param(QWEN, 5, id="Qwen3-30B-A3B decode"),
    pytest.param("gpt-oss-120b", 5, id="gpt-oss-120b decode"),
    pytest.param("DeepSeek-V3 routed", 1, id="DeepSeek-V3 decode of one token"),
]


@pytest.mark.parametrize(("name", "num_tokens"), REAL)
def test_real_layers(name: str, num_tokens: int, device: torch.device) -> None:
    inputs = make_layer(name, num_tokens, device)
    poison_scratch()
    out = moe(inputs.x_TH, inputs.router_EH, inputs.experts, inputs.router)
    assert_gate_is_right(inputs, out)
    eager_TH = eager_rows(inputs, out)
    assert worst_row_error(actual=out.y_TH, expected=eager_TH) < MOST_ROW_ERROR
    tokens = spread_tokens(len(out.y_TH), 8, device)
    true_TH = truth_of_tokens(inputs, out, tokens)
    error = relative_error(actual=out.y_TH[tokens], expected=true_TH)
    assert error <= relative_error(actual=eager_TH[tokens], expected=true_TH) + 1e-3
    assert error <= MOST_ERROR[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_real_layer_in_other_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    inputs = make_layer(QWEN, 64, device, dtype)
    poison_scratch()
    out = moe(inputs.x_TH, inputs.router_EH, inputs.experts, inputs.router)
    assert_gate_is_right(inputs, out)
    tokens = spread_tokens(len(out.y_TH), 16, device)
    true_TH = truth_of_tokens(inputs, out, tokens)
    assert relative_error(actual=out.y_TH[tokens], expected=true_TH) <= MOST_ERROR[dtype]


def test_small_integers_come_out_exactly(device: torch.device) -> None:
    """Tokens and weights in {-1, 0, 1}: nothing to round, so nothing may differ."""
    T, K, E, H, I = 200, 2, 4, 64, 32
    x_TH = torch.randint(-1, 2, (T, H)).float()
    up_EIH, down_EHI = torch.randint(-1, 2, (E, I, H)), torch.randint(-1, 2, (E, H, I)).float()
    # Gate rows of 32 · x[0] with x[0] = 1: silu(32) is 32 in float32.
    gate_EIH = torch.zeros(E, I, H)
    x_TH[:, 0], gate_EIH[:, :, 0] = 1.0, 32.0
    gate_up_E2IH = torch.cat([gate_EIH, up_EIH.float()], 1)
    ids_TK = torch.rand(T, E).argsort(1)[:, :K].contiguous()
    gate_TK = torch.tensor([[0.5, 0.25]]).repeat(T, 1)
    expected_TH = reference.moe_by_token(x_TH, ids_TK, gate_TK, gate_up_E2IH, down_EHI)
    experts = Experts(gate_up_E2IH.to(device), down_EHI.to(device))
    y_TH = moe_routed(
        x_TH.to(device), ids_TK.to(device), gate_TK.to(device), experts, config=SMALL
    )
    assert torch.equal(y_TH.cpu().double(), expected_TH.round(decimals=3))


def test_weights_over_all_experts(device: torch.device) -> None:
    inputs = make_inputs(PRIME, device)
    out = run(inputs, router=Router(PRIME.K, renormalize=False))
    gate_TK = reference.weigh(out.logits_TE.double(), out.expert_of_TK, False)
    assert (out.gate_TK - gate_TK).abs().max() < 2e-6
    expected_TH = truth(inputs, out.expert_of_TK, renormalize=False)
    assert relative_error(actual=out.y_TH, expected=expected_TH) < MOST_ERROR[torch.float32]


def test_one_expert_takes_all_tokens_of_a_replay(device: torch.device) -> None:
    inputs = make_layer(QWEN, 4096, device)
    ids_TK = torch.arange(inputs.case.K, device=device).repeat(len(inputs.x_TH), 1)
    replay = prepare_replay(ids_TK, inputs.case.E, config=ROWS64)
    poison_scratch()
    out = moe(
        inputs.x_TH, inputs.router_EH, inputs.experts, inputs.router, replay=replay, config=ROWS64
    )
    assert torch.equal(out.expert_of_TK, ids_TK.int())
    assert worst_row_error(actual=out.y_TH, expected=eager_rows(inputs, out)) < MOST_ROW_ERROR


def test_bits_do_not_depend_on_the_number_of_workers(device: torch.device) -> None:
    inputs = make_layer(QWEN, 96, device)
    expected = run(inputs, config=ROWS16)
    # Fewer than multiprocessors, as many, two each, an odd number, more than fit.
    for num_workers in (1, 7, 40, 132, 264, 301, 1056):
        actual = run(inputs, config=replace(ROWS16, num_workers=num_workers))
        for got, want in zip(actual, expected, strict=True):
            assert_same_bits(actual=got, expected=want)


def test_bits_do_not_depend_on_placement_split_or_replay(device: torch.device) -> None:
    inputs = make_layer(QWEN, 512, device)
    E = inputs.case.E
    live = run(inputs, config=ROWS64)
    experts = torch.cat([torch.randperm(E), torch.tensor([-1, 0, 0, 3, 5, 0, E - 1])])
    even = Placement(experts.to(device))
    last_slot_of_E = torch.empty(E, dtype=torch.int64, device=device)
    for slot, expert in enumerate(experts.tolist()):
        if expert >= 0:
            last_slot_of_E[expert] = slot
    named = Placement(even.expert_of_P, last_slot_of_E[live.expert_of_TK.long()])
    given = inputs.x_TH, live.expert_of_TK, live.gate_TK, inputs.experts
    long_ids = inputs.x_TH, live.expert_of_TK.long(), live.gate_TK, inputs.experts
    calls: dict[str, Callable[[], Tensor]] = {
        "even split": lambda: run(inputs, placement=even, config=ROWS64).y_TH,
        "named slots": lambda: run(inputs, placement=named, config=ROWS64).y_TH,
        "given": lambda: moe_routed(*given, config=ROWS64),
        "given int64, named": lambda: moe_routed(*long_ids, placement=named, config=ROWS64),
    }
    for name, plan in (("none", None), ("even", even), ("named", named)):
        replay = prepare_replay(live.expert_of_TK, E, plan, ROWS64)
        calls[f"replay {name}"] = lambda replay=replay: (
            run(inputs, replay=replay, config=ROWS64).y_TH
        )
    for call in calls.values():
        poison_scratch()
        assert_same_bits(actual=call(), expected=live.y_TH)


def test_bits_do_not_depend_on_the_other_tokens(device: torch.device) -> None:
    inputs = make_layer(QWEN, 4096, device)
    config = fitting(ROWS128)
    whole = run(inputs, config=config)
    T = len(inputs.x_TH)
    for tokens in (slice(0, 1), slice(T // 41, T // 3), slice(T - 1, T)):
        part = Inputs(inputs.case, inputs.x_TH[tokens], inputs.router_EH, inputs.experts)
        for got, want in zip(per_token(run(part, config=config)), per_token(whole), strict=True):
            assert_same_bits(actual=got, expected=want[tokens])


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_bad_token_touches_no_other(value: float, device: torch.device) -> None:
    inputs = make_layer(QWEN, 96, device)
    clean = run(inputs, config=ROWS16)
    dirty_TH = inputs.x_TH.clone()
    dirty_TH[1], dirty_TH[4, 3] = value, value
    dirty = run(Inputs(inputs.case, dirty_TH, inputs.router_EH, inputs.experts), config=ROWS16)
    others = torch.ones(len(dirty_TH), dtype=torch.bool, device=device)
    others[[1, 4]] = False
    for got, want in zip(per_token(dirty), per_token(clean), strict=True):
        assert_same_bits(actual=got[others], expected=want[others])
    assert not dirty.y_TH[1].isfinite().any()
    assert dirty.expert_of_TK[1].unique().numel() == inputs.case.K


@pytest.mark.parametrize(
    ("num_tokens", "config"), [(64, ROWS16), (4096, ROWS128)], ids=["decode", "training"]
)
def test_a_thousand_runs_give_the_same_bits(num_tokens: int, config, device: torch.device) -> None:
    """Scratch is NaN before each, so a read that comes too early can not find the right value."""
    inputs, config = make_layer(QWEN, num_tokens, device), fitting(config)
    first = run(inputs, config=config)
    repeats = 1000 if device.type == "cuda" else 2
    differs = torch.zeros((), dtype=torch.bool, device=device)
    for _ in range(repeats):
        out = run(inputs, config=config)
        differs |= (out.y_TH.view(torch.int16) != first.y_TH.view(torch.int16)).any()
        differs |= (out.expert_of_TK != first.expert_of_TK).any()
        differs |= (out.gate_TK != first.gate_TK).any()
    assert not bool(differs)
