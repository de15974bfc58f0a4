"""Every scenario routes as its name says."""

from dataclasses import replace

import numpy as np
import pytest

from balance import Trace
from perf.problems.cases import (
    GPT_OSS_20B,
    RECORDED_PROFILE,
    RECORDING,
    SCENARIOS,
    SHAPES,
    TINY,
    Case,
    fit_logits,
    make_ids,
    make_loads,
    read_trace,
    sizes_of,
    typical_layer,
    why_missing,
)
from tests.helpers.sources import ROOT

QWEN = SHAPES["Qwen3-30B-A3B"]
MADE_UP = [name for name in SCENARIOS if name != "trace"]
# 107,920 tokens of gpt-oss-20b, too large for the repository.
GPT_OSS_TRACE = ROOT.parent / "shared" / "traces" / "gptoss20b.npz"
needs_gpt_oss = pytest.mark.skipif(
    not GPT_OSS_TRACE.exists(),
    reason="NOT TESTED: that the recorded profile is gpt-oss-20b's; its trace is no part of the "
    f"repository and not at {GPT_OSS_TRACE}",
)


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


@needs_gpt_oss
def test_the_profile_is_the_one_of_the_trace():
    ids_TK = typical_layer(GPT_OSS_TRACE)
    assert (ids_TK == read_trace(GPT_OSS_TRACE).ids_TLK[:, 17]).all()
    load_E = -np.sort(-np.bincount(ids_TK.ravel(), minlength=32))
    assert load_E / load_E.mean() == pytest.approx(np.array(RECORDED_PROFILE), abs=0.006)


def test_the_recording_in_the_repository_plays_by_default():
    case = Case(GPT_OSS_20B, 500, "trace")
    assert case.trace == RECORDING and case.name == "gpt-oss-20b/trace routing"
    assert why_missing(case) is None
    ids_TK = make_ids(case)
    layers = read_trace(RECORDING).ids_TLK[:500].swapaxes(0, 1)
    assert any((ids_TK == layer_TK).all() for layer_TK in layers)


def test_another_trace_plays_its_layer_of_median_imbalance(tmp_path):
    path = tmp_path / "mine.npz"
    Trace(
        np.array([[[0], [0], [0]], [[0], [1], [0]], [[0], [2], [1]], [[0], [3], [1]]]),
        np.zeros(4, int), np.zeros(4, int), 4,
    ).save(path)  # fmt: skip
    model = replace(TINY, num_experts=4, top_k=1)
    case = Case(model, 3, "trace", trace=path)
    assert case.name == "tiny/trace mine"
    assert make_ids(case).tolist() == [[0], [0], [1]]
    with pytest.raises(ValueError, match="num_tokens must be at most 4, got 5"):
        make_ids(replace(case, num_tokens=5))


def test_tokens_without_a_choice_are_left_out(tmp_path):
    path = tmp_path / "holes.npz"
    ids_TLK = np.array([[[0]], [[-1]], [[2]], [[1]]])
    mask_T = np.array([True, True, False, True])
    Trace(ids_TLK, np.zeros(4, int), np.zeros(4, int), 3, row_mask_T=mask_T).save(path)
    assert typical_layer(path).tolist() == [[0], [1]]


def test_a_trace_serves_no_model_with_other_experts():
    assert sizes_of(read_trace(RECORDING)) == (32, 4)
    assert why_missing(Case(QWEN, 8, "trace")) == "the trace is of 32 experts, top-4"
    with pytest.raises(ValueError, match="must be available, but the trace is of 32"):
        make_ids(Case(QWEN, 8, "trace"))


def test_a_trace_that_is_not_there_is_named(tmp_path):
    case = Case(GPT_OSS_20B, 8, "trace", trace=tmp_path / "none.npz")
    assert why_missing(case) == f"there is no {tmp_path / 'none.npz'}"


def test_an_unknown_scenario_is_refused():
    with pytest.raises(ValueError, match=r"scenario must be one of .*, got 'sunny'"):
        make_ids(Case(TINY, 8, "sunny"))


def test_fitted_logits_of_equal_weights_are_equal():
    assert np.ptp(fit_logits(np.ones(16), 4)) < 1e-9
