"""Plain files: npz with ids, and the JSON of the gpt-oss fingerprinting data set."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from balance.recorded.routes import Routes, check_routes, join, select_layers

_FINGERPRINT_EXPERTS = 32


def read_npz(
    path: Path, num_experts: int | None = None, moe_layers: list[int] | None = None
) -> Routes:
    """Routes of an npz with ``ids_TLK`` and, when known, more.

    Optional arrays: ``sequence_start`` [S + 1] offsets (else one sequence), ``domain`` [S],
    ``row_mask_T`` bool, ``num_experts`` (else the argument).

    Raises:
        ValueError: when ids or the number of experts are missing, or ids are bad.
    """
    with np.load(path, allow_pickle=False) as arrays:
        if "ids_TLK" not in arrays:
            raise ValueError(f"path must hold ids_TLK, {path} has {', '.join(arrays.files)}")
        if num_experts is None and "num_experts" not in arrays:
            raise ValueError(f"num_experts must be given, {path} does not hold it")
        ids_TLK = select_layers(arrays["ids_TLK"], moe_layers)
        whole = np.array([0, len(ids_TLK)])
        routes = Routes(
            ids_TLK,
            arrays.get("sequence_start", whole),
            int(arrays["num_experts"]) if num_experts is None else num_experts,
            tuple(range(ids_TLK.shape[1]) if moe_layers is None else moe_layers),
            arrays.get("row_mask_T"),
            arrays.get("domain"),
            path.stem,
        )
    check_routes(routes)
    return routes


def write_npz(path: Path, routes: Routes) -> None:
    """Write routes in the layout that ``read_npz`` reads."""
    arrays: dict[str, Any] = {
        "ids_TLK": routes.ids_TLK,
        "sequence_start": routes.sequence_start,
        "num_experts": np.int64(routes.num_experts),
    }
    if routes.domain_S is not None:
        arrays["domain"] = routes.domain_S
    if routes.row_mask_T is not None:
        arrays["row_mask_T"] = routes.row_mask_T
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def read_fingerprints(
    path: Path,
    num_experts: int | None = None,
    moe_layers: list[int] | None = None,
    on_file: Callable[[], object] = lambda: None,
) -> Routes:
    """Routes of one ``*_examples.json``, or of all below a folder, each one generation.

    Layout: ``router_data`` is a list of ``token_<position>`` → ``layer_<l>`` →
    ``selected_experts``, best first; ``dataset`` and ``category`` make the domain. Generated
    tokens only. The number of experts is gpt-oss-20b's when not given.
    """
    files = sorted(path.rglob("*_examples.json")) if path.is_dir() else [path]
    sequences, domains = [], []
    for file in files:
        generation = json.loads(file.read_text(encoding="utf-8"))
        ids_TLK = _fingerprint_ids(generation)
        if len(ids_TLK):
            sequences.append(ids_TLK)
            domains.append(f"{generation.get('dataset', '')}/{generation.get('category', '')}")
        on_file()
    if not sequences:
        raise ValueError(f"path must hold *_examples.json with router_data, got {path}")
    return join(
        sequences,
        _FINGERPRINT_EXPERTS if num_experts is None else num_experts,
        moe_layers=moe_layers,
        domain_S=domains,
        label=f"{path.stem} fingerprints",
    )


def _fingerprint_ids(generation: dict[str, Any]) -> np.ndarray:
    """ids_TLK of one generation, tokens by position and layers by number."""
    token_of_position = {
        _number(name): layers
        for entry in generation["router_data"]
        for name, layers in entry.items()
    }
    rows = [token_of_position[position] for position in sorted(token_of_position)]
    ids = [
        [layers[name]["selected_experts"] for name in sorted(layers, key=_number)]
        for layers in rows
    ]
    return np.array(ids, np.int16) if ids else np.zeros((0, 1, 1), np.int16)


def _number(name: str) -> int:
    """7 of "token_7" or "layer_7"."""
    return int(name.rpartition("_")[2])
