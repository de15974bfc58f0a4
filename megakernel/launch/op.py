"""The launch as a custom op, so that torch.compile(fullgraph=True) can carry it.

The op takes tensors as two lists, integers that may change from call to call, and the rest as
text: which tensor is which, and the fields of the rule. No field is named here, so that a new one
needs no line.
"""

from ast import literal_eval
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megakernel.launch.call import Call, CallRule
from megakernel.launch.run import launch
from megakernel.plan.buffers import flatten, unflatten
from megakernel.plan.forward import outputs_of


@torch.library.custom_op("megakernel::launch", mutates_args=("outputs",))
def _launch(inputs: list[Tensor], outputs: list[Tensor], integers: list[int], call: str) -> None:
    names, rule = decode(call)
    buffers = unflatten(dict(zip(names, [*inputs, *outputs], strict=True)))
    launch(Call(buffers, rule, *integers))


@_launch.register_fake
def _(*args: object) -> None:
    """Outputs are arguments: nothing to make while tracing."""


def launch_op(call: Call) -> None:
    """Call :func:`megakernel.launch.run.launch` through the registered op."""
    tensors = flatten(call.buffers)
    written = outputs_of(call.rule.stages, call.rule.route)
    outputs = {name: tensor for name, tensor in tensors.items() if name in written}
    inputs = {name: tensor for name, tensor in tensors.items() if name not in written}
    integers = [call.num_tiles, call.capacity, call.seed, call.is_added]
    text = encode((*inputs, *outputs), call.rule)
    _launch([*inputs.values()], [*outputs.values()], integers, text)


def leaves_of(kind: Any, *above: str) -> list[tuple[str, ...]]:
    """Return the way to each field of a dataclass, and of those inside it, that is none itself."""
    ways = []
    for field in fields(kind):
        way = (*above, field.name)
        ways += leaves_of(field.type, *way) if is_dataclass(field.type) else [way]
    return ways


LEAVES = leaves_of(CallRule)


def leaf_of(record: Any, way: tuple[str, ...]) -> Any:
    """Return the field that a way leads to."""
    for name in way:
        record = getattr(record, name)
    return record


def encode(names: tuple[str, ...], rule: CallRule) -> str:
    """Return the names of the tensors and the rule as text; torch.compile can trace it."""
    return "|".join([",".join(names), *[repr(leaf_of(rule, way)) for way in LEAVES]])


@lru_cache(maxsize=1024)
def decode(text: str) -> tuple[list[str], CallRule]:
    """Invert :func:`encode`."""
    names, *values = text.split("|")
    return names.split(","), _build(CallRule, iter(map(literal_eval, values)))


def _build(kind: Any, values: Iterator[Any]) -> Any:
    """Build a dataclass, and those inside it, from its leaves in order."""
    types = [field.type for field in fields(kind)]
    return kind(*[_build(one, values) if is_dataclass(one) else next(values) for one in types])


def launcher() -> Callable[[Call], None]:
    """Return how calls are launched: as they are, or through the op while torch.compile traces."""
    return launch_op if torch.compiler.is_compiling() else launch
