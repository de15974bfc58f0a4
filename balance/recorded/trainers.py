"""What trainers carry: verl's padded or jagged tensors, slime's lists, Megatron's router trace."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from balance.recorded.routes import Routes, join, select_layers
from balance.trace import Trace


def from_verl(
    routed_experts: Any,
    attention_mask: Any | None,
    num_experts: int,
    moe_layers: Sequence[int] | None = None,
    label: str = "verl",
) -> Routes:
    """Routes of verl's ``routed_experts``.

    Args:
        routed_experts: [bs, seq, layers, K] int16 (any integer dtype), or a jagged nested tensor.
            Routing from rollout has one filler row of zeros at the end of each sequence, which is
            masked; routing recorded in the trainer has none.
        attention_mask: [bs, seq], nonzero where there is a token; None for a nested tensor.
        num_experts: logical experts of a layer.
        moe_layers: layers to keep, when the tensor has all layers of the model.
        label: where the routes come from.

    Raises:
        ValueError: on a mask of another shape, or what ``join`` refuses.
    """
    if getattr(routed_experts, "is_nested", False):
        sequences = [piece.numpy() for piece in routed_experts.unbind()]
        return join(sequences, num_experts, moe_layers=moe_layers, label=label)
    ids_STLK = np.asarray(routed_experts)
    if ids_STLK.ndim != 4 or attention_mask is None:
        raise ValueError(
            "routed_experts must be nested, or [bs, seq, layers, K] with an attention_mask, got "
            f"{list(ids_STLK.shape)}"
        )
    mask_ST = np.asarray(attention_mask) != 0
    if mask_ST.shape != ids_STLK.shape[:2]:
        raise ValueError(
            f"attention_mask must be {list(ids_STLK.shape[:2])}, got {list(mask_ST.shape)}"
        )
    sequences = [ids[mask] for ids, mask in zip(ids_STLK, mask_ST, strict=True)]
    return join(sequences, num_experts, moe_layers=moe_layers, label=label)


def from_slime(
    rollout_routed_experts: Sequence[Any],
    num_experts: int,
    total_lengths: Sequence[int] | None = None,
    moe_layers: Sequence[int] | None = None,
    label: str = "slime",
) -> Routes:
    """Routes of slime's list of [tokens - 1, layers, K] int32 arrays, before it pads them.

    Args:
        rollout_routed_experts: one array or tensor per sample.
        num_experts: logical experts of a layer.
        total_lengths: tokens of each sample; None means one more than its rows.
        moe_layers: layers to keep; dense layers hold zeros.
        label: where the routes come from.
    """
    sequences = [np.asarray(ids) for ids in rollout_routed_experts]
    lengths = [len(ids) + 1 for ids in sequences] if total_lengths is None else total_lengths
    return join(sequences, num_experts, moe_layers=moe_layers, num_tokens_S=lengths, label=label)


def from_megatron(
    records: Iterable[dict[str, Any]],
    num_experts: int,
    moe_layers: Sequence[int] | None = None,
    label: str = "Megatron",
) -> Trace:
    """A trace from the records of Megatron's router tracer: micro-batches and ranks are known.

    A step holds several records of one layer and rank when it has several micro-batches; their
    order is the order of the micro-batches. Layers of multi-token prediction are left out, since
    their numbers repeat those of the decoder. Trace without activation recomputation, which would
    show every micro-batch twice.

    Args:
        records: one dict per line: step, block, layer, rank, num_tokens, topk, top_indices.
        num_experts: logical experts of a layer.
        moe_layers: Megatron layer numbers to keep; None keeps all recorded.
        label: where the trace comes from.

    Raises:
        ValueError: on no records, layers of unequal length, or ids that ``Trace`` refuses.
    """
    groups: dict[tuple[int, int], dict[int, list[np.ndarray]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for record in records:
        if record.get("block", "decoder") != "decoder":
            continue
        ids_TK = np.array(record["top_indices"], np.int32).reshape(record["num_tokens"], -1)
        groups[record["step"], record["rank"]][record["layer"]].append(ids_TK)
    if not groups:
        raise ValueError("records must hold at least one decoder layer, got none")
    layers = sorted({layer for group in groups.values() for layer in group})
    if moe_layers is not None:
        layers = [layer for layer in layers if layer in set(moe_layers)]
    pieces = {key: _stack_layers(key, group, layers) for key, group in sorted(groups.items())}
    return _trace_of_groups(pieces, num_experts, label)


def read_megatron_records(path: Path) -> Iterable[dict[str, Any]]:
    """Records of one JSONL file, or of all ``router_trace_rank*.jsonl`` of a folder."""
    files = sorted(path.glob("router_trace_rank*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"path must hold router_trace_rank*.jsonl files, got {path}")
    for file in files:
        with open(file, encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())


def _stack_layers(
    key: tuple[int, int], group: dict[int, list[np.ndarray]], layers: list[int]
) -> list[np.ndarray]:
    """ids_TLK of each micro-batch of one step and rank."""
    lengths = {layer: [len(ids) for ids in group.get(layer, ())] for layer in layers}
    if len({tuple(length) for length in lengths.values()}) != 1:
        raise ValueError(
            f"records must have equal tokens in every layer, got {lengths} at step {key[0]}, "
            f"rank {key[1]}"
        )
    return [
        np.stack(ids_of_L, axis=1) for ids_of_L in zip(*(group[x] for x in layers), strict=True)
    ]


def _trace_of_groups(
    pieces: dict[tuple[int, int], list[np.ndarray]], num_experts: int, label: str
) -> Trace:
    """Number the micro-batches of all steps one after the other."""
    steps = sorted({step for step, _ in pieces})
    per_step = [max(len(ids) for (s, _), ids in pieces.items() if s == step) for step in steps]
    first_of_step = dict(zip(steps, np.cumsum([0, *per_step[:-1]]), strict=True))
    blocks = [
        (ids_TLK, first_of_step[step] + offset, rank)
        for (step, rank), group in pieces.items()
        for offset, ids_TLK in enumerate(group)
    ]
    blocks.sort(key=lambda block: block[1:])
    lengths = [len(ids_TLK) for ids_TLK, _, _ in blocks]
    return Trace(
        select_layers(np.concatenate([ids_TLK for ids_TLK, _, _ in blocks]), None),
        np.repeat([micro_batch for _, micro_batch, _ in blocks], lengths),
        np.repeat([rank for _, _, rank in blocks], lengths),
        num_experts,
        label=label,
    )
