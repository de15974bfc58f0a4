"""Gradients of expert weights where Megatron-Core keeps them: float32 buffers of the parameters.

The backward launch writes ``param.main_grad`` itself. Megatron's data parallelism hooks into the
accumulation of ``param.grad`` to learn that a parameter is done, and throws that gradient away.
So autograd is handed one that says nothing. It is zero, and new each time: Transformer Engine
leaves its own uninitialised and shares it between parameters, which is right only while that hook
is there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megakernel.adapters.weights import view_stacked
from megakernel.experts import MainGrad

FLAG = "grad_added_to_main_grad"


class ParametersMainGrad(MainGrad):
    """The buffers of parameters, under the flags that those parameters have.

    Args:
        parameters: whose ``grad_added_to_main_grad`` is read and set; without one it is False.
        gate_up_E2IH, down_EHI: see :class:`MainGrad`.
    """

    def __init__(self, parameters: Sequence[Any], gate_up_E2IH: Tensor, down_EHI: Tensor) -> None:
        self.parameters = parameters
        self.gate_up_E2IH, self.down_EHI = gate_up_E2IH, down_EHI

    @property
    def grad_added_to_main_grad(self) -> bool:
        """Whether the buffers hold gradients of this step; read when the backward runs.

        Raises:
            ValueError: if only some do, since one launch writes them all.
        """
        flags = [bool(getattr(parameter, FLAG, False)) for parameter in self.parameters]
        if len(set(flags)) > 1:
            raise ValueError(
                f"{FLAG} must be the same for all expert weights of a layer, "
                f"got True for {sum(flags)} of {len(flags)}"
            )
        return flags[0]

    @grad_added_to_main_grad.setter
    def grad_added_to_main_grad(self, value: bool) -> None:
        for parameter in self.parameters:
            setattr(parameter, FLAG, value)


class WithPlaceholder(torch.autograd.Function):
    """A weight whose gradient went elsewhere: what is passed on instead is zero."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        """Return the weight."""
        ctx.set_materialize_grads(False)
        ctx.kind = {"size": weight.shape, "dtype": weight.dtype, "device": weight.device}
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, _: None) -> Tensor:
        """Return zeros: hooks run on the thread of the device that a gradient lies on."""
        return torch.zeros(**ctx.kind)


def main_grad_of(linear: str, parameters: Sequence[Any]) -> Tensor:
    """Return the buffers of a linear's parameters as one [E, X, Y], in the order of the experts.

    Raises:
        ValueError: naming the linear, for a parameter without one, for weights that lie apart,
            which are copied, and for buffers that lie apart.
    """
    buffers = [getattr(parameter, "main_grad", None) for parameter in parameters]
    there = [buffer for buffer in buffers if buffer is not None]
    if len(there) < len(buffers):
        raise ValueError(
            f"{linear} must have a main_grad for each weight with gradient_accumulation_fusion, "
            f"got {len(there)} for {len(buffers)}"
        )
    if len(parameters) == 1:
        return there[0].view(-1, *parameters[0].shape[-2:])
    if view_stacked(parameters) is None:
        raise ValueError(
            f"{linear} must have its weights in a row with gradient_accumulation_fusion, as one "
            "weight or after pack(), got weights apart"
        )
    stacked = view_stacked(there)
    if stacked is None:
        raise ValueError(
            f"{linear} must have its main_grad buffers in a row, one expert after the other as "
            "its weights are, got buffers apart"
        )
    return stacked
