"""A trace counts every recorded assignment once, and nothing else."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balance.trace import Trace


def make(num_tokens=6, num_layers=2, top_k=2, num_experts=5, seed=0, dtype=np.int16, **more):
    rng = np.random.default_rng(seed)
    order = rng.random((num_tokens, num_layers, num_experts)).argsort(-1)
    return Trace(
        order[..., :top_k].astype(dtype),
        rng.integers(0, 3, num_tokens),
        rng.integers(0, 4, num_tokens),
        num_experts,
        **more,
    )


def count_by_loop(trace, num_ranks):
    shape = (trace.num_micro_batches, trace.num_layers, num_ranks, trace.num_experts)
    load_BLRE = np.zeros(shape, int)
    for (t, layer, _), expert in np.ndenumerate(trace.ids_TLK):
        counted = trace.row_mask_T is None or trace.row_mask_T[t]
        if counted and expert >= 0:
            load_BLRE[trace.micro_batch_T[t], layer, trace.source_rank_T[t], expert] += 1
    return load_BLRE


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), num_tokens=st.integers(0, 40), data=st.data())
def test_counts_equal_the_token_loop(seed, num_tokens, data):
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)))
    trace = make(num_tokens, seed=seed, row_mask_T=mask.astype(bool))
    trace.ids_TLK[np.random.default_rng(seed).random(trace.ids_TLK.shape) < 0.2] = -1
    counts = trace.counts(6)
    assert counts.dtype == np.int32
    np.testing.assert_array_equal(counts, count_by_loop(trace, 6))
    np.testing.assert_array_equal(trace.loads(), counts.sum(2))


def test_counts_in_chunks_equal_counts_at_once(monkeypatch):
    trace = make(200, seed=1)
    whole = trace.counts(4)
    monkeypatch.setattr("balance.ids._IDS_PER_CHUNK", 4 * 7)
    np.testing.assert_array_equal(trace.counts(4), whole)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64])
def test_every_integer_dtype_counts_alike(dtype):
    np.testing.assert_array_equal(make(dtype=dtype).counts(4), make().counts(4))


@pytest.mark.parametrize("num_experts", [256, 257, 512])
def test_largest_id_survives_its_narrowest_dtype(num_experts, tmp_path):
    ids_TLK = np.array([[[num_experts - 1, 0]]], np.min_scalar_type(num_experts - 1))
    trace = Trace(ids_TLK, [0], [0], num_experts)
    trace.save(tmp_path / "t.npz")
    again = Trace.load(tmp_path / "t.npz")
    assert again.ids_TLK.dtype == ids_TLK.dtype
    assert np.flatnonzero(again.counts(1)[0, 0, 0]).tolist() == [0, num_experts - 1]


def test_ids_of_a_micro_batch_keep_their_order_and_show_masked_rows_as_missing():
    trace = make(row_mask_T=np.array([True, False, True, True, False, True]))
    trace = Trace(
        trace.ids_TLK, [1, 1, 0, 1, 0, 0], [3, 2, 1, 0, 1, 2], 5, row_mask_T=trace.row_mask_T
    )
    assert trace.rows_of(1).tolist() == [0, 1, 3]
    assert trace.source_ranks_of(1).tolist() == [3, 2, 0]
    ids_TLK = trace.ids_of(1)
    assert ids_TLK.dtype == np.int32
    np.testing.assert_array_equal(ids_TLK[[0, 2]], trace.ids_TLK[[0, 3]])
    assert (ids_TLK[1] == -1).all()


def test_save_and_load_everything(tmp_path):
    weights_TLK = np.random.default_rng(0).random((6, 2, 2)).astype(np.float32)
    mask = np.array([True] * 5 + [False])
    trace = make(weights_TLK=weights_TLK, row_mask_T=mask, label="a label")
    path = tmp_path / "no_suffix"
    trace.save(path)
    again = Trace.load(path)
    for name in ("ids_TLK", "micro_batch_T", "source_rank_T", "weights_TLK", "row_mask_T"):
        np.testing.assert_array_equal(getattr(again, name), getattr(trace, name))
    assert (again.num_experts, again.label) == (5, "a label")


def test_load_names_what_is_missing(tmp_path):
    np.savez(tmp_path / "x.npz", ids_TLK=np.zeros((1, 1, 1), int), num_experts=2)
    with pytest.raises(ValueError, match="lacks micro_batch_T, source_rank_T"):
        Trace.load(tmp_path / "x.npz")


def test_no_tokens_is_a_trace_without_micro_batches():
    trace = make(0)
    assert (trace.num_micro_batches, trace.num_source_ranks) == (0, 0)
    assert trace.counts(2).shape == (0, 2, 2, 5)


GOOD = {
    "ids_TLK": np.array([[[0, 1]], [[2, 1]]]),
    "micro_batch_T": np.array([0, 1]),
    "source_rank_T": np.array([0, 0]),
    "num_experts": 3,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids_TLK": np.zeros((2, 1, 2))}, "ids_TLK must be an integer array"),
        ({"ids_TLK": np.zeros((2, 2), int)}, r"got int64 \[2, 2\]"),
        ({"ids_TLK": np.zeros((2, 0, 2), int)}, "layers >= 1"),
        ({"ids_TLK": np.array([[[0, 3]], [[2, 1]]])}, r"must lie in \[0, 3\).*got 1 other"),
        ({"ids_TLK": np.array([[[0, -2]], [[2, 1]]])}, r"must lie in \[0, 3\).*got 1 other"),
        ({"ids_TLK": np.array([[[0, 1]], [[0, 0]]])}, r"token 1, layer 0: \[0, 0\]"),
        ({"num_experts": 0}, "num_experts must be a whole number of at least 1, got 0"),
        ({"micro_batch_T": np.array([0])}, r"micro_batch_T must hold one integer.*got int64 \[1"),
        ({"micro_batch_T": np.array([0.0, 1.0])}, "micro_batch_T must hold one integer"),
        ({"source_rank_T": np.array([0, -1])}, "source_rank_T must not be negative, got -1"),
        ({"num_experts": np.inf}, "num_experts must be a whole number of at least 1, got inf"),
        ({"num_experts": None}, "num_experts must be a whole number of at least 1, got None"),
        ({"micro_batch_T": np.array([0, 2**31])}, "micro_batch_T must fit int32, got 2147483648"),
        ({"source_rank_T": np.array([0, 2**33])}, "source_rank_T must fit int32"),
        ({"row_mask_T": np.array([1, 0])}, "row_mask_T must hold one bool"),
        ({"weights_TLK": np.ones((2, 1, 1))}, "weights_TLK must be floating point of shape"),
        ({"weights_TLK": np.full((2, 1, 2), np.nan)}, "weights_TLK must be finite"),
    ],
    ids=[
        "float-ids",
        "rank-2-ids",
        "no-layers",
        "id-too-large",
        "id-too-small",
        "zero-padding",
        "no-experts",
        "short-micro-batch",
        "float-micro-batch",
        "negative-rank",
        "infinite-experts",
        "unknown-experts",
        "micro-batch-that-would-wrap",
        "rank-that-would-wrap",
        "integer-mask",
        "weights-shape",
        "nan-weights",
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Trace(**(GOOD | change))


def test_masked_padding_is_fine():
    ids_TLK = np.array([[[0, 1]], [[0, 0]]])
    trace = Trace(ids_TLK, [0, 0], [0, 0], 3, row_mask_T=np.array([True, False]))
    assert trace.loads().sum() == 2
    assert trace.report().num_rows == 1


def test_too_few_ranks_and_unknown_micro_batches_are_refused():
    trace = Trace(**(GOOD | {"source_rank_T": np.array([0, 5])}))
    with pytest.raises(ValueError, match=r"num_ranks must be at least 6.*got 4"):
        trace.counts(4)
    with pytest.raises(ValueError, match=r"micro_batch must lie in \[0, 2\), got 2"):
        trace.ids_of(2)


def test_moving_tokens_to_other_ranks_leaves_the_loads():
    trace = make()
    moved = dataclasses.replace(trace, source_rank_T=np.zeros(6, int))
    np.testing.assert_array_equal(moved.loads(), trace.loads())
    assert moved.num_source_ranks == 1 and moved.label == trace.label
