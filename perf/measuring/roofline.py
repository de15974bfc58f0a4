"""What a layer must at least do, and what the machine can at most do."""

import typing
from dataclasses import dataclass

import numpy as np
import torch

from perf.measuring.measure import Protocol, Timing, time_graphs

DENSE_SIZE = 8192
COPY_BYTES = 4 << 30
L2_READ_BYTES = 32 << 20
L2_READS = 64


class ExpertWidths(typing.Protocol):
    """H and I of a layer's experts, as every description of a model names them."""

    @property
    def hidden(self) -> int:
        """H."""

    @property
    def intermediate(self) -> int:
        """I."""


@dataclass(frozen=True)
class Work:
    """Useful work of one call: nothing padded, nothing read twice.

    Attributes:
        flops: of the expert FFN.
        bytes: from and to memory.
    """

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes


def useful_work(model: ExpertWidths, num_tokens: int, load_E: np.ndarray) -> Work:
    """Count a call's work.

    flops = 6·A·H·I with A = T·K the served assignments: gate, up and down product of each. The
    router's 2·T·H·E are not counted. bytes = weights of the experts that serve an assignment,
    tokens in, tokens out; two bytes an element. The intermediate could stay on chip.
    """
    flops = 6.0 * load_E.sum() * model.hidden * model.intermediate
    weights = 3 * np.count_nonzero(load_E) * model.hidden * model.intermediate
    return Work(flops, 2.0 * float(weights + 2 * num_tokens * model.hidden))


# Bytes that move for each element of a weight's gradient: written in bfloat16, written in float32
# (the first micro-batch of a step), or read and written in float32 (every later one).
GRADIENT_BYTES = {"bfloat16": 2, "float32": 4, "added": 8}


def backward_work(
    model: ExpertWidths,
    num_tokens: int,
    load_E: np.ndarray,
    gradients: str = "bfloat16",
    save: str = "preactivations",
) -> Work:
    """Count the work of a backward that is asked for everything.

    flops = 12·A·H·I: dA, dx of the rows, and two gradients of weights, each of them as much as the
    forward's product of the same weight; 16·A·H·I where FFN1 is run again. bytes = weights of the
    experts that serve an assignment, their gradients, tokens and the output's gradient in, the
    tokens' gradient out, and what the forward saved. The rest could stay on chip.

    Args:
        model: sizes.
        num_tokens: T.
        load_E: assignments of each expert.
        gradients: key of GRADIENT_BYTES, of the expert weights; overwritten ones are written for
            every expert, with zeros where none was chosen.
        save: as in ``megakernel.moe``.
    """
    H, I, served = model.hidden, model.intermediate, int(np.count_nonzero(load_E))
    again = 4.0 if save == "nothing" else 0.0
    flops = (12.0 + again) * float(load_E.sum()) * H * I
    written = served if gradients == "added" else len(load_E)
    weights = 3 * H * I * (2 * served + GRADIENT_BYTES[gradients] * written)
    saved = 0 if save == "nothing" else 2 * 2 * int(load_E.sum()) * I
    return Work(flops, float(weights + saved + 2 * 3 * num_tokens * H))


@dataclass(frozen=True)
class Roofs:
    """What the machine can do at most.

    Attributes:
        dense_flops_per_s: of a dense bfloat16 product.
        copy_bytes_per_s: of a copy, bytes read and written both counted.
        l2_bytes_per_s: of reads from L2.
        source: where the figures come from; "measured" only if they were, in this run.
    """

    dense_flops_per_s: float
    copy_bytes_per_s: float
    l2_bytes_per_s: float
    source: str

    def least_us(self, work: Work) -> float:
        """Time that no implementation can beat: the slower of the two roofs."""
        return 1e6 * max(work.flops / self.dense_flops_per_s, work.bytes / self.copy_bytes_per_s)


# Published for one H200: 770 to 800 TFLOP/s and 4.3 TB/s. For L2 reads figures between 5.5 and
# 8.7 TB/s are published for the H100, whose L2 is the same.
ASSUMED_H200 = Roofs(780e12, 4.3e12, 7e12, "assumed for one H200")
# The same chip with other memory: 3.35 TB/s by its data sheet, of which about nine tenths are had.
ASSUMED_H100 = Roofs(780e12, 3.0e12, 7e12, "assumed for one H100")


def measure_roofs(device: torch.device, protocol: Protocol) -> Roofs:
    """Measure the roofs on random data (zeros would run faster than any real data)."""
    left, right = (
        torch.randn(DENSE_SIZE, DENSE_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    source = torch.randn(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    cached = torch.randn(L2_READ_BYTES // 4, device=device)

    def read_cached() -> None:
        for _ in range(L2_READS):
            cached.sum()

    calls = {
        "dense": lambda: left @ right,
        "copy": lambda: target.copy_(source),
        "l2": read_cached,
    }
    timings, refused = time_graphs(calls, protocol, device)
    if refused:
        raise RuntimeError(f"the roofs could not be measured: {refused}")
    return Roofs(
        _rate(timings["dense"], 2.0 * DENSE_SIZE**3),
        _rate(timings["copy"], 2.0 * COPY_BYTES),
        _rate(timings["l2"], float(L2_READS * L2_READ_BYTES)),
        "measured",
    )


def _rate(timing: Timing, amount: float) -> float:
    return amount / (timing.median * 1e-6)
