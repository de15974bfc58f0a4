"""Which experts get a copy on another node for a whole batch?

Inside a node, copies of a micro-batch level its ranks; between nodes they would cost too much, so
node imbalance is what remains. One or two copies per node that stay for the batch remove most of
it: they are paid for once, and every micro-batch splits its tokens between the nodes anew.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from balance.exact import rank_sets, split

# Candidates of a pick that are evaluated exactly; over eight nodes each costs a flow a problem.
CANDIDATES, CANDIDATES_BY_FLOW = 16, 1
# A slot that lowers the node level by less than this, relative to a perfect one, serves better as
# a spare slot of the micro-batches.
WORTH_A_SLOT = 1e-3


def choose_experts(
    load_BLE: np.ndarray, node_LE: np.ndarray, speed_N: np.ndarray, copies_per_node: int
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy choice of batch-static copies by the node-level Hall value.

    Each pick is the copy (expert, node) that lowers the most

        sum over micro-batches of max over node sets u of (load of experts only in u) / speed(u)

    among the candidates with the largest estimated relief. Picks after the lowest sum are undone;
    then each copy in turn is taken out and picked again.

    Args:
        load_BLE: assignments per micro-batch, layer and expert.
        node_LE: home node of each expert.
        speed_N: speed of each node, > 0.
        copies_per_node: most copies that one node takes per layer.

    Returns:
        copy_LJ int64: expert in each slot, -1 for none, and node_of_J int64, the node of each
        slot: J = N · copies_per_node slots, ascending.
    """
    num_layers, num_nodes = node_LE.shape[0], len(speed_N)
    layers = _Layers(
        torch.from_numpy(np.ascontiguousarray(load_BLE.transpose(1, 0, 2))).double(),
        torch.from_numpy(node_LE),
        torch.arange(num_nodes).repeat_interleave(copies_per_node),
        torch.from_numpy(speed_N),
    )
    best_LJ = torch.full((num_layers, len(layers.node_of_J)), -1)
    best_L = layers.summed_levels(best_LJ)
    if num_nodes > 1:
        _pick_greedily(layers, best_LJ, best_L)
        _pick_each_again(layers, best_LJ, best_L)
    if 1 < num_nodes <= rank_sets.MAX_RANKS and copies_per_node:
        ideal_L = layers.load_LBE.sum((1, 2)) / layers.speed_N.sum()
        _give_slots_back(layers, best_LJ, best_L + WORTH_A_SLOT * ideal_L)
    return best_LJ.numpy(), layers.node_of_J.numpy()


