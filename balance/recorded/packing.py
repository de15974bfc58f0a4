"""Which micro-batch and which rank does each sequence go to?

A trainer packs whole sequences, so tokens of a micro-batch are far from independent draws:
sequences, and even more so the domains they come from, favour experts of their own.
"""

from typing import Literal

import numpy as np

from balance.trace import Trace

Order = Literal["given", "shuffled", "domain"]


def pack(
    ids_TLK: np.ndarray,
    sequence_start: np.ndarray,
    *,
    num_experts: int,
    num_ranks: int,
    tokens_per_micro_batch: int = 3400,
    order: Order = "shuffled",
    domain_S: np.ndarray | None = None,
    row_mask_T: np.ndarray | None = None,
    seed: int = 0,
    label: str = "packed",
) -> Trace:
    """Put whole sequences in an order, fill micro-batches with them, deal each to the ranks.

    Args:
        ids_TLK: expert ids, sequences one after the other; as ``Trace`` takes them.
        sequence_start: [S + 1] token offsets, from 0 to T, not decreasing.
        num_experts: logical experts of a layer.
        num_ranks: ranks that hold tokens before dispatch.
        tokens_per_micro_batch: aimed at; a sequence is never cut.
        order: "given", "shuffled", or "domain" (shuffled, then grouped by domain: the hard case).
        domain_S: domain of each sequence; needed by order "domain".
        row_mask_T: bool, False for rows that no load may count.
        seed: of the shuffle.
        label: of the trace.

    Returns:
        A trace whose rows are sorted by micro-batch.

    Raises:
        ValueError: on offsets that do not cover the tokens, or a missing domain.
    """
    length_S = _check_starts(sequence_start, len(ids_TLK))
    order_S = order_sequences(len(length_S), order, domain_S, seed)
    micro_batch_S = fill_micro_batches(length_S[order_S], tokens_per_micro_batch)
    rank_S = deal_to_ranks(length_S[order_S], micro_batch_S, num_ranks)
    starts = np.asarray(sequence_start)
    pieces = [np.arange(starts[s], starts[s + 1]) for s in order_S]
    row_T = np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
    return Trace(
        np.asarray(ids_TLK)[row_T],
        np.repeat(micro_batch_S, length_S[order_S]),
        np.repeat(rank_S, length_S[order_S]),
        num_experts,
        row_mask_T=None if row_mask_T is None else np.asarray(row_mask_T)[row_T],
        label=f"{label}, {order}",
    )


def order_sequences(
    num_sequences: int, order: Order, domain_S: np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """Order in which sequences are packed: a permutation of [0, num_sequences), int64."""
    if order == "given":
        return np.arange(num_sequences)
    shuffled_S = np.random.default_rng(seed).permutation(num_sequences)
    if order == "shuffled":
        return shuffled_S
    if order != "domain":
        raise ValueError(f'order must be "given", "shuffled" or "domain", got {order!r}')
    if domain_S is None or len(domain_S) != num_sequences:
        got = "none" if domain_S is None else f"{len(domain_S)}"
        raise ValueError(f"domain_S must name a domain for each sequence, got {got}")
    return shuffled_S[np.argsort(np.asarray(domain_S)[shuffled_S], kind="stable")]


def fill_micro_batches(length_S: np.ndarray, tokens_per_micro_batch: int) -> np.ndarray:
    """Micro-batch of each sequence, int64, from 0 without gaps, by where its middle token falls.

    The sequences are laid end to end and cut every ``tokens_per_micro_batch`` tokens.
    """
    if not tokens_per_micro_batch >= 1:
        raise ValueError(f"tokens_per_micro_batch must be positive, got {tokens_per_micro_batch}")
    middle_S = np.cumsum(length_S) - length_S / 2
    return np.unique(middle_S // tokens_per_micro_batch, return_inverse=True)[1]


def deal_to_ranks(length_S: np.ndarray, micro_batch_S: np.ndarray, num_ranks: int) -> np.ndarray:
    """Source rank of each sequence, int64: longest first to the rank with the fewest tokens."""
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be positive, got {num_ranks}")
    rank_S = np.zeros(len(length_S), np.int64)
    for micro_batch in np.unique(micro_batch_S):
        tokens_R = np.zeros(num_ranks, np.int64)
        members = np.flatnonzero(micro_batch_S == micro_batch)
        for s in members[np.argsort(-length_S[members], kind="stable")]:
            rank_S[s] = tokens_R.argmin()
            tokens_R[rank_S[s]] += length_S[s]
    return rank_S


def _check_starts(sequence_start: np.ndarray, num_tokens: int) -> np.ndarray:
    """Length of each sequence, length_S int64, or ValueError."""
    starts = np.asarray(sequence_start)
    if starts.ndim != 1 or starts.dtype.kind not in "iu" or not len(starts):
        raise ValueError(
            f"sequence_start must be [S + 1] integers, got {starts.dtype} {list(starts.shape)}"
        )
    length_S = np.diff(starts.astype(np.int64))
    if starts[0] != 0 or starts[-1] != num_tokens or (length_S < 0).any():
        raise ValueError(
            f"sequence_start must rise from 0 to the {num_tokens} tokens, got "
            f"{starts[0]} to {starts[-1]}"
        )
    return length_S
