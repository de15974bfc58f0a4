"""Readers: what was recorded comes back, fillers are masked, defects are refused."""

import base64
import io
import json

import numpy as np
import pytest
import torch

from balance.recorded import read as formats
from balance.trace import Trace

REAL_LAYERS = [1, 2]  # layer 0 of the recorded model is dense


def draw_ids(num_tokens, num_layers, top_k, num_experts, seed=0):
    """Distinct experts in each row, the largest id among them."""
    rng = np.random.default_rng(seed)
    order = rng.random((num_tokens, num_layers, num_experts)).argsort(-1)
    ids_TLK = order[..., :top_k]
    ids_TLK[0, :, 0] = num_experts - 1
    for k in range(1, top_k):
        ids_TLK[0, :, k] = k - 1
    return ids_TLK


def with_dense_layer(ids_TLK):
    return np.concatenate([np.zeros_like(ids_TLK[:, :1]), ids_TLK], axis=1)


def to_sglang(ids_TLK):
    return base64.b64encode(ids_TLK.astype("<i4").tobytes()).decode()


def to_vllm(ids_TLK):
    buffer = io.BytesIO()
    np.save(buffer, ids_TLK)
    return base64.b64encode(buffer.getvalue()).decode()


def vllm_response(ids_TLK):
    return {"choices": [{"text": "", "routed_experts": to_vllm(ids_TLK)}]}


@pytest.mark.parametrize("num_experts", [1, 256, 257, 512])
def test_sglang_payload_round_trip(num_experts):
    ids_TLK = draw_ids(7, 3, min(2, num_experts), num_experts)
    decoded = formats.decode_sglang(to_sglang(ids_TLK), 3, ids_TLK.shape[2])
    assert decoded.dtype == np.int32
    np.testing.assert_array_equal(decoded, ids_TLK)


@pytest.mark.parametrize(
    ("num_experts", "dtype"),
    [(256, np.uint8), (257, np.uint16), (512, np.uint16), (512, np.int16), (512, np.int32)],
    ids=["256-uint8", "257-uint16", "512-uint16", "512-older-int16", "512-older-int32"],
)
def test_vllm_payload_round_trip(num_experts, dtype):
    ids_TLK = draw_ids(7, 3, 4, num_experts).astype(dtype)
    decoded = formats.decode_vllm(to_vllm(ids_TLK))
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, ids_TLK)
    routes = formats.from_vllm([vllm_response(ids_TLK)], num_experts)
    assert routes.pack(1).loads().sum() == ids_TLK.size


def test_sglang_responses_gain_a_masked_row_and_lose_dense_layers():
    first, second = draw_ids(5, 2, 2, 8), draw_ids(3, 2, 2, 8, seed=1)
    meta = {"routed_experts": to_sglang(with_dense_layer(first))}
    counted = {"prompt_tokens": 2, "completion_tokens": 4}
    openai = {"choices": [{}], "sglext": {"routed_experts": to_sglang(with_dense_layer(second))}}
    routes = formats.from_sglang(
        [{"meta_info": meta | counted}, openai], 8, num_layers=3, top_k=2, moe_layers=REAL_LAYERS
    )
    assert routes.sequence_start.tolist() == [0, 6, 10]
    assert routes.layers == (1, 2)
    assert routes.row_mask_T.tolist() == [True] * 5 + [False] + [True] * 3 + [False]
    assert routes.pack(2, 100).loads().sum() == (5 + 3) * 2 * 2


def test_sglang_rows_that_do_not_fit_the_tokens_are_refused():
    meta = {"routed_experts": to_sglang(draw_ids(5, 1, 2, 8))}
    response = {"meta_info": meta | {"prompt_tokens": 5, "completion_tokens": 5}}
    with pytest.raises(ValueError, match="recorded rows or one more, got 10 tokens for 5 rows"):
        formats.from_sglang([response], 8, 1, 2)