@dataclass(frozen=True)
class _Layers:
    """What is given: loads, home nodes, the node of each slot, the speed of each node."""

    load_LBE: torch.Tensor
    node_LE: torch.Tensor
    node_of_J: torch.Tensor
    speed_N: torch.Tensor

    def __getitem__(self, layers: torch.Tensor) -> "_Layers":
        """Some of the layers."""
        return replace(self, load_LBE=self.load_LBE[layers], node_LE=self.node_LE[layers])

    def levels(self, copy_LJ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Node-level Hall value of every micro-batch, level_LB, and its tight set, tight_LBN."""
        num_layers, num_micro_batches, _ = self.load_LBE.shape
        level_F, tight_FN = split.bottleneck(
            self.load_LBE.flatten(0, 1),
            self.node_LE.repeat_interleave(num_micro_batches, 0),
            copy_LJ.repeat_interleave(num_micro_batches, 0),
            self.node_of_J,
            self.speed_N,
        )
        shape = (num_layers, num_micro_batches)
        return level_F.view(shape), tight_FN.view(*shape, len(self.speed_N))

    def summed_levels(self, copy_LJ: torch.Tensor) -> torch.Tensor:
        """What is to be lowered: the sum of the levels over micro-batches, level_L."""
        return self.levels(copy_LJ)[0].sum(1)

    def holds(self, copy_LJ: torch.Tensor) -> torch.Tensor:
        """Which nodes hold a copy of each expert, bool [L, E, N]."""
        holds_LEN = torch.nn.functional.one_hot(self.node_LE, len(self.speed_N)).bool()
        layer, slot = (copy_LJ >= 0).nonzero(as_tuple=True)
        holds_LEN[layer, copy_LJ[layer, slot], self.node_of_J[slot]] = True
        return holds_LEN

    def full(self, copy_LJ: torch.Tensor) -> torch.Tensor:
        """Which nodes have no slot left, bool [L, N]."""
        nodes = range(len(self.speed_N))
        return torch.stack(
            [(copy_LJ[:, self.node_of_J == node] >= 0).all(1) for node in nodes], dim=1
        )


def _pick_greedily(layers: _Layers, best_LJ: torch.Tensor, best_L: torch.Tensor) -> None:
    """Fill slot after slot; ``best_LJ`` keeps the state of the lowest summed level, ``best_L``."""
    copy_LJ, open_layers = best_LJ.clone(), torch.arange(len(best_LJ))
    for _ in range(len(layers.node_of_J)):
        picked_LJ, level_L = _pick_one_more(layers[open_layers], copy_LJ[open_layers])
        possible_L = level_L < torch.inf
        open_layers, level_L = open_layers[possible_L], level_L[possible_L]
        copy_LJ[open_layers] = picked_LJ[possible_L]
        # Two nodes that are equally slow need two picks before the level falls.
        better_L = level_L < best_L[open_layers] * (1 - 1e-9)
        best_LJ[open_layers[better_L]] = copy_LJ[open_layers[better_L]]
        best_L[open_layers[better_L]] = level_L[better_L]


def _pick_each_again(layers: _Layers, best_LJ: torch.Tensor, best_L: torch.Tensor) -> None:
    """Take each copy out in turn and pick again, knowing all the others."""
    for slot in range(len(layers.node_of_J)):
        without_LJ = best_LJ.clone()
        without_LJ[:, slot] = -1
        picked_LJ, level_L = _pick_one_more(layers, without_LJ)
        better_L = level_L < best_L * (1 - 1e-9)
        best_LJ[better_L], best_L[better_L] = picked_LJ[better_L], level_L[better_L]


def _give_slots_back(layers: _Layers, copy_LJ: torch.Tensor, limit_L: torch.Tensor) -> None:
    """Take out copies, the most dispensable first, while the summed level stays in its limit."""
    rows = torch.arange(len(copy_LJ))
    while len(rows):
        level_LJ = torch.full((len(rows), copy_LJ.shape[1]), torch.inf, dtype=torch.float64)
        for slot in range(copy_LJ.shape[1]):
            without_LJ = copy_LJ[rows]
            filled_L = without_LJ[:, slot] >= 0
            without_LJ[:, slot] = -1
            level_L = layers[rows].summed_levels(without_LJ)
            level_LJ[:, slot] = torch.where(filled_L, level_L, torch.inf)
        level_L, slot_L = level_LJ.min(1)
        spare_L = level_L <= limit_L[rows]
        rows = rows[spare_L]
        copy_LJ[rows, slot_L[spare_L]] = -1


def _pick_one_more(layers: _Layers, copy_LJ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One more copy for each layer: copy_LJ, and the summed level_L, inf where there is none."""
    num_nodes = len(layers.speed_N)
    relief_LEN = _relief(layers, copy_LJ)
    exact = num_nodes <= rank_sets.MAX_RANKS
    most = min(CANDIDATES if exact else CANDIDATES_BY_FLOW, relief_LEN[0:1].numel())
    relief_LO, choice_LO = relief_LEN.flatten(1).topk(most, dim=1)
    best_L = torch.full((len(copy_LJ),), torch.inf, dtype=torch.float64)
    best_LJ = copy_LJ.clone()
    for relief_L, choice_L in zip(relief_LO.T, choice_LO.T, strict=True):
        expert_L, node_L = choice_L // num_nodes, choice_L % num_nodes
        trial_LJ = _into_first_free(copy_LJ, expert_L, node_L, layers.node_of_J)
        level_L = layers.summed_levels(trial_LJ)
        better_L = (level_L < best_L) & (relief_L > 0)
        best_LJ[better_L], best_L[better_L] = trial_LJ[better_L], level_L[better_L]
    return best_LJ, best_L


def _relief(layers: _Layers, copy_LJ: torch.Tensor) -> torch.Tensor:
    """Estimate of what each new copy takes off the tight sets, [L, E, N].

    In every micro-batch at most the expert's load, if it is locked inside the tight set and the
    node is outside, and at most what the set has too much; nothing where the node's slots are full
    or it holds the expert already.
    """
    load_LBE, speed_N = layers.load_LBE, layers.speed_N
    level_LB, tight_LBN = layers.levels(copy_LJ)
    holds_LEN = layers.holds(copy_LJ)
    bound_LEN = holds_LEN & (holds_LEN.sum(2, keepdim=True) == 1)
    room_LBN = level_LB[:, :, None] * speed_N - load_LBE @ bound_LEN.double()
    escapes_LBE = (~tight_LBN).float() @ holds_LEN.float().transpose(1, 2) > 0
    ideal_LB = load_LBE.sum(2) / speed_N.sum()
    excess_LB = (level_LB - ideal_LB) * (tight_LBN * speed_N).sum(2)
    gain_LBE = torch.minimum(load_LBE, excess_LB[:, :, None]) * ~escapes_LBE
    relief_LEN = gain_LBE.transpose(1, 2) @ (~tight_LBN).double()
    # Room only breaks ties: a full node can still pass load on.
    has_room_LBN = (room_LBN > 0) & ~tight_LBN
    relief_LEN += 1e-3 * (gain_LBE.transpose(1, 2) @ has_room_LBN.double())
    return relief_LEN.masked_fill(holds_LEN | layers.full(copy_LJ)[:, None, :], 0)


def _into_first_free(
    copy_LJ: torch.Tensor, expert_L: torch.Tensor, node_L: torch.Tensor, node_of_J: torch.Tensor
) -> torch.Tensor:
    """Put an expert into the first free slot of a node; where there is none, change nothing."""
    free_LJ = (node_of_J == node_L[:, None]) & (copy_LJ < 0)
    first_LJ = free_LJ & (free_LJ.cumsum(1) == 1)
    return torch.where(first_LJ, expert_L[:, None], copy_LJ)
