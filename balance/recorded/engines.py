"""What inference engines return: SGLang and vLLM responses with routed experts in them.

Ids are logical (captured before any mapping to physical slots). Rows cover prompt and generated
tokens, except the last sampled one. Both engines return a row for every hidden layer; dense
layers hold zeros and are left out with ``moe_layers``.
"""

import base64
import binascii
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from balance.checks import whole
from balance.recorded.routes import Routes, join


def decode_sglang(payload: str | bytes, num_layers: int, top_k: int) -> np.ndarray:
    """ids [rows, num_layers, top_k] int32 from SGLang's base64 of little-endian int32.

    Args:
        payload: ``meta_info["routed_experts"]`` or ``sglext["routed_experts"]``.
        num_layers: hidden layers of the model, dense ones included; not in the payload.
        top_k: experts per token.

    Raises:
        ValueError: when the payload is not base64, or not whole rows of these sizes.
    """
    raw = _from_base64(payload)
    row_bytes = 4 * whole("num_layers", num_layers, 1) * whole("top_k", top_k, 1)
    if len(raw) % row_bytes:
        raise ValueError(
            f"payload must be whole rows of {num_layers} layers, {top_k} int32 each, got "
            f"{len(raw)} bytes"
        )
    return np.frombuffer(raw, "<i4").astype(np.int32).reshape(-1, num_layers, top_k)


def decode_vllm(payload: str | bytes) -> np.ndarray:
    """ids [rows, layers, top_k] from vLLM's base64 of a npy file; dtype as recorded.

    uint8 up to 256 experts, uint16 above; older builds int16 or int32.

    Raises:
        ValueError: when the payload is not base64 of an npy file with integers of rank 3.
    """
    raw = _from_base64(payload)
    ids_TLK = np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)
    if ids_TLK.ndim != 3 or ids_TLK.dtype.kind not in "iu":
        raise ValueError(
            f"payload must hold integers of rank 3, got {ids_TLK.dtype} {list(ids_TLK.shape)}"
        )
    return ids_TLK


def from_sglang(
    responses: Iterable[dict[str, Any]],
    num_experts: int,
    num_layers: int,
    top_k: int,
    moe_layers: Sequence[int] | None = None,
    label: str = "SGLang",
) -> Routes:
    """Routes of ``/generate`` or OpenAI-style responses; one without routed experts is refused.

    A prefix that the client asked not to get again (``routed_experts_start_len``) is not known
    here: concatenate its rows before decoding.
    """
    sequences, lengths = [], []
    for number, response in enumerate(responses):
        for payload, num_tokens in _sglang_payloads(response, number):
            ids_TLK = decode_sglang(payload, num_layers, top_k)
            sequences.append(ids_TLK)
            lengths.append(len(ids_TLK) + 1 if num_tokens is None else num_tokens)
    return join(sequences, num_experts, moe_layers=moe_layers, num_tokens_S=lengths, label=label)


def from_vllm(
    responses: Iterable[dict[str, Any]],
    num_experts: int,
    moe_layers: Sequence[int] | None = None,
    label: str = "vLLM",
) -> Routes:
    """Routes of completion responses: ``choices[i].routed_experts``.

    A choice that holds None was aborted before its first forward and has no tokens.
    """
    payloads = [
        payload
        for number, response in enumerate(responses)
        for payload in _vllm_payloads(response, number)
    ]
    sequences = [decode_vllm(payload) for payload in payloads]
    lengths = [len(ids_TLK) + 1 for ids_TLK in sequences]
    return join(sequences, num_experts, moe_layers=moe_layers, num_tokens_S=lengths, label=label)


def _vllm_payloads(response: dict[str, Any], number: int) -> list[str | bytes]:
    """The payload of each choice of a response that got as far as a forward."""
    choices = response.get("choices", ())
    if any("routed_experts" not in choice for choice in choices):
        raise ValueError(f"response {number} has a choice without routed_experts")
    payloads = [choice["routed_experts"] for choice in choices]
    return [payload for payload in payloads if payload is not None]


def _sglang_payloads(
    response: dict[str, Any], number: int
) -> list[tuple[str | bytes, int | None]]:
    """(payload, number of tokens or None) of each sequence of a response."""
    found: list[tuple[str | bytes, int | None]] = []
    for part in (response, *response.get("choices", ())):
        meta = part.get("meta_info") or part.get("sglext") or {}
        if meta.get("routed_experts") is not None:
            known = "prompt_tokens" in meta and "completion_tokens" in meta
            num_tokens = meta["prompt_tokens"] + meta["completion_tokens"] if known else None
            found.append((meta["routed_experts"], num_tokens))
    if not found:
        raise ValueError(f"response {number} has no routed_experts in meta_info or sglext")
    return found


def _from_base64(payload: str | bytes) -> bytes:
    """The bytes of a payload, or ValueError."""
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, TypeError) as error:
        raise ValueError(f"payload must be base64, got {str(payload)[:20]!r}: {error}") from error
