"""What was routed where: the expert choices of a batch, ready to plan from.

A trace holds logical expert ids, one row per token that went through the model. Id -1 and rows
that ``row_mask_T`` leaves out are in no load. Ids that would corrupt a load are refused on
construction.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any, Self

import numpy as np

from balance.ids import TraceReport, check_ids, check_num_experts, inspect_ids, rows_per_chunk


@dataclass(frozen=True, eq=False)
class Trace:
    """The routing of one training batch: which experts every token chose, layer by layer.

    Attributes:
        ids_TLK: logical expert of each token, MoE layer and choice; any integer dtype, in
            [0, num_experts), or -1 for "no expert" (such a choice is in no load).
        micro_batch_T: micro-batch of each token, from 0.
        source_rank_T: rank that holds the token before dispatch, from 0.
        num_experts: logical experts of a layer, at least 1.
        weights_TLK: combine weight of each choice, finite; None when not recorded.
        row_mask_T: bool, False for rows that are padding; None when every row counts.
        label: where the trace comes from, shown in every table and picture.

    Raises:
        ValueError: on a shape, dtype or range that breaks the rules above, and on a top-k row
            that names one expert twice.
    """

    ids_TLK: np.ndarray
    micro_batch_T: np.ndarray
    source_rank_T: np.ndarray
    num_experts: int
    weights_TLK: np.ndarray | None = None
    row_mask_T: np.ndarray | None = None
    label: str = "unnamed"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids_TLK", check_ids(self.ids_TLK))
        object.__setattr__(self, "num_experts", check_num_experts(self.num_experts))
        for name in ("micro_batch_T", "source_rank_T"):
            values_T = _check_numbers(name, getattr(self, name), self.num_tokens)
            object.__setattr__(self, name, values_T)
        if self.row_mask_T is not None:
            object.__setattr__(self, "row_mask_T", _check_mask(self.row_mask_T, self.num_tokens))
        if self.weights_TLK is not None:
            weights_TLK = _check_weights(self.weights_TLK, self.ids_TLK.shape)
            object.__setattr__(self, "weights_TLK", weights_TLK)
        _refuse_bad_ids(inspect_ids(self.ids_TLK, self.num_experts, self.row_mask_T), self)

    @property
    def num_tokens(self) -> int:
        """Rows of the trace, masked ones included."""
        return self.ids_TLK.shape[0]

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return self.ids_TLK.shape[1]

    @property
    def top_k(self) -> int:
        """Experts each token chooses in a layer."""
        return self.ids_TLK.shape[2]

    @property
    def num_micro_batches(self) -> int:
        """One more than the largest micro-batch index; 0 for a trace without tokens."""
        return int(self.micro_batch_T.max()) + 1 if self.num_tokens else 0

    @property
    def num_source_ranks(self) -> int:
        """One more than the largest source rank; 0 for a trace without tokens."""
        return int(self.source_rank_T.max()) + 1 if self.num_tokens else 0

    def report(self) -> TraceReport:
        """Count missing ids and find all-zero layers."""
        return inspect_ids(self.ids_TLK, self.num_experts, self.row_mask_T)

    def rows_of(self, micro_batch: int) -> np.ndarray:
        """Rows of a micro-batch in trace order, int64; masked rows are among them."""
        if not 0 <= micro_batch < self.num_micro_batches:
            raise ValueError(
                f"micro_batch must lie in [0, {self.num_micro_batches}), got {micro_batch}"
            )
        return np.flatnonzero(self.micro_batch_T == micro_batch)

    def ids_of(self, micro_batch: int) -> np.ndarray:
        """ids_TLK int32 of a micro-batch in trace order; masked rows hold -1 only."""
        rows_T = self.rows_of(micro_batch)
        ids_TLK = self.ids_TLK[rows_T].astype(np.int32)
        if self.row_mask_T is not None:
            ids_TLK[~self.row_mask_T[rows_T]] = -1
        return ids_TLK

    def source_ranks_of(self, micro_batch: int) -> np.ndarray:
        """Source rank of each token of a micro-batch, int32, in the order of ``ids_of``."""
        return self.source_rank_T[self.rows_of(micro_batch)]

    def counts(self, num_ranks: int) -> np.ndarray:
        """Assignments per micro-batch, layer, source rank and expert.

        Args:
            num_ranks: ranks of the plan to be made; every source rank must be below it.

        Returns:
            load_BLRE, int32. Works group by group, so beside the result it needs well under a
            gigabyte, whatever the length of the trace.
        """
        if num_ranks < max(1, self.num_source_ranks):
            raise ValueError(
                f"num_ranks must be at least {max(1, self.num_source_ranks)}, the source ranks "
                f"of the trace, got {num_ranks}"
            )
        shape = (self.num_micro_batches, self.num_layers, num_ranks, self.num_experts)
        load_BLRE = np.zeros(shape, np.int32)
        for micro_batch, rank, rows_T in self._groups():
            load_BLRE[micro_batch, :, rank, :] += self._count(rows_T)
        return load_BLRE

    def loads(self) -> np.ndarray:
        """Assignments per micro-batch, layer and expert: load_BLE, int32."""
        shape = (self.num_micro_batches, self.num_layers, self.num_experts)
        load_BLE = np.zeros(shape, np.int32)
        for micro_batch, _, rows_T in self._groups():
            load_BLE[micro_batch] += self._count(rows_T)
        return load_BLE

    def save(self, path: str | PathLike[str]) -> None:
        """Write the trace as one compressed npz file at exactly this path."""
        arrays: dict[str, Any] = {
            "ids_TLK": self.ids_TLK,
            "micro_batch_T": self.micro_batch_T,
            "source_rank_T": self.source_rank_T,
            "num_experts": np.int64(self.num_experts),
            "label": np.str_(self.label),
        }
        for name in ("weights_TLK", "row_mask_T"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read what ``save`` wrote; other layouts are read by ``balance.formats.read``.

        Raises:
            ValueError: when an array is missing, naming it, or breaks a rule of ``Trace``.
        """
        with np.load(path, allow_pickle=False) as arrays:
            needed = ("ids_TLK", "micro_batch_T", "source_rank_T", "num_experts")
            missing = [name for name in needed if name not in arrays]
            if missing:
                raise ValueError(
                    f"path must be a saved Trace; {path} lacks {', '.join(missing)} and has "
                    f"{', '.join(arrays.files)} (balance.formats.read reads other layouts)"
                )
            optional = {
                name: arrays[name] for name in ("weights_TLK", "row_mask_T") if name in arrays
            }
            return cls(
                arrays["ids_TLK"],
                arrays["micro_batch_T"],
                arrays["source_rank_T"],
                int(arrays["num_experts"]),
                label=str(arrays["label"]) if "label" in arrays else str(path),
                **optional,
            )

    def _groups(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Chunks of rows that share a micro-batch and a source rank, masked rows left out."""
        num_ranks = self.num_source_ranks
        group_T = self.micro_batch_T.astype(np.int64) * num_ranks + self.source_rank_T
        order_T = np.argsort(group_T, kind="stable")
        if self.row_mask_T is not None:
            order_T = order_T[self.row_mask_T[order_T]]
        if not len(order_T):
            return
        starts = np.flatnonzero(np.diff(group_T[order_T], prepend=-1))
        step = rows_per_chunk(self.ids_TLK)
        for start, stop in zip(starts, [*starts[1:], len(order_T)], strict=True):
            micro_batch, rank = divmod(int(group_T[order_T[start]]), num_ranks)
            for first in range(start, stop, step):
                yield micro_batch, rank, order_T[first : min(first + step, stop)]

    def _count(self, rows_T: np.ndarray) -> np.ndarray:
        """load_LE of some rows. Id -1 is counted in a column of its own, which is cut off."""
        width = self.num_experts + 1
        key_TLK = self.ids_TLK[rows_T].astype(np.int64)
        key_TLK[key_TLK < 0] = self.num_experts
        key_TLK += np.arange(self.num_layers)[:, None] * width
        load = np.bincount(key_TLK.ravel(), minlength=self.num_layers * width)
        return load.reshape(self.num_layers, width)[:, :-1]


def _check_numbers(name: str, values: Any, num_tokens: int) -> np.ndarray:
    """One number per token, values_T int32, or ValueError."""
    values_T = np.asarray(values)
    if values_T.shape != (num_tokens,) or (num_tokens and values_T.dtype.kind not in "iu"):
        raise ValueError(
            f"{name} must hold one integer for each of the {num_tokens} tokens, got "
            f"{values_T.dtype} {list(values_T.shape)}"
        )
    if num_tokens and values_T.min() < 0:
        raise ValueError(f"{name} must not be negative, got {values_T.min()}")
    if num_tokens and values_T.max() > np.iinfo(np.int32).max:
        raise ValueError(f"{name} must fit int32, got {values_T.max()}")
    return values_T.astype(np.int32)


def _check_mask(row_mask: Any, num_tokens: int) -> np.ndarray:
    """row_mask_T bool, or ValueError."""
    row_mask_T = np.asarray(row_mask)
    if row_mask_T.shape != (num_tokens,) or row_mask_T.dtype != bool:
        raise ValueError(
            f"row_mask_T must hold one bool for each of the {num_tokens} tokens, got "
            f"{row_mask_T.dtype} {list(row_mask_T.shape)}"
        )
    return row_mask_T


def _check_weights(weights: Any, shape: tuple[int, ...]) -> np.ndarray:
    """weights_TLK, or ValueError."""
    weights_TLK = np.asarray(weights)
    if weights_TLK.shape != shape or weights_TLK.dtype.kind != "f":
        raise ValueError(
            f"weights_TLK must be floating point of shape {list(shape)}, got "
            f"{weights_TLK.dtype} {list(weights_TLK.shape)}"
        )
    if not np.isfinite(weights_TLK).all():
        raise ValueError("weights_TLK must be finite, got NaN or infinity")
    return weights_TLK


def _refuse_bad_ids(report: TraceReport, trace: Trace) -> None:
    """ValueError when ids would be miscounted; missing ones (-1) are fine."""
    if report.num_out_of_range:
        raise ValueError(
            f"ids_TLK must lie in [0, {trace.num_experts}) or be -1, got "
            f"{report.num_out_of_range} other ids"
        )
    if report.first_duplicate is not None:
        token, layer = report.first_duplicate
        raise ValueError(
            "ids_TLK must name an expert at most once in a top-k row, got "
            f"{report.num_duplicate_rows} rows that name one twice; the first is token {token}, "
            f"layer {layer}: {trace.ids_TLK[token, layer].tolist()} (padding belongs in "
            "row_mask_T, dense layers must be left out)"
        )
