"""One way to place and split a batch, homes given: batch-static copies, copies, units.

The planner makes several of these and keeps, layer by layer, the best.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from balance.exact import bounds
from balance.steps.across_nodes import Splits, level_across_nodes
from balance.steps.batch_copies import BatchCopies, choose_batch_copies
from balance.steps.copies import Search
from balance.steps.inside_nodes import InsideNodes, copy_inside_nodes
from balance.steps.loads import Batch, as_problems
from balance.steps.rename_ranks import keep_most


@dataclass
class Candidate:
    """A plan in units, over present ranks and their spare slots M.

    Attributes:
        home_LE: home rank of each expert, numbered as in the topology.
        static_LM: expert of the batch-static copy in each spare slot, -1 for none.
        copy_BLM: expert of the micro-batch copy in each spare slot, -1 for none.
        home_unit_BLE: units that each home copy serves.
        spare_unit_BLM: units that each spare slot serves.
        bound_BL: lower bound of the level, homes and batch-static copies given.
        level_BL: units / speed of the slowest rank.
    """

    home_LE: np.ndarray
    static_LM: np.ndarray
    copy_BLM: np.ndarray
    home_unit_BLE: np.ndarray
    spare_unit_BLM: np.ndarray
    bound_BL: np.ndarray
    level_BL: np.ndarray

    def of_layers(self, chosen_L: np.ndarray) -> "Candidate":
        """The same with some of its layers."""
        by_layer = [getattr(self, name)[chosen_L] for name in ("home_LE", "static_LM")]
        return Candidate(*by_layer, *(getattr(self, name)[:, chosen_L] for name in _BY_PROBLEM))

    def put_layers(self, chosen_L: np.ndarray, other: "Candidate") -> None:
        """Replace some layers."""
        self.home_LE[chosen_L], self.static_LM[chosen_L] = other.home_LE, other.static_LM
        for name in _BY_PROBLEM:
            getattr(self, name)[:, chosen_L] = getattr(other, name)


_BY_PROBLEM = ("copy_BLM", "home_unit_BLE", "spare_unit_BLM", "bound_BL", "level_BL")


def make_candidate(
    batch: Batch, home_LE: np.ndarray, copies_per_node: int, before_LE: np.ndarray | None
) -> Candidate:
    """Copies and quotas for given homes.

    Args:
        batch: loads, topology, options.
        home_LE: home ranks.
        copies_per_node: most batch-static copies that a node holds.
        before_LE: present ranks of the previous homes, -1 where missing. With them, homes may
            still move inside their nodes, to suit the batch-static copies, and equal ranks are
            renamed; None keeps every home where it is.
    """
    present, options = batch.present, batch.options
    rank_LE, copies = _seat_homes_and_copies(batch, home_LE, copies_per_node, before_LE)
    search = Search(
        tolerance=options.tolerance,
        min_load=max(1, -(-options.min_tokens_per_replica // options.tile_rows)),
    )
    serving = copies.serve(batch.unit_BLE, rank_LE, present)
    inside = copy_inside_nodes(
        serving, rank_LE, batch.local_BLDE(), present, batch.spares_per_rank, search
    )
    static_LM = copies.in_spare_slots(present, batch.spares_per_rank)
    splits = _as_splits(batch, rank_LE, static_LM, inside)
    bound_BL = _bound(batch, inside.bound_BL if serving.bound_BL is None else serving.bound_BL)
    bound_F = bound_BL.reshape(-1)
    if copies.num_entries:
        _join_nodes(batch, splits, copies, bound_F, search)
    shape_BL = bound_BL.shape
    return Candidate(
        present.ranks[rank_LE],
        static_LM,
        splits.copy_FM.reshape(inside.copy_BLM.shape),
        splits.home_unit_FE.reshape(batch.unit_BLE.shape),
        splits.spare_unit_FM.reshape(inside.spare_unit_BLM.shape),
        bound_F.reshape(shape_BL),
        splits.level_F(present).reshape(shape_BL),
    )


def _seat_homes_and_copies(
    batch: Batch, home_LE: np.ndarray, copies_per_node: int, before_LE: np.ndarray | None
) -> tuple[np.ndarray, BatchCopies]:
    """Present ranks of homes, rank_LE, and batch-static copies."""
    present, spares = batch.present, batch.spares_per_rank
    rank_LE = np.searchsorted(present.ranks, home_LE)
    copies, rank_LE = choose_batch_copies(
        batch.unit_BLE, rank_LE, present, spares, copies_per_node, before_LE is not None
    )
    if before_LE is None:
        return rank_LE, copies
    label_LD = keep_most(rank_LE, before_LE, present)
    rank_LE = np.take_along_axis(label_LD, rank_LE, 1)
    return rank_LE, copies.relabelled(label_LD, present, spares)


def _as_splits(
    batch: Batch, rank_LE: np.ndarray, static_LM: np.ndarray, inside: InsideNodes
) -> Splits:
    """Micro-batches and layers in one axis, as ``balance.steps.across_nodes`` wants them."""
    num_micro_batches = len(batch.unit_BLE)
    return Splits(
        as_problems(batch.unit_BLE),
        np.tile(rank_LE, (num_micro_batches, 1)),
        np.tile(static_LM, (num_micro_batches, 1)),
        as_problems(inside.copy_BLM),
        as_problems(inside.home_unit_BLE),
        as_problems(inside.spare_unit_BLM),
    )


def _bound(batch: Batch, node_bound_BL: np.ndarray) -> np.ndarray:
    """Lower bound of the level, homes and batch-static copies given.

    Without batch-static copies the load of each node is given, and so are its own bounds; with
    them, only the load that no node outside a set of nodes can serve.
    """
    total_F = torch.from_numpy(batch.unit_BLE.sum(2).ravel())
    ideal_F = bounds.ideal_level(total_F, torch.from_numpy(batch.present.speed_D))
    return np.maximum(ideal_F.numpy().reshape(node_bound_BL.shape), node_bound_BL)


def _join_nodes(
    batch: Batch, splits: Splits, copies: BatchCopies, bound_F: np.ndarray, search: Search
) -> None:
    """Split over the ranks of all nodes where a split node by node is not good enough."""
    num_layers = batch.unit_BLE.shape[1]
    harder = replace(search, num_experts=16, num_forced=32, max_escapes=6)
    local_BLDE = batch.local_BLDE()
    local_FDE = None if local_BLDE is None else as_problems(local_BLDE)

    def copy_again(rows: np.ndarray, given: Splits, divided_FEN: np.ndarray) -> Splits:
        """Each problem is a layer of its own here, in a batch of one micro-batch."""
        entries = copies.of_layers(rows % num_layers)
        serving = entries.serve_shares(given.unit_FE[None], entries.shares_of(divided_FEN)[None])
        local_1FDE = None if local_FDE is None else local_FDE[rows][None]
        inside = copy_inside_nodes(
            serving, given.rank_FE, local_1FDE, batch.present, batch.spares_per_rank, harder
        )
        return replace(
            given,
            copy_FM=inside.copy_BLM[0],
            home_unit_FE=inside.home_unit_BLE[0],
            spare_unit_FM=inside.spare_unit_BLM[0],
        )

    level_across_nodes(splits, bound_F, search, batch.present, copy_again)