@pytest.mark.parametrize(
    ("payload", "message"),
    [("A*b", "must be base64"), (base64.b64encode(b"12345").decode(), "whole rows")],
    ids=["not-base64", "half-a-row"],
)
def test_sglang_bad_payload_is_refused(payload, message):
    with pytest.raises(ValueError, match=message):
        formats.decode_sglang(payload, 1, 1)


def test_engine_response_without_experts_is_refused():
    with pytest.raises(ValueError, match="response 0 has no routed_experts"):
        formats.from_sglang([{"meta_info": {}}], 8, 1, 1)
    with pytest.raises(ValueError, match="response 0 has a choice without"):
        formats.from_vllm([{"choices": [{"text": "x"}]}], 8)


def test_vllm_aborted_choice_has_no_tokens():
    ids_TLK = draw_ids(4, 1, 2, 8)
    aborted = {"choices": [{"routed_experts": None}]}
    routes = formats.from_vllm([aborted, vllm_response(ids_TLK)], 8)
    assert routes.sequence_start.tolist() == [0, 5]


def test_vllm_float_payload_is_refused():
    with pytest.raises(ValueError, match="integers of rank 3"):
        formats.decode_vllm(to_vllm(np.zeros((2, 1, 1))))


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
        formats.decode_vllm(payload)


def test_sizes_that_are_no_whole_numbers_are_refused():
    with pytest.raises(ValueError, match="num_layers must be a whole number"):
        formats.decode_sglang(base64.b64encode(bytes(16)), 1.0, 2)


@pytest.mark.parametrize("moe_layers", [[0.0], [-1], [0, 0], [1], []], ids=str)
def test_layers_that_are_not_recorded_once_are_refused(moe_layers):
    with pytest.raises(ValueError, match="moe_layers must"):
        formats.join([np.array([[[0, 1]]])], 2, moe_layers=moe_layers)


def test_every_sequence_has_one_domain():
    with pytest.raises(ValueError, match="domain_S must have 1 entries, got 2"):
        formats.join([np.array([[[0, 1]]])], 2, domain_S=["a", "b"])


def test_all_zero_layer_is_reported_with_its_number():
    ids_TLK = with_dense_layer(draw_ids(4, 1, 2, 8))
    with pytest.raises(ValueError, match=r"all 0 in a layer, got layers \[0\]"):
        formats.from_vllm([vllm_response(ids_TLK)], 8)


def test_zero_rows_inside_a_sequence_are_refused():
    ids_TLK = draw_ids(6, 1, 2, 8)
    ids_TLK[2] = 0
    with pytest.raises(ValueError, match="1 rows that do not; the first is token 2, layer 0"):
        formats.join([ids_TLK], 8)


@pytest.mark.parametrize("bad", [-2, 8, 255])
def test_ids_out_of_range_are_refused(bad):
    ids_TLK = draw_ids(4, 1, 2, 8).astype(np.int16)
    ids_TLK[1, 0, 1] = bad
    with pytest.raises(ValueError, match=r"must lie in \[0, 8\) or be -1, got 1 other"):
        formats.join([ids_TLK], 8)


def test_missing_ids_stay_out_of_the_load():
    ids_TLK = draw_ids(4, 1, 2, 8).astype(np.int8)
    ids_TLK[1] = -1
    ids_TLK[2, 0, 1] = -1
    assert formats.join([ids_TLK], 8).pack(1).loads().sum() == 8 - 2 - 1


@pytest.mark.parametrize("filler", [0, -1], ids=["zeros", "sentinel"])
def test_verl_padded_tensor(filler):
    ids_STLK = np.full((2, 6, 2, 2), filler, np.int16)
    mask_ST = np.zeros((2, 6), np.int64)
    first, second = draw_ids(3, 2, 2, 300), draw_ids(4, 2, 2, 300, seed=1)
    ids_STLK[0, 2:5], mask_ST[0, 2:6] = first, 1  # left-padded, one filler row at the end
    ids_STLK[1, :4], mask_ST[1, :4] = second, 1  # recorded in the trainer: no filler
    routes = formats.from_verl(torch.from_numpy(ids_STLK), torch.from_numpy(mask_ST), 300)
    assert routes.sequence_start.tolist() == [0, 4, 8]
    assert routes.row_mask_T.tolist() == [True, True, True, False, True, True, True, True]
    np.testing.assert_array_equal(routes.ids_TLK[:3], first)
    np.testing.assert_array_equal(routes.ids_TLK[4:], second)


