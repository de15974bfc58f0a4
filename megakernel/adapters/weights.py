"""Weights that a host keeps as several parameters, read as the one block the kernel takes.

Parameters that lie in memory one after another are read in place. Others are copied at each call:
a kept copy would go stale, since an update through ``.data`` changes no version counter. ``pack``
moves parameters together once, after which they are read in place for good.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def read_stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Return [N, X, Y] of N matrices of one shape: a view where they lie in a row, else a copy."""
    view = view_stacked(matrices)
    return torch.stack(list(matrices)) if view is None else view


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
    return torch.cat([gate_EIH, up_EIH], dim=1) if view is None else view


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
