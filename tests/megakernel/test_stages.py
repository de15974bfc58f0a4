"""Rows in, rows out, and the combine of rows: launches of their own with the layer's bits."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch

from megakernel import Placement, moe, moe_routed, prepare_replay
from megakernel.config import ROWS128
from megakernel.experts import SharedExpert
from megakernel.launch.op import launch_op
from megakernel.launch.workspace import workspace_for
from megakernel.plan.forward import STAGES, outputs_of
from megakernel.stages import combine_rows, ffn_rows
from megakernel.tools.compile_cases import CompileCase
from megakernel.tools.compile_check import _interpreter_off, compile_case
from megakernel.tools.models import MODELS
from tests.helpers.cases import DTYPES, SHAPES, Case, name_of
from tests.helpers.compare import assert_refused, assert_same_bits
from tests.helpers.inputs import SMALL, make_inputs, poison_scratch

CASE = SHAPES[0]  # 40 tokens, K = 2, 4 experts
CASES = [CASE, SHAPES[7], *DTYPES]
PLACEMENTS = {
    "identity": lambda case: None,
    "even": lambda case: Placement(torch.tensor([*range(case.E), -1, 0, 2, 0]).flip(0)),
}


def draw_routing(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids, some -1, and weights."""
    ids_TK = torch.rand(case.T, case.E).argsort(1)[:, : case.K].int()
    ids_TK[torch.rand(case.T, case.K) < 0.2] = -1
    return ids_TK, torch.rand(case.T, case.K)


