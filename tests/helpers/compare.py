"""Comparisons: error, bits, and refusals."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def relative_error(*, actual: Tensor, expected: Tensor) -> float:
    """Return the root-mean-square error over the root mean square of the expected values."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())


def assert_same_bits(*, actual: Tensor, expected: Tensor) -> None:
    """Fail with the first difference unless the tensors are equal bit for bit (NaN included)."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    different = actual.contiguous().view(integer) != expected.contiguous().view(integer)
    if bool(different.any()):
        place = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(different.sum())} of {different.numel()} values differ, first at {place}: "
            f"{actual[place]} instead of {expected[place]}"
        )


def assert_refused(
    call: Callable[[], object], message: str, kind: type[Exception] = ValueError
) -> None:
    """Fail unless the call is refused in words that the pattern finds: argument, rule, value."""
    with pytest.raises(kind, match=message):
        call()
