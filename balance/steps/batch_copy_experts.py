"""Which experts get a copy on another node for a whole batch?

Inside a node, copies of a micro-batch level its ranks; between nodes they would cost too much, so
node imbalance is what remains. One or two copies per node that stay for the batch remove most of
it: they are paid for once, and every micro-batch splits its tokens between the nodes anew.
"""

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
    node_of_J = torch.arange(num_nodes).repeat_interleave(copies_per_node)
    best_LJ = torch.full((num_layers, len(node_of_J)), -1)
    load_LBE = torch.from_numpy(np.ascontiguousarray(load_BLE.transpose(1, 0, 2))).double()
    home_LE, speeds = torch.from_numpy(node_LE), torch.from_numpy(speed_N)
    best_L = _node_levels(load_LBE, home_LE, best_LJ, node_of_J, speeds)[0].sum(1)
    if num_nodes > 1:
        _pick_greedily(load_LBE, home_LE, node_of_J, speeds, best_LJ, best_L)
        _pick_each_again(load_LBE, home_LE, node_of_J, speeds, best_LJ, best_L)
    if 1 < num_nodes <= rank_sets.MAX_RANKS and copies_per_node:
        ideal_L = load_LBE.sum((1, 2)) / speeds.sum()
        _give_slots_back(
            load_LBE, home_LE, best_LJ, node_of_J, speeds, best_L + WORTH_A_SLOT * ideal_L
        )
    return best_LJ.numpy(), node_of_J.numpy()


def _pick_greedily(
    load_LBE: torch.Tensor,
    node_LE: torch.Tensor,
    node_of_J: torch.Tensor,
    speed_N: torch.Tensor,
    best_LJ: torch.Tensor,
    best_L: torch.Tensor,
) -> None:
    """Fill slot after slot; ``best_LJ`` keeps the state of the lowest summed level, ``best_L``."""
    copy_LJ, layers = best_LJ.clone(), torch.arange(len(best_LJ))
    for _ in range(len(node_of_J)):
        picked_LJ, level_L = _pick_one_more(
            load_LBE[layers], node_LE[layers], copy_LJ[layers], node_of_J, speed_N
        )
        possible_L = level_L < torch.inf
        layers, level_L = layers[possible_L], level_L[possible_L]
        copy_LJ[layers] = picked_LJ[possible_L]
        # Two nodes that are equally slow need two picks before the level falls.
        better_L = level_L < best_L[layers] * (1 - 1e-9)
        best_LJ[layers[better_L]] = copy_LJ[layers[better_L]]
        best_L[layers[better_L]] = level_L[better_L]


def _pick_each_again(
    load_LBE: torch.Tensor,
    node_LE: torch.Tensor,
    node_of_J: torch.Tensor,
    speed_N: torch.Tensor,
    best_LJ: torch.Tensor,
    best_L: torch.Tensor,
) -> None:
    """Take each copy out in turn and pick again, knowing all the others."""
    for slot in range(len(node_of_J)):
        without_LJ = best_LJ.clone()
        without_LJ[:, slot] = -1
        picked_LJ, level_L = _pick_one_more(load_LBE, node_LE, without_LJ, node_of_J, speed_N)
        better_L = level_L < best_L * (1 - 1e-9)
        best_LJ[better_L], best_L[better_L] = picked_LJ[better_L], level_L[better_L]


def _give_slots_back(
    load_LBE: torch.Tensor,
    node_LE: torch.Tensor,
    copy_LJ: torch.Tensor,
    node_of_J: torch.Tensor,
    speed_N: torch.Tensor,
    limit_L: torch.Tensor,
) -> None:
    """Take out copies, the most dispensable first, while the summed level stays in its limit."""
    layers = torch.arange(len(copy_LJ))
    while len(layers):
        level_LJ = torch.full((len(layers), copy_LJ.shape[1]), torch.inf, dtype=torch.float64)
        for slot in range(copy_LJ.shape[1]):
            without_LJ = copy_LJ[layers]
            filled_L = without_LJ[:, slot] >= 0
            without_LJ[:, slot] = -1
            level_LB, _ = _node_levels(
                load_LBE[layers], node_LE[layers], without_LJ, node_of_J, speed_N
            )
            level_LJ[:, slot] = torch.where(filled_L, level_LB.sum(1), torch.inf)
        level_L, slot_L = level_LJ.min(1)
        spare_L = level_L <= limit_L[layers]
        layers = layers[spare_L]
        copy_LJ[layers, slot_L[spare_L]] = -1