@pytest.mark.parametrize("place", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_two_stages_have_the_bits_of_the_layer(case, place):
    inputs, (ids_TK, gate_TK) = make_inputs(case), draw_routing(case)
    x_TH, experts, placement = inputs.x_TH, inputs.experts, place(case)
    replay = prepare_replay(ids_TK, case.E, placement, SMALL)
    poison_scratch()
    y_CH = ffn_rows(x_TH, replay, experts, SMALL)
    assert y_CH.shape == (replay.num_tiles * SMALL.block_rows, case.H) and y_CH.dtype == case.dtype
    y_TH = combine_rows(y_CH, replay.rows.row_of_TK, gate_TK, SMALL)
    routed = moe_routed(x_TH, ids_TK, gate_TK, experts, placement=placement, config=SMALL)
    assert_same_bits(actual=y_TH, expected=routed)
    whole = moe(x_TH, inputs.router_EH, experts, inputs.router, replay=replay, config=SMALL)
    y_TH = combine_rows(y_CH, replay.rows.row_of_TK, whole.gate_TK, SMALL)
    assert_same_bits(actual=y_TH, expected=whole.y_TH)


def test_rows_may_lie_elsewhere_and_may_be_named_in_another_order():
    inputs, (ids_TK, gate_TK) = make_inputs(CASE), draw_routing(CASE)
    replay = prepare_replay(ids_TK, CASE.E, None, SMALL)
    y_CH = ffn_rows(inputs.x_TH, replay, inputs.experts, SMALL)
    row_TK = replay.rows.row_of_TK.long()
    at_home = combine_rows(y_CH, row_TK, gate_TK, SMALL)
    used_A = row_TK[row_TK >= 0]
    home_of_C = torch.full((len(y_CH),), -1)
    home_of_C[used_A] = torch.arange(len(used_A)).flip(0)
    moved_CH = torch.empty(len(used_A), CASE.H)
    moved_CH[home_of_C[used_A]] = y_CH[used_A]
    moved_TK = torch.where(row_TK >= 0, home_of_C[row_TK], -1)
    assert_same_bits(actual=combine_rows(moved_CH, moved_TK, gate_TK, SMALL), expected=at_home)


def test_the_default_config_has_the_height_of_the_replay():
    inputs, (ids_TK, gate_TK) = make_inputs(CASE), draw_routing(CASE)
    replay = prepare_replay(ids_TK, CASE.E)
    y_CH = ffn_rows(inputs.x_TH, replay, inputs.experts)
    y_TH = combine_rows(y_CH, replay.rows.row_of_TK, gate_TK)
    routed = moe_routed(inputs.x_TH, ids_TK, gate_TK, inputs.experts)
    assert_same_bits(actual=y_TH, expected=routed)
    fixed = prepare_replay(ids_TK, CASE.E, None, SMALL)
    assert len(ffn_rows(inputs.x_TH, fixed, inputs.experts)) == fixed.num_tiles * 16


def test_nothing_to_do_is_no_launch_or_zeros():
    inputs = make_inputs(CASE)
    workspace_for(inputs.x_TH.device).reset()
    none = prepare_replay(torch.full((CASE.T, CASE.K), -1), CASE.E, None, SMALL)
    y_CH = ffn_rows(inputs.x_TH, none, inputs.experts, SMALL)
    assert y_CH.shape == (0, CASE.H)
    empty_TK = torch.empty(0, CASE.K, dtype=torch.int32)
    assert combine_rows(y_CH, empty_TK, torch.empty(0, CASE.K), SMALL).shape == (0, CASE.H)
    assert workspace_for(inputs.x_TH.device).latest is None
    y_TH = combine_rows(y_CH, none.rows.row_of_TK, torch.ones(CASE.T, CASE.K), SMALL)
    assert_same_bits(actual=y_TH, expected=torch.zeros(CASE.T, CASE.H))


def test_the_registered_op_knows_what_each_stage_writes(monkeypatch):
    inputs, (ids_TK, gate_TK) = make_inputs(CASE), draw_routing(CASE)
    replay = prepare_replay(ids_TK, CASE.E, None, SMALL)
    assert outputs_of("rows", "replay") == {"scratch.y_CH"}
    assert outputs_of("combine", "replay") == {"y_TH"}
    direct = moe_routed(inputs.x_TH, ids_TK, gate_TK, inputs.experts, config=SMALL)
    monkeypatch.setattr("megakernel.stages.launcher", lambda: launch_op)
    y_CH = ffn_rows(inputs.x_TH, replay, inputs.experts, SMALL)
    y_TH = combine_rows(y_CH, replay.rows.row_of_TK, gate_TK, SMALL)
    assert_same_bits(actual=y_TH, expected=direct)


@torch.no_grad()
def test_both_stages_trace_into_one_graph():
    inputs, (ids_TK, gate_TK) = make_inputs(CASE), draw_routing(CASE)
    replay = prepare_replay(ids_TK, CASE.E, None, SMALL)

    def stages(x_TH, gate_TK):
        y_CH = ffn_rows(x_TH, replay, inputs.experts, SMALL)
        return combine_rows(y_CH, replay.rows.row_of_TK, gate_TK, SMALL)

    traced = torch.compile(stages, fullgraph=True, backend="eager")
    expected = stages(inputs.x_TH, gate_TK)
    assert_same_bits(actual=traced(inputs.x_TH, gate_TK), expected=expected)


def test_bad_arguments_of_ffn_rows_are_refused():
    inputs, (ids_TK, _) = make_inputs(CASE), draw_routing(CASE)
    x_TH, experts = inputs.x_TH, inputs.experts
    replay = prepare_replay(ids_TK, CASE.E, None, SMALL)
    shared = SharedExpert(torch.ones(8, CASE.H), torch.ones(8, CASE.H), torch.ones(CASE.H, 8))
    higher = replace(SMALL, block_rows=32)
    refused = {
        "no shared expert, got one of width 8": (x_TH, replay, replace(experts, shared=shared)),
        r"replay must be prepared for \[T, K\] = \(39, 2\)": (x_TH[:39], replay, experts),
        "x_TH must have the dtype of down_EHI": (x_TH.half(), replay, experts),
        "block_rows=16 as the replay, got 32": (x_TH, replay, experts, higher),
    }
    for message, arguments in refused.items():
        assert_refused(lambda arguments=arguments: ffn_rows(*arguments), message)
    assert_refused(lambda: ffn_rows(x_TH, ids_TK, experts), "prepare_replay", TypeError)


def test_bad_arguments_of_combine_rows_are_refused():
    y_CH, row_TK, gate_TK = torch.zeros(16, 8), torch.zeros(3, 2).int(), torch.ones(3, 2)
    grown = y_CH.clone().requires_grad_()
    refused = {
        "y_CH must have 2 axes": (y_CH[0], row_TK, gate_TK),
        "y_CH must not require grad": (grown, row_TK, gate_TK),
        "row_of_TK must be int32 or int64": (y_CH, row_TK.short(), gate_TK),
        r"row_of_TK must have shape \[T, K\]": (y_CH, row_TK[:, :0], gate_TK),
        "row_of_TK must be contiguous": (y_CH, row_TK.T.contiguous().T, gate_TK),
        r"row_of_TK\[0, 0\] must be -1 or in \[0, 16\), got 16": (y_CH, row_TK + 16, gate_TK),
        "got -2": (y_CH, row_TK - 2, gate_TK),
        r"gate_TK must have shape \(3, 2\)": (y_CH, row_TK, gate_TK[:2]),
    }
    for message, arguments in refused.items():
        assert_refused(lambda arguments=arguments: combine_rows(*arguments), message)


@pytest.mark.slow
def test_each_stage_compiles_for_the_gpu():
    layer = CompileCase("rows128", ROWS128, MODELS["OLMoE"], "replay")
    cases = [replace(layer, stages=stages) for stages in STAGES[1:]]
    spawn = get_context("spawn")
    with _interpreter_off(), ProcessPoolExecutor(1, mp_context=spawn) as pool:
        rows, combine = (compiled.cubin for compiled in pool.map(compile_case, cases))
    assert [loop.wgmma > 0 and loop.tma_loads for loop in rows.gemm_loops] == [1, 1]
    assert rows.gemm_loop_local_ops == () and combine.gemm_loops == ()
    assert combine.registers < rows.registers
