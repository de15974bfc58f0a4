"""Are these expert ids fit to be counted?

Zero padding is the usual defect of recorded routing: it shows up as top-k rows that name expert 0
several times, and as layers in which every id is 0. Neither may end up in a load.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from balance.checks import whole

# Ids looked at in one go: 16k rows of 48 layers x top-8 are 6.3 M ids, 50 MB as int64.
_IDS_PER_CHUNK = 6_000_000


@dataclass(frozen=True)
class TraceReport:
    """What is wrong with, or worth knowing about, a block of expert ids.

    Attributes:
        num_rows: tokens looked at (masked rows are not).
        num_missing: ids equal to -1.
        num_out_of_range: ids below -1 or at least num_experts.
        num_duplicate_rows: (token, layer) rows that name one expert twice.
        first_duplicate: its (token, layer), None when there is none.
        all_zero_layers: layers in which every id is 0 although there are more experts: a dense
            layer, or padding.
    """

    num_rows: int
    num_missing: int
    num_out_of_range: int
    num_duplicate_rows: int
    first_duplicate: tuple[int, int] | None
    all_zero_layers: tuple[int, ...]


def inspect_ids(
    ids_TLK: np.ndarray, num_experts: int, row_mask_T: np.ndarray | None = None
) -> TraceReport:
    """Look for ids out of range, experts named twice in a row, and all-zero layers.

    Args:
        ids_TLK: any integer dtype.
        num_experts: logical experts of a layer.
        row_mask_T: bool; rows where it is False are not looked at.
    """
    num_tokens, num_layers, _ = ids_TLK.shape
    any_nonzero_L = np.zeros(num_layers, bool)
    num_rows = num_missing = num_out_of_range = num_duplicates = 0
    first: tuple[int, int] | None = None
    step = rows_per_chunk(ids_TLK)
    for start in range(0, num_tokens, step):
        ids = ids_TLK[start : start + step]
        rows_T = np.arange(start, start + len(ids))
        if row_mask_T is not None:
            keep_T = row_mask_T[start : start + step]
            ids, rows_T = ids[keep_T], rows_T[keep_T]
        num_rows += len(ids)
        num_missing += int(np.count_nonzero(ids == -1))
        num_out_of_range += int(np.count_nonzero((ids < -1) | (ids >= num_experts)))
        any_nonzero_L |= (ids != 0).any((0, 2))
        twice_TL = _names_one_twice(ids)
        num_duplicates += int(np.count_nonzero(twice_TL))
        if first is None and twice_TL.any():
            token, layer = np.unravel_index(int(twice_TL.argmax()), twice_TL.shape)
            first = (int(rows_T[token]), int(layer))
    zero_L = ~any_nonzero_L if num_rows and num_experts > 1 else np.zeros(num_layers, bool)
    all_zero = tuple(int(layer) for layer in np.flatnonzero(zero_L))
    return TraceReport(num_rows, num_missing, num_out_of_range, num_duplicates, first, all_zero)


def check_ids(ids_TLK: Any) -> np.ndarray:
    """Return ids as an integer array of rank 3, or raise ValueError."""
    ids_TLK = np.asarray(ids_TLK)
    if ids_TLK.ndim != 3 or ids_TLK.dtype.kind not in "iu" or 0 in ids_TLK.shape[1:]:
        raise ValueError(
            "ids_TLK must be an integer array of shape [tokens, layers >= 1, top_k >= 1], got "
            f"{ids_TLK.dtype} {list(ids_TLK.shape)}"
        )
    return ids_TLK


def check_num_experts(num_experts: Any) -> int:
    """Return num_experts as an int, or raise ValueError."""
    return whole("num_experts", num_experts, 1)


def _names_one_twice(ids_TLK: np.ndarray) -> np.ndarray:
    """twice_TL, bool. All pairs of columns beat a sort: contiguous byte compares."""
    ids_KTL = np.ascontiguousarray(ids_TLK.transpose(2, 0, 1))
    twice_TL = np.zeros(ids_TLK.shape[:2], bool)
    for k in range(1, len(ids_KTL)):
        present_TL = ids_KTL[k] >= 0
        for other in range(k):
            twice_TL |= present_TL & (ids_KTL[k] == ids_KTL[other])
    return twice_TL


def rows_per_chunk(ids_TLK: np.ndarray) -> int:
    """Rows whose ids, widened to 8 bytes, still take some 50 MB only."""
    return max(1, _IDS_PER_CHUNK // (ids_TLK.shape[1] * ids_TLK.shape[2]))
