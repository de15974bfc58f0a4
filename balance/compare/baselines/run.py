"""Every baseline by name, run and measured on the planner's terms.

Every method gets the same loads and topology and is measured the same way. "Oracle" methods know
the loads of the batch or micro-batch they plan for, which needs recorded routing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from balance.compare.baselines.common import Baseline, Served, at_home
from balance.compare.baselines.eplb import (
    eplb_from_past,
    eplb_per_batch,
    eplb_per_micro_batch,
)
from balance.compare.baselines.greedy import spill, threshold
from balance.compare.baselines.linear import eplb_and_linear_split
from balance.compare.baselines.reorder import anneal_and_copy, migrate
from balance.measures.load import check_loads, tile_rank_load
from balance.topology import Topology


def none(load_BE: np.ndarray, topology: Topology) -> Served:
    """Experts in order, no copies: what a trainer does when nobody plans."""
    home_rank_E = topology.contiguous_home_rank_E(load_BE.shape[1])
    nothing_B = np.zeros(len(load_BE), np.int64)
    return Served(at_home(load_BE, home_rank_E, topology.num_ranks), nothing_B, nothing_B)


BASELINES: dict[str, Baseline] = {
    "none (contiguous)": none,
    "EPLB, past loads": eplb_from_past,
    "EPLB, oracle per batch": eplb_per_batch,
    "EPLB, oracle per micro-batch": eplb_per_micro_batch,
    "EPLB oracle + LP split (LPLB-like)": eplb_and_linear_split,
    "greedy threshold (UltraEP-like)": threshold,
    "least-loaded spill (LLEP-like)": spill,
    "expert migration (FEPLB-like)": migrate,
    "annealed order + greedy copies (ReLibra-like)": anneal_and_copy,
}


@dataclass(frozen=True)
class Outcome:
    """What a method achieves on a batch.

    Attributes:
        name: of the method.
        rank_load_BLR: assignments on each rank, float64.
        tile_load_BLR: the same with every copy rounded up to whole tiles.
        copies_BL: copies beyond one per expert.
        arrivals_BL: expert weights that reach a rank which did not hold them before.
        plan_seconds: time to plan the batch, all layers, on this machine.
    """

    name: str
    rank_load_BLR: np.ndarray
    tile_load_BLR: np.ndarray
    copies_BL: np.ndarray
    arrivals_BL: np.ndarray
    plan_seconds: float


def run_baseline(
    name: str,
    load_BLE: Any,
    topology: Topology,
    *,
    tile: int = 128,
    on_layer: Callable[[], object] = lambda: None,
) -> Outcome:
    """Plan every layer with one method and measure the result.

    Args:
        name: a key of ``BASELINES``.
        load_BLE: assignments per micro-batch, layer and expert; finite, not negative.
        topology: the machine.
        tile: rows of a tile for the tile-rounded loads.
        on_layer: called after each layer, for a progress bar.

    Raises:
        ValueError: on an unknown name, bad loads, or a topology the method cannot serve.
    """
    if name not in BASELINES:
        raise ValueError(f"name must be one of {', '.join(BASELINES)}, got {name!r}")
    load_BLE = check_loads("load_BLE", load_BLE)
    if load_BLE.ndim != 3:
        raise ValueError(f"load_BLE must have three axes, got {list(load_BLE.shape)}")
    B, L, _ = load_BLE.shape
    rank_load_BLR, tile_load_BLR = np.zeros((2, B, L, topology.num_ranks))
    copies_BL, arrivals_BL = np.zeros((2, B, L), np.int64)
    seconds = 0.0
    for layer in range(L if B else 0):
        start = perf_counter()
        served = BASELINES[name](load_BLE[:, layer], topology)
        seconds += perf_counter() - start
        rank_load_BLR[:, layer] = served.load_BER.sum(1)
        tile_load_BLR[:, layer] = tile_rank_load(served.load_BER, tile)
        copies_BL[:, layer], arrivals_BL[:, layer] = served.copies_B, served.arrivals_B
        on_layer()
    return Outcome(name, rank_load_BLR, tile_load_BLR, copies_BL, arrivals_BL, seconds)
