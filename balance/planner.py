"""From recorded routing to a plan: reorder, replicate, split.

1. Homes, once per batch and layer (``balance.steps.homes``); batch-static copies on other nodes
   (``balance.steps.batch_copies``) and the split between nodes.
2. Copies, per micro-batch, layer and node (``balance.steps.inside_nodes``).
3. Whole-token quotas, exactly optimal for the chosen copies (``balance.exact.split``).

Deterministic: the same input gives the same plan on every rank.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from balance.measures.traffic import chosen_together
from balance.options import PlanOptions
from balance.plan import Plan
from balance.steps.candidate import Candidate, make_candidate
from balance.steps.homes import rehome, reorder_homes
from balance.steps.loads import Batch, previous_homes
from balance.steps.nearness import Nearness
from balance.steps.slots import home_slots_of, slot_arrays
from balance.topology import Topology
from balance.trace import Trace


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
        chosen = _best_candidate(batch, idle_LE, previous_LE)
    slot_LE = home_slots_of(chosen.home_LE, topology, previous_slot_LE)
    return Plan(
        topology,
        options,
        **slot_arrays(batch, slot_LE, chosen),
        home_slot_LE=slot_LE.astype(np.int32),
        load_BLRE=batch.load_BLRE,
        bound_BL=chosen.bound_BL * options.tile_rows,
        previous_home_LE=previous_LE,
        plan_seconds=time.perf_counter() - started,
        trace=batch.trace,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tables are small: more threads wait for one another, and would sum in another order."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _best_candidate(batch: Batch, idle_LE: np.ndarray, previous_LE: np.ndarray) -> Candidate:
    """Every number of batch-static copies up to the limit, and for each layer the best of them."""
    options, present = batch.options, batch.present
    home_LE = _reordered(batch, idle_LE) if options.reorder else idle_LE
    before_LE = None
    if options.reorder and options.move_budget is None and not options.locality:
        is_here_LE = np.isin(previous_LE, present.ranks)
        before_LE = np.where(is_here_LE, np.searchsorted(present.ranks, previous_LE), -1)
    best = make_candidate(batch, home_LE, 0, before_LE)
    for copies_per_node in range(1, options.cross_node_copies + 1):
        other = make_candidate(batch, home_LE, copies_per_node, before_LE)
        better_L = other.level_BL.sum(0) < best.level_BL.sum(0)
        best.put_layers(better_L, other.of_layers(better_L))
    # Homes chosen for the nodes' sake can, rarely, leave ranks that few spare slots cannot level.
    worse_L = best.level_BL.sum(0) > _level_without_copies(batch, idle_LE).sum(0) * (1 + 1e-9)
    if worse_L.any() and not options.locality:
        best.put_layers(
            worse_L, make_candidate(batch.of_layers(worse_L), idle_LE[worse_L], 0, None)
        )
    return best


def _reordered(batch: Batch, idle_LE: np.ndarray) -> np.ndarray:
    """Home ranks chosen anew; with ``locality``, near their tokens and their companions."""
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
    """Units / speed of the slowest rank when nobody but the homes serves, level_BL."""
    present = batch.present
    rank_LE = np.searchsorted(present.ranks, home_LE)
    load_BLD = present.rank_load(batch.unit_BLE, rank_LE)
    return (load_BLD / present.speed_D).max(2)
