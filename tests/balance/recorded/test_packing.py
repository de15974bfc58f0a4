"""Whole sequences, each in one micro-batch and on one rank."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balance.recorded.packing import deal_to_ranks, fill_micro_batches, order_sequences, pack

DOMAINS = np.array(["b", "a", "b", "a", "a"])


def pack_small(**options):
    """Five sequences of 4 tokens; sequence s uses expert s only."""
    ids_TLK = np.repeat(np.arange(5), 4)[:, None, None]
    starts = np.arange(0, 21, 4)
    options = {"num_experts": 5, "num_ranks": 2, "tokens_per_micro_batch": 8} | options
    return pack(ids_TLK, starts, domain_S=DOMAINS, **options)


@pytest.mark.parametrize("order", ["given", "shuffled", "domain"])
def test_sequences_stay_whole(order):
    trace = pack_small(order=order)
    assert (np.diff(trace.micro_batch_T) >= 0).all()
    for expert in range(5):
        rows = np.flatnonzero(trace.ids_TLK[:, 0, 0] == expert)
        assert len(rows) == 4 and rows[-1] - rows[0] == 3
        assert len(set(trace.micro_batch_T[rows])) == len(set(trace.source_rank_T[rows])) == 1
    assert trace.label == f"packed, {order}"


def test_given_order_fills_micro_batches_by_middle():
    assert np.bincount(pack_small(order="given").micro_batch_T).tolist() == [8, 8, 4]


def test_domain_order_keeps_domains_together():
    experts = pack_small(order="domain").ids_TLK[::4, 0, 0]
    assert DOMAINS[experts].tolist() == ["a", "a", "a", "b", "b"]


def test_seed_decides_the_shuffle():
    first, again, other = (order_sequences(50, "shuffled", seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and sorted(other) == list(range(50))


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    target=st.integers(1, 80),
    num_ranks=st.integers(1, 5),
)
def test_micro_batches_have_no_gaps_and_ranks_are_near_even(lengths, target, num_ranks):
    length_S = np.array(lengths)
    micro_batch_S = fill_micro_batches(length_S, target)
    steps = np.diff(micro_batch_S, prepend=0)
    assert set(steps) <= {0, 1}
    # Middles lie within one target, so the rest is at most the two halves that stick out.
    totals = np.bincount(micro_batch_S, weights=length_S)
    assert totals.max() <= target + max(lengths)
    rank_S = deal_to_ranks(length_S, micro_batch_S, num_ranks)
    for micro_batch in range(len(totals)):
        mine = micro_batch_S == micro_batch
        tokens_R = np.bincount(rank_S[mine], weights=length_S[mine], minlength=num_ranks)
        assert tokens_R.max() - tokens_R.min() <= length_S[mine].max()


def test_mask_travels_with_its_tokens():
    row_mask_T = np.tile([True, True, True, False], 5)
    trace = pack_small(row_mask_T=row_mask_T)
    assert trace.loads().sum() == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "sorted"}, 'order must be "given", "shuffled" or "domain"'),
        ({"tokens_per_micro_batch": 0}, "tokens_per_micro_batch must be positive, got 0"),
        ({"tokens_per_micro_batch": np.nan}, "tokens_per_micro_batch must be positive, got nan"),
        ({"num_ranks": 0}, "num_ranks must be positive, got 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pack_small(**options)


@pytest.mark.parametrize("starts", [[0, 3], [1, 4], [0, 5, 4], [[0, 4]], [0.0, 4.0]])
def test_bad_offsets_are_refused(starts):
    with pytest.raises(ValueError, match="sequence_start must"):
        pack(np.zeros((4, 1, 1), int), np.array(starts), num_experts=1, num_ranks=1)


def test_domain_order_needs_domains():
    with pytest.raises(
        ValueError, match="domain_S must name a domain for each sequence, got none"
    ):
        order_sequences(3, "domain")
