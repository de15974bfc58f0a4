"""The numbers that host and device agree on: kinds of task, counters, error words, times."""

from typing import ClassVar

# What a task of each kind is called, and what its ``tile`` and ``block`` count.
KINDS = (
    ("route", "token tile {tile}"),
    ("prefix", "block of bins {tile}"),
    ("scatter", "token tile {tile}"),
    ("shared FFN1", "row tile {tile}, I block {block}"),
    ("FFN1", "row tile {tile}, I block {block}"),
    ("shared FFN2", "row tile {tile}, H block {block}"),
    ("FFN2", "row tile {tile}, H block {block}"),
    ("combine", "token tile {tile}, column group {block}"),
    ("shared dH", "row tile {tile}, I block {block}"),
    ("dH", "row tile {tile}, I block {block}"),
    ("shared dX", "row tile {tile}, H block {block}"),
    ("dX", "row tile {tile}, H block {block}"),
    ("dS", "token tile {tile}"),
    ("dx", "token tile {tile}, column group {block}"),
    ("dRouter", "block of experts {tile}, column block {block}"),
    ("dGateUp", "expert {tile}, output tile {block}"),
    ("dDown", "expert {tile}, output tile {block}"),
    ("shared dGateUp", "matrix of a slice {tile}, output tile {block}"),
    ("shared dDown", "slice {tile}, output tile {block}"),
    ("dBias", "expert {tile}, column block {block}"),
    ("dTokenGate", "H block {tile}"),
)
NAMES = tuple(name for name, _ in KINDS)
FORWARD_NAMES = NAMES[: NAMES.index("shared dH")]  # the others are of backward launches


class Protocol:
    """Constants of every launch; device code reads them through its spec."""

    # Kinds of task, indices into KINDS.
    ROUTE: ClassVar[int] = 0
    PREFIX: ClassVar[int] = 1
    SCATTER: ClassVar[int] = 2
    SHARED_FFN1: ClassVar[int] = 3
    FFN1: ClassVar[int] = 4
    SHARED_FFN2: ClassVar[int] = 5
    FFN2: ClassVar[int] = 6
    COMBINE: ClassVar[int] = 7
    SHARED_DH: ClassVar[int] = 8
    DH: ClassVar[int] = 9
    SHARED_DX: ClassVar[int] = 10
    DX: ClassVar[int] = 11
    DS: ClassVar[int] = 12
    DX_SUM: ClassVar[int] = 13
    DROUTER: ClassVar[int] = 14
    DGATE_UP: ClassVar[int] = 15
    DDOWN: ClassVar[int] = 16
    SHARED_DGATE_UP: ClassVar[int] = 17
    SHARED_DDOWN: ClassVar[int] = 18
    DBIAS: ClassVar[int] = 19
    DTOKEN_GATE: ClassVar[int] = 20

    # Segments that are no kind of task: two kinds interleaved.
    TAIL: ClassVar[int] = 30  # FFN2 and combine
    MIXED: ClassVar[int] = 31  # dDown and dx

    # Counters, in the order they lie in memory; column groups and row tiles follow.
    CLAIM: ClassVar[int] = 0
    EXIT: ClassVar[int] = 1
    ROUTE_DONE: ClassVar[int] = 2
    PREFIX_DONE: ClassVar[int] = 3
    SCATTER_DONE: ClassVar[int] = 4
    FIRST_COLUMN_GROUP: ClassVar[int] = 5  # of a forward list
    DH_DONE: ClassVar[int] = 5  # of a backward list
    DX_DONE: ClassVar[int] = 6
    DS_DONE: ClassVar[int] = 7
    AFTER_DS_DONE: ClassVar[int] = 8
    COUNTER_STRIDE: ClassVar[int] = 32  # int32 words: 128 bytes, so no two counters share a line

    # Words of the error buffer. A stall is (1, task, counter, value seen, value awaited, row
    # tiles); a refused input is (reason, token, choice, value). The host's copy also says which
    # schedule ran.
    STALL_AT: ClassVar[int] = 0
    SCHEDULE_AT: ClassVar[int] = 7
    INPUT_AT: ClassVar[int] = 8
    ERROR_WORDS: ClassVar[int] = 16

    # Reasons of a refused input; their texts are in errors.py.
    ID_OUT_OF_RANGE: ClassVar[int] = 1
    ID_TWICE: ClassVar[int] = 2
    SLOT_OF_OTHER_EXPERT: ClassVar[int] = 3

    # What a timed launch writes for each task, in the order it lies in memory.
    WORKER: ClassVar[int] = 0
    CLAIMED: ClassVar[int] = 1
    READY: ClassVar[int] = 2
    DONE: ClassVar[int] = 3
    NUM_TIMES: ClassVar[int] = 4

    PREFIX_BINS: ClassVar[int] = 32  # bins per prefix task
