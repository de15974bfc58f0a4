"""What kind of recording is this, and who reads it?

All readers end in ``Routes`` (whole sequences, to be packed) or, where micro-batches and ranks
were recorded, in a ``Trace``.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from balance.recorded import FORMATS
from balance.recorded.engines import from_sglang, from_vllm
from balance.recorded.files import read_fingerprints, read_npz
from balance.recorded.routes import Routes
from balance.recorded.trainers import from_megatron, from_slime, from_verl, read_megatron_records
from balance.trace import Trace


def read(
    path: str | PathLike[str],
    format: str = "auto",
    *,
    num_experts: int | None = None,
    num_layers: int | None = None,
    top_k: int | None = None,
    moe_layers: Sequence[int] | None = None,
    on_file: Callable[[], object] = lambda: None,
) -> Trace | Routes:
    """Read recorded routing from a file or folder.

    Args:
        path: what to read.
        format: one of ``FORMATS``, or "auto" to tell from the content.
        num_experts: logical experts of a layer; needed where the format does not say
            (all but trace, npz and fingerprint).
        num_layers, top_k: of the model; needed for SGLang, whose payload has no shape.
        moe_layers: layers to keep where dense layers were recorded too.
        on_file: called after each file of a folder of fingerprints, for a progress bar.

    Raises:
        ValueError: on an unknown format, a missing argument, or ids that would be miscounted.
    """
    path = Path(path)
    if format == "auto":
        format = detect(path)
    if format not in FORMATS:
        raise ValueError(f"format must be auto or one of {', '.join(FORMATS)}, got {format!r}")
    layers = None if moe_layers is None else list(moe_layers)
    if format == "trace":
        return Trace.load(path)
    if format == "npz":
        return read_npz(path, num_experts, layers)
    if format == "fingerprint":
        return read_fingerprints(path, num_experts, layers, on_file)
    if num_experts is None:
        raise ValueError(f"num_experts must be given for format {format}, got None")
    if format == "megatron":
        return from_megatron(read_megatron_records(path), num_experts, layers, path.name)
    if format == "vllm":
        return from_vllm(_responses(path), num_experts, layers, path.name)
    if format == "sglang":
        if num_layers is None or top_k is None:
            raise ValueError(f"num_layers and top_k must be given, got {num_layers} and {top_k}")
        return from_sglang(_responses(path), num_experts, num_layers, top_k, layers, path.name)
    return _read_tensors(path, format, num_experts, layers)


def detect(path: Path) -> str:
    """Which of ``FORMATS`` a file or folder is.

    Raises:
        ValueError: when it is none of them, or missing.
    """
    if path.is_dir():
        if any(path.glob("router_trace_rank*.jsonl")):
            return "megatron"
        if any(path.rglob("*_examples.json")):
            return "fingerprint"
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return "trace" if "micro_batch_T" in arrays else "npz"
    elif path.suffix in (".json", ".jsonl"):
        return _detect_json(path)
    elif path.suffix in (".pt", ".pth"):
        return "verl" if "routed_experts" in _load_tensors(path) else "slime"
    raise ValueError(f"path must be recorded routing (npz, json, jsonl, pt or folder), got {path}")


def _detect_json(path: Path) -> str:
    """Which format a JSON file is, by the keys of its first object."""
    first = next(_responses(path), {})
    if "router_data" in first:
        return "fingerprint"
    if "top_indices" in first:
        return "megatron"
    choices = first.get("choices") or [{}]
    if "routed_experts" in choices[0]:
        return "vllm"
    if any(name in part for part in (first, choices[0]) for name in ("meta_info", "sglext")):
        return "sglang"
    raise ValueError(f"path must hold routed experts, {path} starts with keys {list(first)}")


def _responses(path: Path) -> Iterator[dict[str, Any]]:
    """JSON objects of a .jsonl file, or of a .json file with one of them or a list."""
    with open(path, encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            documents: Any = (json.loads(line) for line in file if line.strip())
        else:
            documents = [json.load(file)]
        for document in documents:
            yield from document if isinstance(document, list) else [document]


def _read_tensors(
    path: Path, format: str, num_experts: int, moe_layers: list[int] | None
) -> Routes:
    """Routes of a file that torch saved: verl's batch, slime's samples or their lists."""
    data = _load_tensors(path)
    if format == "verl":
        mask = data.get("attention_mask")
        return from_verl(data["routed_experts"], mask, num_experts, moe_layers, path.name)
    samples = data.get("samples")
    if samples is not None:
        data = {
            "rollout_routed_experts": [sample["rollout_routed_experts"] for sample in samples],
            "total_lengths": [len(sample["tokens"]) for sample in samples],
        }
    return from_slime(
        data["rollout_routed_experts"],
        num_experts,
        data.get("total_lengths"),
        moe_layers,
        path.name,
    )


def _load_tensors(path: Path) -> dict[str, Any]:
    """A saved dict of tensors or numpy arrays; nothing that could run code is unpickled."""
    import torch

    # How numpy arrays pickle themselves, under its name in numpy 1 and 2.
    rebuild = np.zeros(0).__reduce__()[0]
    names = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
    dtypes = {type(np.dtype(code)) for code in "bBhHiIlL"}
    numpy_types: list[Any] = [np.ndarray, np.dtype, *dtypes, *((rebuild, name) for name in names)]
    with torch.serialization.safe_globals(numpy_types):
        data = torch.load(path, map_location="cpu", weights_only=True)
    known = ("routed_experts", "rollout_routed_experts", "samples")
    if not isinstance(data, dict) or not any(name in data for name in known):
        raise ValueError(f"path must hold a dict with one of {', '.join(known)}, got {path}")
    return data
