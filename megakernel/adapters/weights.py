"""Weights that a host keeps as several parameters, read as the one block the kernel takes.

Parameters that lie in memory one after another are read in place; each gets its own gradient, a
slice of the block's. Others are copied at each call: a kept copy would go stale, since an update
through ``.data`` changes no version counter. ``pack`` moves parameters together once, after which
they are read in place for good.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Split = Callable[[Tensor], Sequence[Tensor]]


class InPlace(torch.autograd.Function):
    """Parameters as one tensor in the memory that they lie in, which PyTorch has no operator for.

    The parameters are saved, though no gradient needs their values: the tensor has no version
    counter in common with them, and a change of any before the backward must be an error.
    """

    @staticmethod
    def forward(ctx: Any, view: Tensor, split: Split, *parameters: Tensor) -> Tensor:
        """Return the memory of ``view``; ``split`` cuts its gradient into the parameters'."""
        ctx.split = split
        ctx.save_for_backward(*parameters)
        ctx.set_materialize_grads(False)
        layout = view.storage_offset(), view.shape, view.stride()
        return view.new_empty(0).set_(view.untyped_storage(), *layout)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        """Cut the gradient; without one the parameters have none."""
        parameters = ctx.saved_tensors  # raises if one was changed
        parts = [None] * len(parameters) if gradient is None else ctx.split(gradient)
        return None, None, *parts


def in_place(view: Tensor, split: Split, parameters: Sequence[Tensor]) -> Tensor:
    """Return parameters' memory as one tensor, through which each gets its gradient.

    Args:
        view: of that memory, made without gradients.
        split: cuts a gradient of the view into one for each parameter.
        parameters: what lies in that memory.
    """
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
        view = InPlace.apply(view, split, *parameters)
    return view


def read_stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Return [N, X, Y] of N matrices of one shape: a view where they lie in a row, else a copy."""
    view = view_stacked(matrices)
    if view is None:
        return torch.stack(list(matrices))
    return in_place(view, torch.unbind, matrices)


@torch.no_grad()
def view_stacked(matrices: Sequence[Tensor]) -> Tensor | None:
    """Return the view [N, X, Y] of contiguous matrices that lie in a row, or None."""
    first = matrices[0]
    storage, start, step = first.untyped_storage().data_ptr(), first.data_ptr(), first.nbytes
    for index, matrix in enumerate(matrices):
        alike = matrix.shape == first.shape and matrix.dtype == first.dtype
        lies_there = matrix.data_ptr() == start + index * step
        if not (alike and lies_there and matrix.is_contiguous()):
            return None
        if matrix.untyped_storage().data_ptr() != storage:  # neighbours by chance
            return None
    shape = (len(matrices), *first.shape)
    return first.as_strided(shape, (first.numel(), *first.stride()))


@torch.inference_mode(False)  # parameters that came from it could not be trained
def pack_stacked(parameters: Sequence[nn.Parameter]) -> None:
    """Move parameters into one block of memory; they stay the same objects with the same values.

    Call it before anything keeps addresses of them: an optimizer's flat buffers, a CUDA graph.
    """
    if view_stacked(parameters) is None:
        block = torch.stack([parameter.detach() for parameter in parameters])
        for parameter, matrix in zip(parameters, block, strict=True):
            parameter.data = matrix


def read_gate_up(gate_EIH: Tensor, up_EIH: Tensor) -> Tensor:
    """Return [E, 2I, H] of gate and up rows: a view where they alternate, else a copy."""
    view = view_gate_up(gate_EIH, up_EIH)
    if view is None:
        return torch.cat([gate_EIH, up_EIH], dim=1)
    return in_place(view, split_gate_up, (gate_EIH, up_EIH))


def split_gate_up(gate_up_E2IH: Tensor) -> Sequence[Tensor]:
    """Return gate and up rows of each expert."""
    return gate_up_E2IH.chunk(2, dim=1)


@torch.no_grad()
def view_gate_up(gate_EIH: Tensor, up_EIH: Tensor) -> Tensor | None:
    """Return the view [E, 2I, H] if each expert's up rows follow its gate rows, or None."""
    num_experts, rows, width = gate_EIH.shape
    strides = (2 * rows * width, width, 1)
    alike = gate_EIH.stride() == up_EIH.stride() == strides and gate_EIH.dtype == up_EIH.dtype
    follows = up_EIH.data_ptr() == gate_EIH.data_ptr() + rows * width * gate_EIH.element_size()
    same = gate_EIH.untyped_storage().data_ptr() == up_EIH.untyped_storage().data_ptr()
    if not (alike and follows and same):
        return None
    return gate_EIH.as_strided((num_experts, 2 * rows, width), strides)


@torch.inference_mode(False)  # parameters that came from it could not be trained
def pack_gate_up(gate_EIH: nn.Parameter, up_EIH: nn.Parameter) -> None:
    """Let each expert's up rows follow its gate rows; the parameters become views with strides.

    Call it before anything keeps addresses of them.
    """
    if view_gate_up(gate_EIH, up_EIH) is None:
        block = torch.stack([gate_EIH.detach(), up_EIH.detach()], dim=1)
        gate_EIH.data, up_EIH.data = block[:, 0], block[:, 1]
