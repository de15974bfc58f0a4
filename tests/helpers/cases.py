"""Problem shapes the kernel is tested on, each with the reason it is there."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """One layer: shapes, dtype, and how its tokens are spread over the experts.

    ``skew`` is "random" (random logits), "one" (expert 0 is everybody's first choice) or "few"
    (half of the experts are never chosen, so it needs K <= E / 2).
    """

    name: str
    T: int
    K: int
    E: int
    H: int
    I: int
    reason: str
    dtype: torch.dtype = torch.float32
    skew: str = "random"


SHAPES = [
    Case("plain", 40, 2, 4, 64, 32, "every width a multiple of its tile"),
    Case("one-token", 1, 2, 4, 64, 32, "far below every tile"),
    Case("one-choice", 33, 1, 5, 48, 16, "K = 1 and a tail of one token"),
    Case("all-chosen", 17, 5, 5, 32, 24, "K = E: nothing left to choose from"),
    Case("one-expert", 9, 1, 1, 32, 16, "E = 1: no choice at all"),
    Case("prime-experts", 50, 3, 13, 40, 24, "E neither even nor a power of two"),
    Case("many-experts", 12, 4, 130, 32, 16, "more experts than a gate block and a prefix block"),
    Case("odd-widths", 21, 2, 6, 37, 19, "H and I odd: no TMA, masks everywhere"),
    Case("wide", 10, 2, 3, 200, 136, "H and I over several steps, with tails"),
    Case("takes-all", 45, 2, 6, 48, 32, "one expert in every token", skew="one"),
    Case("empty-experts", 37, 2, 8, 48, 32, "half of the experts without a row", skew="few"),
]
DTYPES = [
    Case("bfloat16", 40, 3, 7, 96, 48, "the training dtype", torch.bfloat16),
    Case("float16", 40, 3, 7, 96, 48, "smaller range, finer steps", torch.float16),
    Case("bfloat16-odd", 21, 2, 6, 37, 19, "16-bit without TMA", torch.bfloat16),
]
CASES = SHAPES + DTYPES


def name_of(case: Case) -> str:
    """Return the id pytest shows."""
    return case.name
