"""What is compiled: every shipped config as models call it, and each thing beside, once."""

from dataclasses import asdict, replace

import pytest
import torch

from megakernel.config import FLOAT32, ROWS128, SHIPPED
from megakernel.plan.backward_spec import BackwardSpec
from megakernel.plan.rules import ExpertRule, RouterRule
from megakernel.tools.compile_backward import BACKWARDS, PURPOSES
from megakernel.tools.compile_cases import (
    LEVERS,
    CompileCase,
    compile_cases,
    lever_cases,
    make_call,
)
from megakernel.tools.models import KINDS, MODELS

CASE = CompileCase("rows128", ROWS128, MODELS["OLMoE"], "live")
LAYERS = [
    case
    for case in compile_cases()
    if (case.split, case.stages, case.purpose) == ("one", "layer", "forward")
    and case.config in SHIPPED.values()
]


def test_every_shipped_config_is_compiled_for_every_model_and_route() -> None:
    cases = {(case.name, case.model.name, case.route) for case in LAYERS}
    routes = ("live", "given", "replay")
    assert cases == {(c, name, route) for c in SHIPPED for name in MODELS for route in routes}
    assert all(case.config == SHIPPED[case.name] for case in LAYERS)


def test_every_shipped_config_is_compiled_with_a_placement_and_with_named_slots() -> None:
    cases = {(case.name, case.split) for case in compile_cases() if case.split != "one"}
    assert cases == {(name, split) for name in SHIPPED for split in ("even", "slot")}


def test_every_shipped_config_is_compiled_with_its_clock() -> None:
    """The interpreter counts readings, so only a compiler sees the clock itself."""
    assert {case.name for case in compile_cases() if case.config.record_times} == set(SHIPPED)
    assert all(case.spec.timed == case.config.record_times for case in compile_cases())


def test_every_shipped_config_is_compiled_in_stages() -> None:
    cases = {(case.name, case.stages) for case in compile_cases() if case.stages != "layer"}
    assert cases == {(name, stages) for name in SHIPPED for stages in ("rows", "combine")}
    forward = [case for case in compile_cases() if case.purpose not in BACKWARDS]
    assert all(case.spec.stages == case.stages for case in forward)


def test_every_lever_is_moved_alone_in_every_shipped_config() -> None:
    moved = {(case.name.split()[0], case.config) for case in lever_cases()}
    wanted = {
        (name, replace(config, **{lever: value}))
        for name, config in SHIPPED.items()
        for lever, values in LEVERS
        for value in values
        if lever != "blocks_per_task" or config.blocks_per_task > 1  # their registers are full
    }
    assert moved == wanted - set(SHIPPED.items())


def test_a_new_lever_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megakernel.tools.compile_cases.LEVERS", (("record_times", (True,)),))
    assert [case.name for case in lever_cases()] == [f"{c} record_times=True" for c in SHIPPED]
    assert all(case.spec.timed for case in lever_cases())


def test_float32_is_compiled_in_every_route_for_every_kind_and_at_a_replays_height() -> None:
    cases = [case for case in compile_cases() if case.dtype == torch.float32]
    tall = replace(FLOAT32, block_rows=128)
    assert {case.config for case in cases} == {FLOAT32, tall}
    assert [case.route for case in cases if case.config == tall] == ["replay"]
    assert {case.route for case in cases} == {"live", "given", "replay"}
    assert {case.kind for case in cases} == set(KINDS)
    for case in cases:
        call = make_call(case)
        weights = [call.buffers.experts.down_EHI, call.buffers.experts.gate_up_bias_E2I]
        assert {w.dtype for w in [call.tokens, *weights] if w is not None} == {torch.float32}


def test_every_config_is_compiled_for_everything_that_training_launches() -> None:
    cases = {(case.name, case.purpose) for case in compile_cases()}
    assert cases >= {(name, one) for name in (*SHIPPED, "float32") for one in PURPOSES}


