"""From recorded routing to a plan: reorder, replicate, split.

1. Homes, once per batch and layer (``balance.placement``); batch-static copies on other nodes
   (``balance.crossnode``) and the split between nodes.
2. Copies, per micro-batch, layer and node (``balance.nodes``).
3. Whole-token quotas, exactly optimal for the chosen copies (``balance.split``).

Deterministic: the same input gives the same plan on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from balance import bounds
from balance.batch import Batch, previous_homes
from balance.layout import home_slots_of, slot_arrays
from balance.nodes import Hosted, plan_nodes
from balance.placement import rehome, reorder_homes, spread_inside_nodes
from balance.plan import Plan, PlanOptions
from balance.replicate import Search
from balance.static import StaticCopies, choose_static_copies
from balance.swap import Nearness
from balance.topology import Topology
from balance.trace import Trace
from balance.traffic import chosen_together


def make_plan(
    trace_or_counts: Trace | Any,
    topology: Topology,
    *,
    previous: Plan | np.ndarray | None = None,
    options: PlanOptions | None = None,
    **changes: Any,
) -> Plan:
    """Plan a batch: which rank owns each expert, which experts get copies, who serves which token.

    Args:
        trace_or_counts: a ``Trace``; or integer counts load_BLRE (micro-batches, layers, source
            ranks, experts); or load_BLE when source ranks are unknown.
        topology: the machine.
        previous: the last plan, or its home_rank_LE; None means experts in order over all ranks.
            Moves are counted from it. Experts whose rank is missing now get a new home first.
        options: a ``PlanOptions``; None means the default one.
        **changes: single options, by their names in ``PlanOptions``.

    Returns:
        A legal plan. No layer is slower, summed over micro-batches, than with the previous homes
        and no copies, unless ``locality`` gave speed up for less travel.

    Raises:
        ValueError: counts, homes or options break a rule; the message names it.
    """
    started = time.perf_counter()
    options = replace(options or PlanOptions(), **changes)
    batch = Batch.make(trace_or_counts, topology, options)
    previous_LE, previous_slot_LE = previous_homes(previous, batch)
    idle_LE = rehome(previous_LE, batch.unit_BLE.sum(0), topology)
    with _one_thread():
        draft = _best_draft(batch, idle_LE)
    slot_LE = home_slots_of(draft.home_LE, topology, previous_slot_LE)
    arrays = slot_arrays(
        batch, slot_LE, draft.static_LM, draft.copy_BLM, draft.home_unit_BLE, draft.spare_unit_BLM
    )
    return Plan(
        topology,
        options,
        **arrays,
        home_slot_LE=slot_LE.astype(np.int32),
        load_BLRE=batch.load_BLRE,
        bound_BL=draft.bound_BL * options.tile_rows,
        previous_home_LE=previous_LE,
        plan_seconds=time.perf_counter() - started,
        trace=trace_or_counts if isinstance(trace_or_counts, Trace) else None,
    )


@dataclass
class _Draft:
    """A plan in units, over present ranks and host entries; see ``balance.nodes.Hosted``."""

    home_LE: np.ndarray
    static_LM: np.ndarray
    copy_BLM: np.ndarray
    home_unit_BLE: np.ndarray
    spare_unit_BLM: np.ndarray
    bound_BL: np.ndarray
    level_BL: np.ndarray

    def of_layers(self, chosen_L: np.ndarray) -> _Draft:
        """The same with some of its layers."""
        by_layer = [getattr(self, name)[chosen_L] for name in ("home_LE", "static_LM")]
        return _Draft(*by_layer, *(getattr(self, name)[:, chosen_L] for name in _DRAFT_BL))

    def put_layers(self, chosen_L: np.ndarray, other: _Draft) -> None:
        """Replace some layers."""
        self.home_LE[chosen_L], self.static_LM[chosen_L] = other.home_LE, other.static_LM
        for name in _DRAFT_BL:
            getattr(self, name)[:, chosen_L] = getattr(other, name)


_DRAFT_BL = ("copy_BLM", "home_unit_BLE", "spare_unit_BLM", "bound_BL", "level_BL")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tables are small: more threads wait for one another, and would sum in another order."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _best_draft(batch: Batch, idle_LE: np.ndarray) -> _Draft:
    """Every number of batch-static copies up to the limit, and for each layer the best of them."""
    options = batch.options
    home_LE = _reordered(batch, idle_LE) if options.reorder else idle_LE
    free = options.reorder and options.move_budget is None
    draft = _draft(batch, home_LE, 0, free)
    for copies_per_node in range(1, options.cross_node_copies + 1):
        other = _draft(batch, home_LE, copies_per_node, free)
        better_L = other.level_BL.sum(0) < draft.level_BL.sum(0)
        draft.put_layers(better_L, other.of_layers(better_L))
    # Homes chosen for the nodes' sake can, rarely, leave ranks that few spare slots cannot level.
    worse_L = draft.level_BL.sum(0) > _level_without_copies(batch, idle_LE).sum(0) * (1 + 1e-9)
    if worse_L.any() and not options.locality:
        draft.put_layers(worse_L, _draft(batch.of_layers(worse_L), idle_LE[worse_L], 0, False))
    return draft


def _draft(
    batch: Batch, home_LE: np.ndarray, copies_per_node: int, homes_are_free: bool
) -> _Draft:
    """Copies and quotas for given homes; free ones are suited to the batch-static copies."""
    present, options = batch.present, batch.options
    num_experts = home_LE.shape[1]
    rank_LE = np.searchsorted(present.ranks, home_LE)
    spares = batch.topology.spare_slots_per_rank
    static = choose_static_copies(batch.unit_BLE, rank_LE, present, spares, copies_per_node)
    if homes_are_free and copies_per_node:
        load_LE = batch.unit_BLE.sum(0)
        surplus_LD = static.surplus(load_LE, present)
        rank_LE = spread_inside_nodes(load_LE, rank_LE, present, surplus_LD)
    local_BLDE = batch.local_BLDE()
    share_BLS = static.shares(batch.unit_BLE, rank_LE, present)
    rest_BLE = batch.unit_BLE - static.served(share_BLS, num_experts)
    hosted = _hosted(rest_BLE, share_BLS, rank_LE, static, local_BLDE)
    search = Search(
        tolerance=options.tolerance,
        min_load=max(1, -(-options.min_tokens_per_replica // options.tile_rows)),
    )
    plans = plan_nodes(hosted, present, spares, search, search.min_load)
    left_BLZ = hosted.load_BLZ - plans.taken_BLZ
    static_LM = np.full(plans.copy_BLM.shape[1:], -1)
    static.put(static_LM, static.copy_LS)
    spare_unit_BLM = plans.quota_BLM
    static.put(spare_unit_BLM, left_BLZ[:, :, num_experts:-1])
    bound_BL = _bound(batch, rank_LE, static, plans.bound_BL)
    home_unit_BLE = left_BLZ[:, :, :num_experts]
    load_BLD = present.rank_load(home_unit_BLE, rank_LE)
    load_BLD = load_BLD + spare_unit_BLM.reshape(*load_BLD.shape, spares).sum(3)
    level_BL = (load_BLD / present.speed_D).max(2)
    return _Draft(
        present.ranks[rank_LE],
        static_LM,
        plans.copy_BLM,
        home_unit_BLE,
        spare_unit_BLM,
        bound_BL,
        level_BL,
    )


def _hosted(
    rest_BLE: np.ndarray,
    share_BLS: np.ndarray,
    rank_LE: np.ndarray,
    static: StaticCopies,
    local_BLDE: np.ndarray | None,
) -> Hosted:
    """Home experts, batch-static copies and one empty entry, side by side."""
    num_layers, num_experts = rank_LE.shape
    nothing = np.full((num_layers, 1), -1)
    expert_LE = np.tile(np.arange(num_experts), (num_layers, 1))
    return Hosted(
        np.concatenate([rest_BLE, share_BLS, np.zeros_like(rest_BLE[:, :, :1])], axis=2),
        np.concatenate([expert_LE, static.copy_LS, nothing], axis=1),
        np.concatenate([rank_LE, static.rank_LS, nothing], axis=1),
        np.concatenate([np.full_like(rank_LE, -1), static.spare_LS, nothing], axis=1),
        local_BLDE,
    )


def _bound(
    batch: Batch, rank_LE: np.ndarray, static: StaticCopies, node_bound_BL: np.ndarray
) -> np.ndarray:
    """Lower bound of the level, homes and batch-static copies given.

    Without batch-static copies the load of each node is given, and so are its own bounds; with
    them, only the load that no node outside a set of nodes can serve.
    """
    present = batch.present
    total_N = torch.from_numpy(batch.unit_BLE.sum(2).ravel())
    ideal_N = bounds.ideal_level(total_N, torch.from_numpy(present.speed_D))
    ideal_BL = ideal_N.numpy().reshape(node_bound_BL.shape)
    if not static.copy_LS.shape[1]:
        return np.maximum(ideal_BL, node_bound_BL)
    level_N = bounds.node_level(*static.node_problem(batch.unit_BLE, rank_LE, present))
    return np.maximum(ideal_BL, level_N.numpy().reshape(ideal_BL.shape))


def _reordered(batch: Batch, idle_LE: np.ndarray) -> np.ndarray:
    nearness = None
    if batch.options.locality > 0:
        near_LED = np.zeros((*idle_LE.shape, batch.topology.num_ranks))
        if batch.knows_sources:
            near_LED = batch.load_BLRE.sum(0).transpose(0, 2, 1).astype(np.float64)
        together_LEE = None if batch.trace is None else chosen_together(batch.trace)
        nearness = Nearness(batch.options.locality, near_LED, together_LEE)
    return reorder_homes(
        batch.unit_BLE, idle_LE, batch.topology, batch.options.move_budget, nearness
    )


def _level_without_copies(batch: Batch, home_LE: np.ndarray) -> np.ndarray:
    present = batch.present
    rank_LE = np.searchsorted(present.ranks, home_LE)
    load_BLD = present.rank_load(batch.unit_BLE, rank_LE)
    return (load_BLD / present.speed_D).max(2)
