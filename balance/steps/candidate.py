"""One way to place and split a batch, homes given: batch-static copies, copies, units."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from balance.exact import bounds
from balance.steps.across_nodes import Splits, level_across_nodes
from balance.steps.copies import Search
from balance.steps.inside_nodes import Hosted, plan_nodes
from balance.steps.loads import Batch
from balance.steps.rename_ranks import keep_most
from balance.steps.static_copies import StaticCopies, choose_static_copies


@dataclass
class Draft:
    """A plan in units, over present ranks and host entries; see ``balance.steps.inside_nodes.Hosted``."""

    home_LE: np.ndarray
    static_LM: np.ndarray
    copy_BLM: np.ndarray
    home_unit_BLE: np.ndarray
    spare_unit_BLM: np.ndarray
    bound_BL: np.ndarray
    level_BL: np.ndarray

    def of_layers(self, chosen_L: np.ndarray) -> Draft:
        """The same with some of its layers."""
        by_layer = [getattr(self, name)[chosen_L] for name in ("home_LE", "static_LM")]
        return Draft(*by_layer, *(getattr(self, name)[:, chosen_L] for name in _DRAFT_BL))

    def put_layers(self, chosen_L: np.ndarray, other: Draft) -> None:
        """Replace some layers."""
        self.home_LE[chosen_L], self.static_LM[chosen_L] = other.home_LE, other.static_LM
        for name in _DRAFT_BL:
            getattr(self, name)[:, chosen_L] = getattr(other, name)


_DRAFT_BL = ("copy_BLM", "home_unit_BLE", "spare_unit_BLM", "bound_BL", "level_BL")


def make_draft(
    batch: Batch, home_LE: np.ndarray, copies_per_node: int, before_LE: np.ndarray | None
) -> Draft:
    """Copies and quotas for given homes.

    With the present ranks of before, homes may still move inside their nodes, to suit the
    batch-static copies.
    """
    present, options = batch.present, batch.options
    rank_LE, static = _place(batch, home_LE, copies_per_node, before_LE)
    search = Search(
        tolerance=options.tolerance,
        min_load=max(1, -(-options.min_tokens_per_replica // options.tile_rows)),
    )
    splits, bound_N = _split_inside_nodes(batch, rank_LE, static, search)
    if static.copy_LS.shape[1]:
        _join_nodes(batch, splits, static, bound_N, search)
    shape_BL = batch.unit_BLE.shape[:2]
    return Draft(
        present.ranks[rank_LE],
        static.in_spare_slots(present, batch.topology.spare_slots_per_rank),
        splits.copy_NM.reshape(*shape_BL, splits.copy_NM.shape[1]),
        splits.home_unit_NE.reshape(batch.unit_BLE.shape),
        splits.spare_unit_NM.reshape(*shape_BL, splits.copy_NM.shape[1]),
        bound_N.reshape(shape_BL),
        splits.level_N(present).reshape(shape_BL),
    )


def _place(
    batch: Batch, home_LE: np.ndarray, copies_per_node: int, before_LE: np.ndarray | None
) -> tuple[np.ndarray, StaticCopies]:
    """Present ranks of homes, and batch-static copies."""
    present, spares = batch.present, batch.topology.spare_slots_per_rank
    rank_LE = np.searchsorted(present.ranks, home_LE)
    static, rank_LE = choose_static_copies(
        batch.unit_BLE, rank_LE, present, spares, copies_per_node, before_LE is not None
    )
    if before_LE is None:
        return rank_LE, static
    label_LD = keep_most(rank_LE, before_LE, present)
    rank_LE = np.take_along_axis(label_LD, rank_LE, 1)
    return rank_LE, static.relabelled(label_LD, present, spares)


def _split_inside_nodes(
    batch: Batch, rank_LE: np.ndarray, static: StaticCopies, search: Search
) -> tuple[Splits, np.ndarray]:
    """Units divided over the nodes first, then inside each; and lower bounds of the levels."""
    present, spares = batch.present, batch.topology.spare_slots_per_rank
    num_micro_batches, _, num_experts = batch.unit_BLE.shape
    share_BLS = static.shares(batch.unit_BLE, rank_LE, present)
    rest_BLE = batch.unit_BLE - static.served(share_BLS, num_experts)
    hosted = _hosted(rest_BLE, share_BLS, rank_LE, static, batch.local_BLDE())
    plans = plan_nodes(hosted, present, spares, search, search.min_load)
    left_BLZ = hosted.load_BLZ - plans.taken_BLZ
    spare_unit_BLM = plans.quota_BLM
    static.put(spare_unit_BLM, left_BLZ[:, :, num_experts:-1])
    splits = Splits(
        _rows(batch.unit_BLE),
        np.tile(rank_LE, (num_micro_batches, 1)),
        np.tile(static.in_spare_slots(present, spares), (num_micro_batches, 1)),
        _rows(plans.copy_BLM),
        _rows(left_BLZ[:, :, :num_experts]),
        _rows(spare_unit_BLM),
    )
    return splits, _bound(batch, rank_LE, static, plans.bound_BL).reshape(-1)


def _join_nodes(
    batch: Batch, splits: Splits, static: StaticCopies, bound_N: np.ndarray, search: Search
) -> None:
    """Split over the ranks of all nodes where a split node by node is not good enough."""
    present, spares = batch.present, batch.topology.spare_slots_per_rank
    num_experts = batch.unit_BLE.shape[2]
    harder = replace(search, num_experts=16, num_forced=32, max_escapes=6)
    local_BLDE = batch.local_BLDE()
    local_NDE = None if local_BLDE is None else local_BLDE.reshape(-1, *local_BLDE.shape[2:])

    def copy_again(rows: np.ndarray, given: Splits, divided_NEn: np.ndarray) -> Splits:
        entries = static.of_layers(rows % batch.unit_BLE.shape[1])
        every = np.arange(len(rows))[:, None]
        share_NS = divided_NEn[every, np.maximum(entries.copy_LS, 0), entries.node_of_S]
        share_NS = np.where(entries.copy_LS >= 0, share_NS, 0)
        rest_NE = given.unit_NE - entries.served(share_NS[None], num_experts)[0]
        local_1NDE = None if local_NDE is None else local_NDE[rows][None]
        hosted = _hosted(rest_NE[None], share_NS[None], given.rank_NE, entries, local_1NDE)
        plans = plan_nodes(hosted, present, spares, harder, search.min_load)
        left_NZ = (hosted.load_BLZ - plans.taken_BLZ)[0]
        spare_unit_NM = plans.quota_BLM[0]
        entries.put(spare_unit_NM, left_NZ[:, num_experts:-1])
        return replace(
            given,
            copy_NM=plans.copy_BLM[0],
            home_unit_NE=left_NZ[:, :num_experts],
            spare_unit_NM=spare_unit_NM,
        )

    level_across_nodes(splits, bound_N, search.tolerance, present, search.min_load, copy_again)


def _rows(value_BLX: np.ndarray) -> np.ndarray:
    """Problems of all micro-batches and layers in one axis."""
    num_micro_batches, num_layers, width = value_BLX.shape
    return value_BLX.reshape(num_micro_batches * num_layers, width)


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
