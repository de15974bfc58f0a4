"""Recordings made up: ids, and the bytes in which engines and trainers hand them over."""

import base64
import io

import numpy as np


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
