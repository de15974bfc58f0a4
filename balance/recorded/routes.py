"""Recorded sequences before anyone has packed them: the common end of all readers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from balance.checks import whole
from balance.ids import check_ids, check_num_experts, inspect_ids
from balance.recorded.packing import Order, pack
from balance.trace import Trace


@dataclass(frozen=True, eq=False)
class Routes:
    """Expert ids of whole sequences.

    Attributes:
        ids_TLK: logical ids, sequences one after the other, MoE layers only.
        sequence_start: [S + 1] token offsets.
        num_experts: logical experts of a layer.
        layers: number in the model of each MoE layer kept.
        row_mask_T: bool, False for tokens whose routing was not recorded; None when all were.
        domain_S: kind of text of each sequence; None when unknown.
        label: where the routes come from.
    """

    ids_TLK: np.ndarray
    sequence_start: np.ndarray
    num_experts: int
    layers: tuple[int, ...]
    row_mask_T: np.ndarray | None = None
    domain_S: np.ndarray | None = None
    label: str = "unnamed"

    def pack(
        self,
        num_ranks: int,
        tokens_per_micro_batch: int = 3400,
        order: Order = "shuffled",
        seed: int = 0,
    ) -> Trace:
        """Fill micro-batches and deal the sequences to ranks: ``balance.recorded.packing``."""
        return pack(
            self.ids_TLK,
            self.sequence_start,
            num_experts=self.num_experts,
            num_ranks=num_ranks,
            tokens_per_micro_batch=tokens_per_micro_batch,
            order=order,
            domain_S=self.domain_S,
            row_mask_T=self.row_mask_T,
            seed=seed,
            label=self.label,
        )


def join(
    sequences: Sequence[np.ndarray],
    num_experts: int,
    *,
    moe_layers: Sequence[int] | None = None,
    num_tokens_S: Sequence[int] | None = None,
    domain_S: Sequence[str] | None = None,
    label: str = "unnamed",
) -> Routes:
    """Put recorded sequences together, dense layers left out and unrecorded tokens masked.

    An engine never feeds the last sampled token forward, so a sequence of n tokens has n - 1
    recorded rows. Where ``num_tokens_S`` says n, the missing row is added and masked. A last row
    of zeros or -1 only is a trainer's filler for the same token and is masked as well.

    Args:
        sequences: [rows, layers, K] integer ids of each sequence.
        num_experts: logical experts of a layer.
        moe_layers: layers to keep; None keeps all.
        num_tokens_S: tokens of each sequence: its rows, or one more.
        domain_S: kind of text of each sequence.
        label: where the routes come from.

    Raises:
        ValueError: on no sequences, unequal shapes, ids out of range, an expert named twice in a
            recorded row, a layer that is all zero (dense layers are: leave them out with
            ``moe_layers``), or a length that does not fit.
    """
    if not sequences:
        raise ValueError("sequences must not be empty")
    pieces = [select_layers(np.asarray(ids), moe_layers) for ids in sequences]
    shapes = {piece.shape[1:] for piece in pieces}
    if len(shapes) > 1:
        raise ValueError(f"sequences must agree in layers and top_k, got {sorted(shapes)}")
    lengths = [len(piece) for piece in pieces] if num_tokens_S is None else list(num_tokens_S)
    if domain_S is not None and len(domain_S) != len(pieces):
        raise ValueError(f"domain_S must have {len(pieces)} entries, got {len(domain_S)}")
    if len(lengths) != len(pieces):
        raise ValueError(f"num_tokens_S must have {len(pieces)} entries, got {len(lengths)}")
    completed = [_complete(piece, n) for piece, n in zip(pieces, lengths, strict=True)]
    ids_TLK = np.concatenate([ids for ids, _ in completed])
    row_mask_T = np.concatenate([mask for _, mask in completed])
    routes = Routes(
        ids_TLK,
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        check_num_experts(num_experts),
        _layer_numbers(moe_layers, ids_TLK.shape[1]),
        None if row_mask_T.all() else row_mask_T,
        None if domain_S is None else np.array(domain_S),
        label,
    )
    check_routes(routes)
    return routes


def check_routes(routes: Routes) -> None:
    """Refuse ids that would be miscounted; messages as in ``join``."""
    report = inspect_ids(routes.ids_TLK, routes.num_experts, routes.row_mask_T)
    if report.num_out_of_range:
        raise ValueError(
            f"ids must lie in [0, {routes.num_experts}) or be -1, got {report.num_out_of_range} "
            "other ids"
        )
    if report.all_zero_layers:
        numbers = [routes.layers[layer] for layer in report.all_zero_layers]
        raise ValueError(
            f"ids must not be all 0 in a layer, got layers {numbers}: leave dense layers out "
            "with moe_layers"
        )
    if report.first_duplicate is not None:
        token, layer = report.first_duplicate
        raise ValueError(
            f"ids must name an expert at most once in a row, got {report.num_duplicate_rows} rows "
            f"that do not; the first is token {token}, layer {routes.layers[layer]}: "
            f"{routes.ids_TLK[token, layer].tolist()}"
        )


def select_layers(ids_TLK: np.ndarray, moe_layers: Sequence[int] | None) -> np.ndarray:
    """ids of the MoE layers only; all layers when ``moe_layers`` is None."""
    ids_TLK = check_ids(ids_TLK)
    if moe_layers is None:
        return ids_TLK
    layers = [whole("moe_layers", layer, 0) for layer in moe_layers]
    if not layers or max(layers) >= ids_TLK.shape[1] or len(set(layers)) < len(layers):
        raise ValueError(
            f"moe_layers must name layers below {ids_TLK.shape[1]}, each once, got {layers}"
        )
    return ids_TLK[:, layers]


def _layer_numbers(moe_layers: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """Numbers in the model of the layers that were kept."""
    return tuple(range(num_layers) if moe_layers is None else moe_layers)


def _complete(ids_TLK: np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of all tokens of one sequence."""
    num_missing = num_tokens - len(ids_TLK)
    if num_missing not in (0, 1):
        raise ValueError(
            f"num_tokens_S must be the recorded rows or one more, got {num_tokens} tokens for "
            f"{len(ids_TLK)} rows"
        )
    row_mask_T = np.ones(num_tokens, bool)
    if num_missing:
        row_mask_T[-1] = False
        filler = np.zeros((1, *ids_TLK.shape[1:]), ids_TLK.dtype)
        return np.concatenate([ids_TLK, filler]), row_mask_T
    if num_tokens and ((ids_TLK[-1] == 0).all() or (ids_TLK[-1] == -1).all()):
        row_mask_T[-1] = False
    return ids_TLK, row_mask_T