def test_verl_jagged_tensor_equals_padded():
    first, second = draw_ids(3, 2, 2, 9), draw_ids(5, 2, 2, 9, seed=1)
    pieces = [torch.from_numpy(ids.astype(np.int16)) for ids in (first, second)]
    nested = torch.nested.as_nested_tensor(pieces, layout=torch.jagged)
    routes = formats.from_verl(nested, None, 9)
    np.testing.assert_array_equal(routes.ids_TLK, np.concatenate([first, second]))
    assert routes.row_mask_T is None


def test_verl_needs_a_mask_of_the_right_shape():
    ids_STLK = np.zeros((2, 3, 1, 1), np.int16)
    with pytest.raises(ValueError, match="with an attention_mask"):
        formats.from_verl(ids_STLK, None, 4)
    with pytest.raises(ValueError, match=r"attention_mask must be \[2, 3\], got \[3, 2\]"):
        formats.from_verl(ids_STLK, np.ones((3, 2)), 4)


def test_slime_lists_drop_dense_layers_and_mask_the_last_token():
    samples = [torch.from_numpy(with_dense_layer(draw_ids(n, 2, 2, 8))) for n in (3, 5)]
    routes = formats.from_slime(samples, 8, total_lengths=[4, 6], moe_layers=REAL_LAYERS)
    assert routes.sequence_start.tolist() == [0, 4, 10]
    assert routes.pack(1).loads().sum() == (3 + 5) * 2 * 2


def megatron_records():
    """Two steps; two micro-batches in the first; ranks 0 and 1; layers 3 and 5."""
    for step, micro_batch in ((0, 0), (0, 1), (4, 0)):
        for rank in (0, 1):
            ids_TLK = draw_ids(2 + rank, 2, 2, 8, seed=10 * step + 2 * micro_batch + rank)
            for place, layer in enumerate((3, 5)):
                yield {
                    "step": step,
                    "stage": "pre_dispatch",
                    "block": "decoder",
                    "layer": layer,
                    "rank": rank,
                    "num_tokens": 2 + rank,
                    "topk": 2,
                    "top_indices": ids_TLK[:, place].tolist(),
                }


def test_megatron_records_keep_micro_batches_and_ranks():
    mtp = next(megatron_records()) | {"block": "mtp", "mtp_idx": 0}
    trace = formats.from_megatron([mtp, *megatron_records()], 8)
    assert trace.num_micro_batches == 3 and trace.num_layers == 2
    assert trace.micro_batch_T.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert trace.source_rank_T.tolist() == [0, 0, 1, 1, 1] * 3
    np.testing.assert_array_equal(trace.ids_of(2)[2:], draw_ids(3, 2, 2, 8, seed=41))
    only_five = formats.from_megatron(megatron_records(), 8, moe_layers=[5])
    np.testing.assert_array_equal(only_five.ids_TLK[:, 0], trace.ids_TLK[:, 1])


def test_megatron_layers_of_unequal_length_are_refused():
    records = list(megatron_records())[:-1]
    with pytest.raises(ValueError, match=r"equal tokens in every layer.*step 4, rank 1"):
        formats.from_megatron(records, 8)
    with pytest.raises(ValueError, match="at least one decoder layer"):
        formats.from_megatron([], 8)


def fingerprint(ids_TLK, category):
    return {
        "dataset": "quiz",
        "category": category,
        "router_data": [
            {
                f"token_{195 + t}": {
                    f"layer_{layer}": {"selected_experts": ids.tolist(), "selected_probs": [0.5]}
                    for layer, ids in enumerate(row)
                }
            }
            for t, row in enumerate(ids_TLK)
        ],
    }


