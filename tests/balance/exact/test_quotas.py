"""Tokens to copies: the docstring's example, conservation, and local tokens first."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balance.exact.quotas import assign_slots, quota_prefix, slots_of_experts


def test_the_docstrings_example():
    prefix_REV = quota_prefix(
        np.array([[5], [3]]), np.array([[4, 4]]), np.array([[0, 1]]), np.zeros(2, int)
    )
    assert prefix_REV[:, 0].tolist() == [[4, 5], [0, 3]]


def test_slots_of_experts():
    slot_of_EV, copies_E = slots_of_experts(np.array([2, 0, -1, 2, 1, -1], np.int32), 4)
    assert slot_of_EV.tolist() == [[1, -1], [4, -1], [0, 3], [-1, -1]]
    assert copies_E.tolist() == [1, 1, 2, 0]
    assert slot_of_EV.dtype == copies_E.dtype == np.int32


@st.composite
def quotas(draw):
    """load_RE, quota_EV, rank_of_EV and node_of_R with quotas that sum to the loads."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_ranks, num_experts = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    most = draw(st.integers(1, num_ranks))
    load_RE = rng.integers(0, draw(st.sampled_from([2, 30])), (num_ranks, num_experts))
    rank_of_EV = np.full((num_experts, most), -1)
    quota_EV = np.zeros((num_experts, most), dtype=np.int64)
    for expert in range(num_experts):
        count = rng.integers(1, most + 1)
        rank_of_EV[expert, :count] = np.sort(rng.permutation(num_ranks)[:count])
        share = rng.dirichlet(np.ones(count))
        quota_EV[expert, :count] = rng.multinomial(load_RE[:, expert].sum(), share)
    node_of_R = np.sort(rng.integers(0, 2, num_ranks))
    return load_RE, quota_EV, rank_of_EV, node_of_R


@given(case=quotas())
@settings(max_examples=100, deadline=None)
def test_prefixes_sum_to_source_loads_and_to_quotas(case):
    load_RE, quota_EV, _, _ = case
    prefix_REV = quota_prefix(*case)
    dealt_REV = np.diff(prefix_REV, axis=2, prepend=0)
    assert (dealt_REV >= 0).all()
    assert (prefix_REV[:, :, -1] == load_RE).all()
    assert (dealt_REV.sum(0) == quota_EV).all()


@given(case=quotas())
@settings(max_examples=100, deadline=None)
def test_own_rank_then_own_node(case):
    load_RE, quota_EV, rank_of_EV, node_of_R = case
    dealt_REV = np.diff(quota_prefix(*case), axis=2, prepend=0)
    for expert, copy in zip(*(rank_of_EV >= 0).nonzero(), strict=True):
        rank = rank_of_EV[expert, copy]
        local = min(load_RE[rank, expert], quota_EV[expert, copy])
        assert dealt_REV[rank, expert, copy] == local
    for node in np.unique(node_of_R):
        near_EV = (rank_of_EV >= 0) & (node_of_R[rank_of_EV] == node)
        inside_E = (dealt_REV[node_of_R == node].sum(0) * near_EV).sum(1)
        most_E = np.minimum(load_RE[node_of_R == node].sum(0), (quota_EV * near_EV).sum(1))
        assert (inside_E == most_E).all()


@given(seed=st.integers(0, 2**32 - 1), num_tokens=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_every_assignment_gets_a_slot_of_its_expert(seed, num_tokens):
    rng = np.random.default_rng(seed)
    num_ranks, num_experts, top_k = 2, 4, 2
    ids_TK = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)] or [[]])
    ids_TK = ids_TK.reshape(num_tokens, top_k)
    ids_TK[rng.random(ids_TK.shape) < 0.2] = -1
    source_T = rng.integers(0, num_ranks, num_tokens)
    load_RE = np.zeros((num_ranks, num_experts), int)
    for ids_K, source in zip(ids_TK, source_T, strict=True):
        np.add.at(load_RE[source], ids_K[ids_K >= 0], 1)
    expert_of_P = np.array([0, 1, 2, 3, 0, 1])
    slot_of_EV, _ = slots_of_experts(expert_of_P, num_experts)
    total_E = load_RE.sum(0)
    quota_EV = np.stack([total_E - total_E // 3, total_E // 3], axis=1)
    quota_EV[2:] = np.stack([total_E[2:], np.zeros(2, int)], axis=1)
    rank_of_EV = np.where(slot_of_EV >= 0, slot_of_EV // 3, -1)
    prefix_REV = quota_prefix(load_RE, quota_EV, rank_of_EV, np.zeros(num_ranks, int))
    slot_of_TK = assign_slots(ids_TK, source_T, prefix_REV, slot_of_EV)
    assert slot_of_TK.dtype == np.int32
    assert ((slot_of_TK == -1) == (ids_TK == -1)).all()
    assert (expert_of_P[slot_of_TK[ids_TK >= 0]] == ids_TK[ids_TK >= 0]).all()
    served_P = np.bincount(slot_of_TK[slot_of_TK >= 0], minlength=len(expert_of_P))
    expected_P = np.zeros(len(expert_of_P), int)
    np.add.at(expected_P, slot_of_EV[slot_of_EV >= 0], quota_EV[slot_of_EV >= 0])
    assert (served_P == expected_P).all()


def test_more_tokens_than_planned_are_refused():
    prefix_REV = np.array([[[1]]], np.int32)
    with pytest.raises(ValueError, match="source rank 0 to expert 0"):
        assign_slots(np.array([[0], [0]]), np.zeros(2, int), prefix_REV, np.array([[0]], np.int32))
