"""Made-up routing has the fluctuations it was calibrated to, and is always called synthetic."""

from dataclasses import replace

import numpy as np
import pytest

from balance.measures import load as cost
from balance.recorded.synthetic import (
    SyntheticConfig,
    _make_sequences,
    make_counts,
    make_trace,
    top_k_chance,
)

# The shape of gpt-oss-20b's recorded generations.
LIKE_GPT_OSS = SyntheticConfig(
    num_experts=32,
    top_k=4,
    num_layers=6,
    num_micro_batches=16,
    tokens_per_micro_batch=3400,
    num_ranks=8,
    sequence_tokens=(60, 511),
)
SMALL = replace(LIKE_GPT_OSS, num_layers=2, num_micro_batches=3, tokens_per_micro_batch=500)


@pytest.fixture(scope="module")
def trace():
    return make_trace(LIKE_GPT_OSS)


@pytest.fixture(scope="module")
def sequence_T():
    length_S = _make_sequences(LIKE_GPT_OSS).length_S
    return np.repeat(np.arange(len(length_S)), length_S)


def chosen_TE(trace, layer):
    chosen = np.zeros((trace.num_tokens, trace.num_experts))
    np.put_along_axis(chosen, trace.ids_TLK[:, layer].astype(int), 1, axis=1)
    return chosen


def overlap(one_TE, other_TE):
    """Mean Jaccard overlap of top-k sets."""
    both = (one_TE * other_TE).sum(1)
    return float((both / (2 * one_TE.sum(1) - both)).mean())


def intra_class_correlation(chosen, sequence_T):
    """One-way analysis of variance: how much of an expert's choice the sequence decides."""
    length_S = np.bincount(sequence_T).astype(float)
    sum_SE = np.zeros((len(length_S), chosen.shape[1]))
    np.add.at(sum_SE, sequence_T, chosen)
    mean_SE = sum_SE / length_S[:, None]
    num_tokens, num_sequences = len(sequence_T), len(length_S)
    between = (length_S[:, None] * (mean_SE - chosen.mean(0)) ** 2).sum(0) / (num_sequences - 1)
    within = (sum_SE - length_S[:, None] * mean_SE**2).sum(0) / (num_tokens - num_sequences)
    typical = (num_tokens - (length_S**2).sum() / num_tokens) / (num_sequences - 1)
    return float(((between - within) / (between + (typical - 1) * within)).mean())


def test_sequences_decide_as_much_as_in_the_recording(trace, sequence_T):
    """Recorded: 0.03 to 0.27 by layer, mean over experts 0.11 in the median layer."""
    correlations = [intra_class_correlation(chosen_TE(trace, i), sequence_T) for i in range(6)]
    assert 0.07 < np.median(correlations) < 0.16
    assert min(correlations) > 0.02 and max(correlations) < 0.27


def test_neighbouring_tokens_overlap_as_in_the_recording(trace, sequence_T):
    """Recorded overlap: neighbours 0.30, same sequence 0.20, any two tokens 0.12."""
    rng = np.random.default_rng(0)
    same_T = np.flatnonzero(np.diff(sequence_T) == 0)
    far_T = rng.integers(trace.num_tokens, size=(2, 20_000))
    chosen = [chosen_TE(trace, layer) for layer in range(6)]
    neighbours = np.median([overlap(c[same_T], c[same_T + 1]) for c in chosen])
    anywhere = np.median([overlap(c[far_T[0]], c[far_T[1]]) for c in chosen])
    assert 0.25 < neighbours < 0.36
    assert 0.09 < anywhere < 0.15


def test_imbalance_is_that_of_the_recording(trace):
    """Recorded at EP8, contiguous, 3.4k tokens: 1.53 shuffled; expert max / mean 2.0 to 4.1."""
    load_BLE = trace.loads()
    ranks = load_BLE.reshape(*load_BLE.shape[:2], 8, 4).sum(-1)
    assert 1.35 < cost.imbalance(ranks).mean() < 1.75
    assert 1.7 < np.median(cost.max_violation(load_BLE.sum(0)) + 1) < 4.1