def test_fingerprint_folder(tmp_path):
    ids_TLK = draw_ids(12, 11, 4, 32)  # tokens 195..206 and layers 0..10 do not sort as text
    (tmp_path / "a").mkdir()
    for name in ("False", "True"):
        text = json.dumps(fingerprint(ids_TLK, name))
        (tmp_path / "a" / f"{name}_examples.json").write_text(text)
    (tmp_path / "a" / "True.json").write_text("{}")
    routes = formats.read(tmp_path)
    assert routes.domain_S.tolist() == ["quiz/False", "quiz/True"]
    np.testing.assert_array_equal(routes.ids_TLK, np.concatenate([ids_TLK, ids_TLK]))


def test_plain_npz_round_trip(tmp_path):
    routes = formats.join(
        [draw_ids(4, 2, 2, 300), draw_ids(3, 2, 2, 300)],
        300,
        num_tokens_S=[5, 3],
        domain_S=["a", "b"],
    )
    formats.write_npz(tmp_path / "routes.npz", routes)
    again = formats.read(tmp_path / "routes.npz")
    for name in ("ids_TLK", "sequence_start", "domain_S", "row_mask_T"):
        np.testing.assert_array_equal(getattr(again, name), getattr(routes, name))
    assert again.num_experts == 300
    np.testing.assert_array_equal(
        again.pack(2, 3, "domain").loads(), routes.pack(2, 3, "domain").loads()
    )


def test_plain_npz_without_experts_needs_them(tmp_path):
    np.savez(tmp_path / "x.npz", ids_TLK=draw_ids(4, 2, 2, 8))
    with pytest.raises(ValueError, match="num_experts must be given"):
        formats.read(tmp_path / "x.npz")
    assert formats.read(tmp_path / "x.npz", num_experts=8).sequence_start.tolist() == [0, 4]


def write_lines(path, documents):
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


@pytest.mark.parametrize("format", ["trace", "vllm", "sglang", "megatron", "verl", "slime"])
def test_read_detects_the_format(tmp_path, format):
    ids_TLK = draw_ids(4, 2, 2, 8)
    path = tmp_path / {"trace": "t.npz", "verl": "t.pt", "slime": "t.pt"}.get(format, "t.jsonl")
    if format == "trace":
        Trace(ids_TLK, [0, 0, 1, 1], [0, 1, 0, 1], 8).save(path)
    elif format == "vllm":
        write_lines(path, [vllm_response(ids_TLK)])
    elif format == "sglang":
        write_lines(path, [{"meta_info": {"routed_experts": to_sglang(ids_TLK)}}])
    elif format == "megatron":
        write_lines(path, megatron_records())
    elif format == "verl":
        ids_STLK = torch.from_numpy(ids_TLK)[None]
        torch.save({"routed_experts": ids_STLK, "attention_mask": torch.ones(1, 4)}, path)
    else:
        sample = {"rollout_routed_experts": ids_TLK.astype(np.int32), "tokens": [1] * 5}
        torch.save({"samples": [sample]}, path)
    assert formats.detect(path) == format
    read = formats.read(path, num_experts=8, num_layers=2, top_k=2)
    expected = 15 if format == "megatron" else 4
    trace = read if isinstance(read, Trace) else read.pack(1)
    assert trace.loads().sum() == expected * 2 * 2


def test_read_asks_for_what_the_format_lacks(tmp_path):
    path = tmp_path / "t.jsonl"
    write_lines(path, [{"meta_info": {"routed_experts": to_sglang(draw_ids(4, 2, 2, 8))}}])
    with pytest.raises(ValueError, match="num_experts must be given for format sglang"):
        formats.read(path)
    with pytest.raises(ValueError, match="num_layers and top_k must be given"):
        formats.read(path, num_experts=8)
    with pytest.raises(ValueError, match="format must be auto or one of"):
        formats.read(path, "xml", num_experts=8)
    with pytest.raises(ValueError, match="path must be recorded routing"):
        formats.read(tmp_path / "missing.bin")
