"""Engines: payloads come back, unrecorded tokens are masked, what is no recording is refused."""

import base64

import numpy as np
import pytest

from balance.recorded.engines import decode_sglang, decode_vllm, from_sglang, from_vllm
from tests.balance.recorded.recordings import (
    draw_ids,
    to_sglang,
    to_vllm,
    vllm_response,
    with_dense_layer,
)


@pytest.mark.parametrize("num_experts", [1, 256, 257, 512])
def test_sglang_payload_round_trip(num_experts):
    ids_TLK = draw_ids(7, 3, min(2, num_experts), num_experts)
    decoded = decode_sglang(to_sglang(ids_TLK), 3, ids_TLK.shape[2])
    assert decoded.dtype == np.int32
    np.testing.assert_array_equal(decoded, ids_TLK)


@pytest.mark.parametrize(
    ("num_experts", "dtype"),
    [(256, np.uint8), (257, np.uint16), (512, np.uint16), (512, np.int16), (512, np.int32)],
    ids=["256-uint8", "257-uint16", "512-uint16", "512-older-int16", "512-older-int32"],
)
def test_vllm_payload_round_trip(num_experts, dtype):
    ids_TLK = draw_ids(7, 3, 4, num_experts).astype(dtype)
    decoded = decode_vllm(to_vllm(ids_TLK))
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, ids_TLK)
    routes = from_vllm([vllm_response(ids_TLK)], num_experts)
    assert routes.pack(1).loads().sum() == ids_TLK.size


def test_sglang_responses_gain_a_masked_row_and_lose_dense_layers():
    first, second = draw_ids(5, 2, 2, 8), draw_ids(3, 2, 2, 8, seed=1)
    meta = {"routed_experts": to_sglang(with_dense_layer(first))}
    counted = {"prompt_tokens": 2, "completion_tokens": 4}
    openai = {"choices": [{}], "sglext": {"routed_experts": to_sglang(with_dense_layer(second))}}
    routes = from_sglang(
        [{"meta_info": meta | counted}, openai], 8, num_layers=3, top_k=2, moe_layers=[1, 2]
    )
    assert routes.sequence_start.tolist() == [0, 6, 10]
    assert routes.layers == (1, 2)
    assert routes.row_mask_T.tolist() == [True] * 5 + [False] + [True] * 3 + [False]
    assert routes.pack(2, 100).loads().sum() == (5 + 3) * 2 * 2


def test_sglang_rows_that_do_not_fit_the_tokens_are_refused():
    meta = {"routed_experts": to_sglang(draw_ids(5, 1, 2, 8))}
    response = {"meta_info": meta | {"prompt_tokens": 5, "completion_tokens": 5}}
    with pytest.raises(ValueError, match="recorded rows or one more, got 10 tokens for 5 rows"):
        from_sglang([response], 8, 1, 2)


@pytest.mark.parametrize(
    ("payload", "message"),
    [("A*b", "must be base64"), (base64.b64encode(b"12345").decode(), "whole rows")],
    ids=["not-base64", "half-a-row"],
)
def test_sglang_bad_payload_is_refused(payload, message):
    with pytest.raises(ValueError, match=message):
        decode_sglang(payload, 1, 1)


def test_engine_response_without_experts_is_refused():
    with pytest.raises(ValueError, match="response 0 has no routed_experts"):
        from_sglang([{"meta_info": {}}], 8, 1, 1)
    with pytest.raises(ValueError, match="response 0 has a choice without"):
        from_vllm([{"choices": [{"text": "x"}]}], 8)


def test_vllm_aborted_choice_has_no_tokens():
    ids_TLK = draw_ids(4, 1, 2, 8)
    aborted = {"choices": [{"routed_experts": None}]}
    routes = from_vllm([aborted, vllm_response(ids_TLK)], 8)
    assert routes.sequence_start.tolist() == [0, 5]


def test_vllm_float_payload_is_refused():
    with pytest.raises(ValueError, match="integers of rank 3"):
        decode_vllm(to_vllm(np.zeros((2, 1, 1))))


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"", id="empty"),
        pytest.param(None, id="None"),
        pytest.param(base64.b64encode(b"PK\x03\x04" + bytes(60)), id="zip"),
        pytest.param(base64.b64encode(b"hello"), id="text"),
    ],
)
def test_vllm_payload_that_is_no_npy_file_is_refused(payload):
    with pytest.raises(ValueError, match=r"payload must be base64|EOF|magic string"):
        decode_vllm(payload)


def test_sizes_that_are_no_whole_numbers_are_refused():
    with pytest.raises(ValueError, match="num_layers must be a whole number"):
        decode_sglang(base64.b64encode(bytes(16)), 1.0, 2)


def test_all_zero_layer_is_reported_with_its_number():
    ids_TLK = with_dense_layer(draw_ids(4, 1, 2, 8))
    with pytest.raises(ValueError, match=r"all 0 in a layer, got layers \[0\]"):
        from_vllm([vllm_response(ids_TLK)], 8)
