"""What a plan may change and what it aims at."""

from dataclasses import dataclass

import numpy as np

from balance.checks import whole
from balance.measures.load import expert_bytes


@dataclass(frozen=True)
class PlanOptions:
    """What a plan may change and what it aims at.

    Attributes:
        reorder: choose home ranks anew; otherwise the previous ones stay.
        move_budget: most experts of a layer whose home rank may change; None for any number.
        cross_node_copies: at most so many spare slots of each node hold copies that stay for the
            whole batch and serve experts of other nodes; fewer in layers where fewer are better.
        tolerance: copies are added until the slowest rank is within this of the lower bound.
        min_tokens_per_replica: a micro-batch copy that would serve fewer tokens is not made.
        tile_rows: rows of a tile of the grouped product; every copy's tokens count rounded up to
            whole tiles. 1 counts tokens.
        locality: straggler load (assignments) worth giving up to save one assignment per node or
            rank from travelling; 0 ignores traffic.
        copy_bytes: one expert's weights; Qwen3-30B-A3B in bf16 unless given.
        state_bytes: what a home move carries in all; None means 7 × copy_bytes: bf16 weights, fp32
            master weights and the two moments of Adam (``balance.measures.load.bytes_moved``).
    """

    reorder: bool = True
    move_budget: int | None = None
    cross_node_copies: int = 0
    tolerance: float = 5e-4
    min_tokens_per_replica: int = 0
    tile_rows: int = 1
    locality: float = 0.0
    copy_bytes: int = expert_bytes(2048, 768)
    state_bytes: int | None = None

    def __post_init__(self) -> None:
        least = {"cross_node_copies": 0, "tolerance": 0, "min_tokens_per_replica": 0}
        least |= {"tile_rows": 1, "locality": 0, "copy_bytes": 0}
        for name in ("move_budget", "state_bytes"):
            if getattr(self, name) is not None:
                least[name] = 0
        for name, limit in least.items():
            value = getattr(self, name)
            if name not in ("tolerance", "locality"):
                object.__setattr__(self, name, whole(name, value, limit))
            elif not isinstance(value, int | float | np.number) or not limit <= value < np.inf:
                raise ValueError(f"{name} must be finite and at least {limit}, got {value!r}")
        if not isinstance(self.reorder, bool | np.bool_):
            raise ValueError(f"reorder must be True or False, got {self.reorder!r}")
