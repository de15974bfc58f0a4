"""Every scenario routes as its name says."""

import numpy as np
import pytest

from perf.problems.cases import (
    GPT_OSS_20B,
    RECORDED_PROFILE,
    SCENARIOS,
    SHAPES,
    TINY,
    TRACE_LAYER,
    TRACE_PATH,
    Case,
    fit_logits,
    make_ids,
    make_loads,
    read_trace_layer,
    why_missing,
)

QWEN = SHAPES["Qwen3-30B-A3B"]
MADE_UP = [name for name in SCENARIOS if name != "gpt-oss"]
needs_trace = pytest.mark.skipif(not TRACE_PATH.exists(), reason="the recorded trace is not here")


@pytest.mark.parametrize("scenario", MADE_UP)
@pytest.mark.parametrize("model", [TINY, QWEN, SHAPES["Mixtral-8x7B"]], ids=lambda m: m.name)
def test_ids_are_distinct_in_range_and_repeatable(model, scenario):
    case = Case(model, 100, scenario)
    ids_TK = make_ids(case)
    assert ids_TK.shape == (100, model.top_k)
    assert ids_TK.min() >= 0 and ids_TK.max() < model.num_experts
    assert (np.diff(np.sort(ids_TK, axis=1), axis=1) > 0).all()
    assert (make_ids(case) == ids_TK).all()


def test_balanced_loads_differ_by_at_most_one():
    load_E = make_loads(Case(QWEN, 1001, "balanced"))
    assert load_E.max() - load_E.min() <= 1 and load_E.sum() == 8008


def test_one_expert_is_everybodys_first_choice():
    load_E = make_loads(Case(QWEN, 508, "one takes all"))
    assert load_E[0] == 508
    assert load_E[1:].max() - load_E[1:].min() <= 1


def test_zipf_falls_with_the_rank_of_the_expert():
    load_E = make_loads(Case(QWEN, 4000, "zipf"))
    assert load_E[0] == pytest.approx(0.95 * 4000, rel=0.02)
    assert load_E[:8].sum() > load_E[8:64].sum() / 2
    assert load_E[20] > load_E[100]


def test_recorded_routing_is_as_unequal_as_the_recording():
    load_E = make_loads(Case(GPT_OSS_20B, 20000, "recorded"))
    assert load_E / load_E.mean() == pytest.approx(np.array(RECORDED_PROFILE), abs=0.06)


@needs_trace
def test_the_profile_is_the_one_of_the_trace():
    ids_TK = read_trace_layer(str(TRACE_PATH), TRACE_LAYER)
    load_E = -np.sort(-np.bincount(ids_TK.ravel(), minlength=32))
    assert load_E / load_E.mean() == pytest.approx(np.array(RECORDED_PROFILE), abs=0.006)


@needs_trace
def test_gpt_oss_is_the_trace_itself():
    case = Case(GPT_OSS_20B, 500, "gpt-oss")
    assert why_missing(case) is None
    assert (make_ids(case) == read_trace_layer(str(TRACE_PATH), TRACE_LAYER)[:500]).all()


def test_the_trace_serves_no_model_with_other_experts():
    assert why_missing(Case(QWEN, 8, "gpt-oss")) == "the trace is of 32 experts, top-4"
    with pytest.raises(ValueError, match="must be available, but the trace is of 32"):
        make_ids(Case(QWEN, 8, "gpt-oss"))


def test_an_unknown_scenario_is_refused():
    with pytest.raises(ValueError, match=r"scenario must be one of .*, got 'sunny'"):
        make_ids(Case(TINY, 8, "sunny"))


def test_fitted_logits_of_equal_weights_are_equal():
    assert np.ptp(fit_logits(np.ones(16), 4)) < 1e-9
