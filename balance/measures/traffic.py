"""What travels between ranks and nodes, and when should an expert travel in its tokens' place?"""

from dataclasses import dataclass

import numpy as np

from balance.topology import Topology
from balance.trace import Trace


@dataclass(frozen=True)
class Traffic:
    """Token activations that leave their rank, and those that leave their node.

    Attributes:
        num_assignments: choices that name an expert.
        cross_rank: sent to another rank, one send for every assignment.
        cross_rank_once: the same with a token sent once to each rank that needs it.
        cross_node: sent to another node, one send for every assignment.
        cross_node_once_per_rank: the same with a token sent once to each rank that needs it.
        cross_node_once_per_node: the same with a token sent once to each node that needs it.
    """

    num_assignments: int = 0
    cross_rank: int = 0
    cross_rank_once: int = 0
    cross_node: int = 0
    cross_node_once_per_rank: int = 0
    cross_node_once_per_node: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        """Sends of both."""
        names = self.__dataclass_fields__
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in names))


def count_traffic(
    slot_of_TK: np.ndarray, source_rank_T: np.ndarray, slots_per_rank: int, topology: Topology
) -> Traffic:
    """Count the sends that an assignment of tokens to slots needs.

    Args:
        slot_of_TK: slot of each choice, -1 for none.
        source_rank_T: rank that holds each token.
        slots_per_rank: Q; slot p is on rank p // Q.
        topology: gives the node of each rank.
    """
    node_of_R = topology.node_of_R
    real_TK = slot_of_TK >= 0
    source_T1 = source_rank_T.astype(np.int64)[:, None]
    rank_TK = np.where(real_TK, slot_of_TK // slots_per_rank, source_T1)
    node_TK = node_of_R[rank_TK]
    leaves_rank_TK = rank_TK != source_T1
    leaves_node_TK = node_TK != node_of_R[source_T1]
    return Traffic(
        int(real_TK.sum()),
        int(leaves_rank_TK.sum()),
        int((_is_first(rank_TK) & leaves_rank_TK).sum()),
        int(leaves_node_TK.sum()),
        int((_is_first(rank_TK) & leaves_node_TK).sum()),
        int((_is_first(node_TK) & leaves_node_TK).sum()),
    )


def _is_first(value_TK: np.ndarray) -> np.ndarray:
    """True where a row shows a value for the first time."""
    earlier_KK = np.tri(value_TK.shape[1], k=-1, dtype=bool)
    return ~((value_TK[:, :, None] == value_TK[:, None, :]) & earlier_KK).any(2)


def moving_the_expert_pays(
    num_tokens: int,
    token_bytes: int,
    weight_bytes: int,
    *,
    backward: bool = True,
    copy_is_kept: bool = False,
    gradient_bytes: int | None = None,
) -> bool:
    """Is it fewer bytes to copy an expert to a rank than to send it the tokens of that rank?

    Sending tokens costs their activations to the expert and its result back, and in training the
    two gradients the other way. Copying costs the weights, in training once more for the backward
    pass unless the copy is kept until then, and the gradient that returns to the home copy.

        tokens · token_bytes · (2 or 4)  >  weight_bytes · (1 or 2) + gradient_bytes

    Args:
        num_tokens: tokens of the rank that chose the expert and would be served where they are.
        token_bytes: one activation row.
        weight_bytes: the expert's weights in the compute dtype.
        backward: count the backward pass.
        copy_is_kept: the slot is not reused between forward and backward.
        gradient_bytes: the expert's gradient; None means as large as its weights.

    Raises:
        ValueError: a count is negative.
    """
    gradient_bytes = weight_bytes if gradient_bytes is None else gradient_bytes
    for name, value in (
        ("num_tokens", num_tokens),
        ("token_bytes", token_bytes),
        ("weight_bytes", weight_bytes),
        ("gradient_bytes", gradient_bytes),
    ):
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if not backward:
        return num_tokens * token_bytes * 2 > weight_bytes
    copies = 1 if copy_is_kept else 2
    return num_tokens * token_bytes * 4 > weight_bytes * copies + gradient_bytes


def chosen_together(trace: Trace, tokens_per_chunk: int = 1 << 16) -> np.ndarray:
    """Tokens that chose both experts of each pair, [L, E, E] float64, zero on the diagonal."""
    together_LEE = np.zeros((trace.num_layers, trace.num_experts, trace.num_experts))
    for layer in range(trace.num_layers):
        for start in range(0, trace.num_tokens, tokens_per_chunk):
            rows = slice(start, start + tokens_per_chunk)
            ids_TK = trace.ids_TLK[rows, layer].astype(np.int64)
            real_TK = ids_TK >= 0
            if trace.row_mask_T is not None:
                real_TK &= trace.row_mask_T[rows, None]
            chosen_TE = np.zeros((len(ids_TK), trace.num_experts), dtype=np.float32)
            token, choice = real_TK.nonzero()
            chosen_TE[token, ids_TK[token, choice]] = 1
            together_LEE[layer] += chosen_TE.T @ chosen_TE
        np.fill_diagonal(together_LEE[layer], 0)
    return together_LEE
