"""What a layer keeps alive between forward and backward, in bytes, for every named model.

    python -m megakernel.tools.memory --tokens 8192

Counted from the very tensors that a call would save, without storage.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from megakernel.autograd import SAVES, kept_of, with_saved
from megakernel.config import KernelConfig
from megakernel.launch.call import Call
from megakernel.plan.buffers import flatten
from megakernel.tools.compile_cases import CompileCase, make_call
from megakernel.tools.models import KIND_OF_MODEL, MODELS

PARAMETERS = ("router.", "experts.", "shared.")
MIB = 1 << 20


@dataclass(frozen=True)
class Kept:
    """Bytes that one call keeps alive until its backward has run; of each tensor once.

    Attributes:
        own: what the call made for its backward alone, and nobody else holds.
        routing: ids, weights and logits: results of the call, or its arguments.
        tokens: x, an argument.
        parameters: weights and biases, which are alive anyway.
    """

    own: int
    routing: int
    tokens: int
    parameters: int

    @property
    def activations(self) -> int:
        """What a layer takes if nobody else holds its tokens or its routing."""
        return self.own + self.routing + self.tokens


def kept_by(call: Call, save: str) -> Kept:
    """Count what a call keeps if gradients are asked for.

    Args:
        call: of a layer, checked; its tensors need no storage.
        save: as in ``megakernel.moe``.
    """
    given = flatten(call.buffers)
    kept = flatten(kept_of(with_saved(call, save).buffers))
    own = {name for name in kept if name not in given}
    parameters = {name for name in kept if name.startswith(PARAMETERS)}
    routing = kept.keys() - own - parameters - {"x_TH"}
    parts = (own, routing, {"x_TH"}, parameters)
    return Kept(*(total(kept[name] for name in part) for part in parts))


def total(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of some tensors."""
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)


def kept_by_model(name: str, num_tokens: int, save: str) -> Kept:
    """Count what a layer of a named model keeps, in bfloat16, its router live.

    Args:
        name: key of MODELS.
        num_tokens: T.
        save: as in ``megakernel.moe``.
    """
    case = CompileCase("kept", KernelConfig(), MODELS[name], "live", KIND_OF_MODEL[name])
    return kept_by(make_call(case, num_tokens), save)


def make_table(num_tokens: int) -> str:
    """Return a table in Markdown: a row for each model, MiB per layer."""
    lines = [
        f"| model, T = {num_tokens}, MiB per layer | x | ids, weights, logits "
        + "".join(f"| {save}: its own | in all " for save in SAVES)
        + "|",
        "|---" * (3 + 2 * len(SAVES)) + "|",
    ]
    for name in MODELS:
        kept = {save: kept_by_model(name, num_tokens, save) for save in SAVES}
        first = kept[SAVES[0]]
        figures = [first.tokens, first.routing]
        figures += [part for one in kept.values() for part in (one.own, one.activations)]
        lines.append(f"| {name} | " + " | ".join(f"{one / MIB:.1f}" for one in figures) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="megakernel.tools.memory", description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="T (default: 8192)")
    given = parser.parse_args(arguments)
    if given.tokens < 1:
        parser.error(f"--tokens must be at least 1, got {given.tokens}")
    print(make_table(given.tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
