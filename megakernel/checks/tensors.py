"""Checks of one tensor: each raises with the argument's name, the rule and the value."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.forward_ad import unpack_dual

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_tensor(name: str, tensor: Tensor, ndim: int) -> None:
    """Raise unless ``tensor`` is a contiguous floating tensor with ``ndim`` axes."""
    check_float(name, tensor, ndim)
    check_contiguous(name, tensor)


def check_bias(name: str, bias: Tensor | None, shape: tuple[int, ...], weight: Tensor) -> None:
    """Raise unless ``bias`` is None or a contiguous floating tensor beside the weight."""
    if bias is not None:
        check_tensor(name, bias, len(shape))
        check_shape(name, bias, shape)
        if bias.device != weight.device:
            raise ValueError(f"{name} must be on {weight.device} like down_EHI, got {bias.device}")


def check_float(name: str, tensor: Tensor, ndim: int) -> None:
    """Raise unless ``tensor`` is a floating tensor with ``ndim`` axes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes, got shape {tuple(tensor.shape)}")


def check_no_grad(name: str, tensor: Tensor) -> None:
    """Raise on a tensor that autograd would have to follow where there is nothing to follow."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require grad, since it gets no gradient here; call under "
            "torch.no_grad(), or detach it"
        )


def check_no_tangent(name: str, tensor: Tensor) -> None:
    """Raise on a tensor with a tangent: the layer has no forward-mode derivative."""
    # Outside of every level, as in nearly all calls, unpack_dual would only cost time.
    if forward_ad._current_level >= 0 and unpack_dual(tensor).tangent is not None:
        raise ValueError(f"{name} must have no tangent: there are no forward-mode derivatives")


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Raise unless the tensor is contiguous; a silent copy would be a second launch."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless the tensor has the shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def check_device(name: str, tensor: Tensor, x_TH: Tensor) -> None:
    """Raise unless the tensor is where the tokens are."""
    if tensor.device != x_TH.device:
        raise ValueError(f"{name} must be on {x_TH.device} like x_TH, got {tensor.device}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors share dtype and device."""
    if tensor.dtype != other.dtype:
        raise ValueError(f"{name} must have the dtype of {other_name}, {other.dtype}, "
                         f"got {tensor.dtype}")  # fmt: skip
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, "
                         f"got {tensor.device}")  # fmt: skip


def check_main_grad(name: str, buffer: Tensor, weight: Tensor) -> None:
    """Raise unless a buffer can hold the float32 gradient of a weight."""
    check_float(name, buffer, weight.ndim)
    if buffer.dtype != torch.float32:
        raise ValueError(f"{name} must be float32, got {buffer.dtype}")
    check_shape(name, buffer, tuple(weight.shape))
    if buffer.stride() != weight.stride():
        raise ValueError(
            f"{name} must have the strides of its weight, {weight.stride()}, got {buffer.stride()}"
        )
    if buffer.device != weight.device:
        raise ValueError(f"{name} must be on {weight.device} like its weight, got {buffer.device}")


def check_positive(name: str, value: object) -> None:
    """Raise unless ``value`` is an integer in [1, 2^31)."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise ValueError(f"{name} must be a positive integer below 2^31, got {value!r}")


def check_seed(name: str, value: object) -> None:
    """Raise unless ``value`` is an integer in [0, 2^31)."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise ValueError(f"{name} must be an integer in [0, 2^31), got {value!r}")


def check_integers(name: str, tensor: Tensor, ndim: int) -> None:
    """Raise ValueError unless ``tensor`` is an integer tensor with ``ndim`` axes."""
    if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.dtype == torch.bool:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} must be an integer tensor, got {got}")
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes, got shape {tuple(tensor.shape)}")