def test_grouping_by_domain_is_harder():
    by_domain = make_counts(replace(LIKE_GPT_OSS, order="domain")).sum(2)
    shuffled = make_counts(LIKE_GPT_OSS).sum(2)

    def fluctuation(load_BLE):
        return (load_BLE.std(0) / load_BLE.mean(0)).mean()

    assert fluctuation(by_domain) > 1.3 * fluctuation(shuffled)


def test_counts_follow_the_same_process_as_tokens(trace):
    counts = make_counts(LIKE_GPT_OSS)
    drawn = trace.counts(8)
    assert counts.shape == drawn.shape and counts.dtype == np.int32
    np.testing.assert_array_equal(counts.sum(-1), drawn.sum(-1))
    share_counts = counts.sum((0, 2)) / counts.sum((0, 2, 3))[0]
    share_drawn = drawn.sum((0, 2)) / drawn.sum((0, 2, 3))[0]
    # Same logits, so shares differ by the noise of tokens and the approximate chance only.
    assert np.abs(share_counts - share_drawn).max() < 0.01


def test_counts_never_exceed_the_tokens():
    steep = replace(SMALL, base_spread=(6.0, 6.0))
    load_BLRE = make_counts(steep)
    tokens_BR = load_BLRE.sum(-1)[:, 0] // steep.top_k
    assert (load_BLRE >= 0).all()
    assert (load_BLRE <= tokens_BR[:, None, :, None]).all()


def test_persistence_repeats_choices():
    def neighbours(persistence):
        trace = make_trace(replace(SMALL, persistence=persistence))
        chosen = chosen_TE(trace, 0)
        return overlap(chosen[1:], chosen[:-1])

    assert neighbours(0.0) < neighbours(0.5) < neighbours(0.9)


def test_drift_moves_later_micro_batches_away():
    still, moving = (make_counts(replace(LIKE_GPT_OSS, drift=d)) for d in (0, 0.2))

    def distance(load_BLRE):
        share = load_BLRE.sum(2) / load_BLRE.sum((2, 3))[..., None]
        return np.abs(share[-1] - share[0]).sum()

    assert distance(moving) > 1.5 * distance(still)


def test_chance_matches_drawn_frequency():
    rng = np.random.default_rng(0)
    logit_E = rng.normal(0, 1.5, 12)
    noisy = logit_E + rng.gumbel(size=(200_000, 12))
    picked = noisy.argpartition(-3, axis=1)[:, -3:]
    frequency = np.bincount(picked.ravel(), minlength=12) / len(noisy)
    chance = top_k_chance(logit_E[None], 3)[0]
    assert chance.sum() == pytest.approx(3)
    assert np.abs(chance - frequency).max() < 0.03
    assert (top_k_chance(logit_E[None], 12) == 1).all()


@pytest.mark.parametrize(
    "config",
    [
        replace(SMALL, num_experts=1, top_k=1),
        replace(SMALL, top_k=32),
        replace(SMALL, num_experts=257, top_k=2),
        replace(SMALL, num_micro_batches=1, tokens_per_micro_batch=1, num_ranks=1),
    ],
    ids=["one-expert", "all-experts", "two-byte-ids", "one-token"],
)
def test_edge_shapes(config):
    trace = make_trace(config)
    total = config.num_micro_batches * config.tokens_per_micro_batch
    assert trace.num_tokens == total
    assert trace.num_micro_batches == config.num_micro_batches
    assert make_counts(config).sum() == total * config.num_layers * config.top_k


def test_same_seed_same_trace_and_the_label_says_synthetic():
    one, again = make_trace(SMALL), make_trace(SMALL)
    other = make_trace(replace(SMALL, seed=1))
    np.testing.assert_array_equal(one.ids_TLK, again.ids_TLK)
    assert (one.ids_TLK[:100] != other.ids_TLK[:100]).any()
    assert one.label.startswith("synthetic")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be positive, got 0"),
        ({"top_k": 33}, "top_k must be at most 32, got 33"),
        ({"order": "sorted"}, 'order must be "shuffled" or "domain"'),
        ({"persistence": 1.0}, r"persistence must lie in \[0, 1\), got 1.0"),
        ({"sequence_tokens": (9, 3)}, r"sequence_tokens must rise from 1, got \(9, 3\)"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)