def _pick_one_more(
    load_LBE: torch.Tensor,
    node_LE: torch.Tensor,
    copy_LJ: torch.Tensor,
    node_of_J: torch.Tensor,
    speed_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One more copy for each layer: copy_LJ, and the summed level_L, inf where there is none."""
    num_nodes = len(speed_N)
    relief_LEN = _relief(load_LBE, node_LE, copy_LJ, node_of_J, speed_N)
    exact = num_nodes <= rank_sets.MAX_RANKS
    most = min(CANDIDATES if exact else CANDIDATES_BY_FLOW, relief_LEN[0:1].numel())
    relief_LO, choice_LO = relief_LEN.flatten(1).topk(most, dim=1)
    best_L = torch.full((len(load_LBE),), torch.inf, dtype=torch.float64)
    best_LJ = copy_LJ.clone()
    for relief_L, choice_L in zip(relief_LO.T, choice_LO.T, strict=True):
        trial_LJ = _into_first_free(
            copy_LJ, choice_L // num_nodes, choice_L % num_nodes, node_of_J
        )
        level_L = _node_levels(load_LBE, node_LE, trial_LJ, node_of_J, speed_N)[0].sum(1)
        better_L = (level_L < best_L) & (relief_L > 0)
        best_LJ[better_L], best_L[better_L] = trial_LJ[better_L], level_L[better_L]
    return best_LJ, best_L


def _node_levels(
    load_LBE: torch.Tensor,
    node_LE: torch.Tensor,
    copy_LJ: torch.Tensor,
    node_of_J: torch.Tensor,
    speed_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Node-level Hall value of every micro-batch, level_LB, and its tight set, tight_LBN."""
    num_layers, num_micro_batches, _ = load_LBE.shape
    level_F, tight_FN = split.bottleneck(
        load_LBE.flatten(0, 1),
        node_LE.repeat_interleave(num_micro_batches, 0),
        copy_LJ.repeat_interleave(num_micro_batches, 0),
        node_of_J,
        speed_N,
    )
    shape = (num_layers, num_micro_batches)
    return level_F.view(shape), tight_FN.view(*shape, len(speed_N))


def _relief(
    load_LBE: torch.Tensor,
    node_LE: torch.Tensor,
    copy_LJ: torch.Tensor,
    node_of_J: torch.Tensor,
    speed_N: torch.Tensor,
) -> torch.Tensor:
    """Estimate of what each new copy takes off the tight sets, [L, E, N].

    In every micro-batch at most the expert's load, if it is locked inside the tight set and the
    node is outside, and at most what the set has too much; nothing where the node's slots are full
    or it holds the expert already.
    """
    num_nodes = len(speed_N)
    level_LB, tight_LBN = _node_levels(load_LBE, node_LE, copy_LJ, node_of_J, speed_N)
    holds_LEN = torch.nn.functional.one_hot(node_LE, num_nodes).bool()
    layer, slot = (copy_LJ >= 0).nonzero(as_tuple=True)
    holds_LEN[layer, copy_LJ[layer, slot], node_of_J[slot]] = True
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
    full_LN = torch.stack(
        [(copy_LJ[:, node_of_J == node] >= 0).all(1) for node in range(num_nodes)], dim=1
    )
    return relief_LEN.masked_fill(holds_LEN | full_LN[:, None, :], 0)


def _into_first_free(
    copy_LJ: torch.Tensor, expert_L: torch.Tensor, node_L: torch.Tensor, node_of_J: torch.Tensor
) -> torch.Tensor:
    """Put an expert into the first free slot of a node; where there is none, change nothing."""
    free_LJ = (node_of_J == node_L[:, None]) & (copy_LJ < 0)
    first_LJ = free_LJ & (free_LJ.cumsum(1) == 1)
    return torch.where(first_LJ, expert_L[:, None], copy_LJ)
