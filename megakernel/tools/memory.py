"""What a layer keeps alive between forward and backward, in bytes: ``python -m megakernel.tools.memory``.

Counted from the very tensors that a call would save, without storage.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megakernel.autograd import SAVES, kept_of, results_of, with_saved
from megakernel.config import KernelConfig
from megakernel.launch.call import Call
from megakernel.plan.buffers import flatten
from megakernel.tools.compile_cases import CompileCase, make_call
from megakernel.tools.models import KIND_OF_MODEL, MODELS

PARAMETERS = ("router.", "experts.", "shared.")
MIB = 1 << 20


@dataclass(frozen=True)
class Kept:
    """Bytes that one call keeps alive until its backward has run.

    Attributes:
        own: memory that nobody but the backward knows: z, and what a dialect needs besides.
        results: what the call returned and the backward reads: ids, weights, logits. Freed by
            neither as long as the caller holds them.
        tokens: x, an argument.
        parameters: router, experts and shared expert, which are alive anyway.
    """

    own: int
    results: int
    tokens: int
    parameters: int

    @property
    def layer_bytes(self) -> int:
        """What a layer adds to a step if nobody else holds its tokens or results."""
        return self.own + self.results + self.tokens


def kept_by(call: Call, save: str) -> Kept:
    """Count what a call keeps; tensors that share memory count once.

    Args:
        call: of a layer, as it would be without gradients; its tensors need no storage.
        save: as in ``megakernel.moe``.
    """
    b = call.buffers
    given = flatten(b)
    kept = flatten(kept_of(with_saved(call, save).buffers))
    results = set(results_of(call)) | {"routing.expert_of_TK"}
    owned = {name: tensor for name, tensor in kept.items() if name not in given}
    named = {name: tensor for name, tensor in kept.items() if name in given}
    parameters = {n: t for n, t in named.items() if n.startswith(PARAMETERS)}
    of_call = {n: t for n, t in named.items() if n not in parameters and n != "x_TH"}
    assert all(name.removeprefix("routing.") in {r.removeprefix("routing.") for r in results}
               for name in of_call)  # fmt: skip
    return Kept(
        total(owned.values()), total(of_call.values()), kept["x_TH"].nbytes,
        total(parameters.values()),
    )  # fmt: skip


def total(tensors) -> int:
    """Return the bytes of some tensors."""
    return sum(tensor.nbytes for tensor in tensors)