@pytest.mark.parametrize("route", ["live", "given", "replay"])
def test_a_backward_asks_for_every_gradient_there_is(route: str) -> None:
    case = replace(CASE, model=MODELS["gpt-oss-120b"], kind="gpt-oss", route=route)
    asked = gradients_of(replace(case, purpose="backward"))
    router = set() if route == "given" else {"router", "router_bias", "weighs"}
    weights = {"gate_up", "down", "gate_up_bias", "down_bias"}
    assert asked == {"x", *weights} | (router or {"gates"})
    assert gradients_of(replace(case, purpose="frozen")) == {"x"} | (router & {"weighs"})
    assert gradients_of(replace(case, purpose="anew")) == asked | {"recomputes"}


def gradients_of(case: CompileCase) -> set[str]:
    """The gradients that the launch of a case is compiled for, and what it works from."""
    spec = case.spec
    assert isinstance(spec, BackwardSpec) and spec.route == {"live": "given"}.get(
        case.route, case.route
    )
    return {name for name, asked in asdict(spec.gradients).items() if asked}


def test_gradients_are_added_to_float32_buffers_in_one_purpose_alone() -> None:
    for purpose in BACKWARDS[:1] + BACKWARDS[-1:]:
        call = make_call(replace(CASE, purpose=purpose))
        places = call.buffers.gradients
        dtype = torch.float32 if purpose == "added" else torch.bfloat16
        weights = places.gate_up_E2IH, places.down_EHI
        assert [weight.dtype for weight in weights if weight is not None] == [dtype, dtype]
        assert call.is_added == (purpose == "added")


def test_a_forward_saves_what_its_backward_reads() -> None:
    call = make_call(replace(CASE, purpose="saving"))
    assert call.buffers.saved.z_A2I is not None
    assert call.rule.stages == "layer"


def test_no_two_cases_are_the_same() -> None:
    assert len(set(compile_cases())) == len(compile_cases())


def cases_of(name: str) -> list[CompileCase]:
    return [case for case in compile_cases() if case.model.name == name]


@pytest.mark.parametrize("case", cases_of("gpt-oss-120b"), ids=str)
def test_gpt_oss_is_compiled_with_its_experts_and_biases(case: CompileCase) -> None:
    b, spec = make_call(case).buffers, case.spec
    assert spec.expert == ExpertRule("clamped_swiglu", 7.0, True, True)
    assert b.experts.gate_up_bias_E2I is not None and b.experts.down_bias_EH is not None
    assert (b.router.bias_E is None) == (case.route == "given")
    assert all(weight.tma and weight.transposed for weight in (spec.gate_up, spec.down))


@pytest.mark.parametrize("case", cases_of("DeepSeek-V3 routed"), ids=str)
def test_deepseek_v3_is_compiled_with_its_router_and_shared_expert(case: CompileCase) -> None:
    has_router = case.route != "given"
    rule = RouterRule("sigmoid", True, 2.5, 8, 4) if has_router else RouterRule()
    assert case.spec.router == rule
    assert (make_call(case).buffers.router.correction_bias_E is not None) == has_router
    assert case.spec.shared_width == 2048


@pytest.mark.parametrize(("split", "route"), [("even", "live"), ("slot", "given")])
def test_a_placement_has_more_slots_than_experts(split: str, route: str) -> None:
    case = replace(CASE, split=split, route=route)
    routing = make_call(case).buffers.routing
    assert case.spec.split == split
    assert case.spec.num_slots > case.spec.num_experts and case.spec.max_copies > 1
    assert (routing.slot_of_TK is not None) == (split == "slot")


def test_only_a_live_launch_counts_choices() -> None:
    load_of = {
        route: make_call(replace(CASE, route=route)).buffers.routing.load_E
        for route in ("live", "given", "replay")
    }
    counting = [route for route, load_E in load_of.items() if load_E is not None]
    assert counting == ["live"]


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("name", MODELS)
def test_each_phase_of_each_model_has_a_compiled_default(name: str, phase: str) -> None:
    assert any(phase in case.default_for for case in compile_cases() if case.model.name == name)
