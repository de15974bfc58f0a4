"""Reading: the format is told from the content, and what it lacks is asked for."""

import json

import numpy as np
import pytest
import torch

from balance.recorded.read import detect, read
from balance.trace import Trace
from tests.balance.recorded.recordings import (
    draw_ids,
    megatron_records,
    to_sglang,
    vllm_response,
)


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
    assert detect(path) == format
    found = read(path, num_experts=8, num_layers=2, top_k=2)
    expected = 15 if format == "megatron" else 4
    trace = found if isinstance(found, Trace) else found.pack(1)
    assert trace.loads().sum() == expected * 2 * 2


def test_read_asks_for_what_the_format_lacks(tmp_path):
    path = tmp_path / "t.jsonl"
    write_lines(path, [{"meta_info": {"routed_experts": to_sglang(draw_ids(4, 2, 2, 8))}}])
    with pytest.raises(ValueError, match="num_experts must be given for format sglang"):
        read(path)
    with pytest.raises(ValueError, match="num_layers and top_k must be given"):
        read(path, num_experts=8)
    with pytest.raises(ValueError, match="format must be auto or one of"):
        read(path, "xml", num_experts=8)
    with pytest.raises(ValueError, match="path must be recorded routing"):
        read(tmp_path / "missing.bin")
