"""The launch as a custom op, so that torch.compile(fullgraph=True) can carry it.

The op takes tensors as two lists, integers that may change from call to call, and the rest as
text: which tensor is which, and the fields of the rule. No field is named here, so that a new one
needs no line.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megakernel.launch.call import Call, CallRule
from megakernel.launch.run import launch
from megakernel.plan.buffers import Buffers


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
    written = outputs_of(call.rule)
    outputs = {name: tensor for name, tensor in tensors.items() if name in written}
    inputs = {name: tensor for name, tensor in tensors.items() if name not in written}
    integers = [call.num_tiles, call.capacity, call.seed]
    text = encode((*inputs, *outputs), call.rule)
    _launch([*inputs.values()], [*outputs.values()], integers, text)


def outputs_of(rule: CallRule) -> set[str]:
    """Return the names of the tensors that a call writes, where it has them."""
    written = {"y_TH", "routing.logits_TE", "routing.load_E"}
    if rule.route != "given":
        written.add("routing.gate_TK")
    if rule.route == "live":
        written.add("routing.expert_of_TK")
    return written


def flatten(record: tuple, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of nested named tuples by dotted name, absent ones left out."""
    tensors: dict[str, Tensor] = {}
    for name, value in zip(record._fields, record, strict=True):  # type: ignore[attr-defined]
        if isinstance(value, tuple):
            tensors |= flatten(value, f"{prefix}{name}.")
        elif value is not None:
            tensors[prefix + name] = value
    return tensors


def unflatten(tensors: dict[str, Tensor]) -> Buffers:
    """Invert :func:`flatten`."""

    def fill(record: Any, prefix: str) -> Any:
        values = {
            name: fill(value, f"{prefix}{name}.")
            if isinstance(value, tuple)
            else tensors.get(prefix + name)
            for name, value in record._asdict().items()
        }
        return record._replace(**values)

    return fill(Buffers(), "")


@torch.compiler.assume_constant_result
def encode(names: tuple[str, ...], rule: CallRule) -> str:
    """Return the names of the tensors and the rule as text, a constant while tracing."""
    return json.dumps([names, asdict(rule)])


@lru_cache(maxsize=1024)
def decode(text: str) -> tuple[list[str], CallRule]:
    """Invert :func:`encode`."""
    names, values = json.loads(text)
    return names, _build(CallRule, values)


def _build(kind: Any, values: dict[str, Any]) -> Any:
    """Build a dataclass, and those inside it, from its fields as a dictionary."""
    types = {field.name: field.type for field in fields(kind)}
    return kind(
        **{
            name: _build(types[name], value) if is_dataclass(types[name]) else value
            for name, value in values.items()
        }
    )


def launcher() -> Callable[[Call], None]:
    """Return how calls are launched: as they are, or through the op while torch.compile traces."""
    return launch_op if torch.compiler.is_compiling() else launch
