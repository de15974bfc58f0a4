"""Numbers at the border: nothing is cut down to an integer silently."""

import operator
from typing import Any


def whole(name: str, value: Any, least: int) -> int:
    """The value as an int.

    Args:
        name: of the argument.
        value: an int, or anything that stands for exactly one (a numpy integer, say).
        least: smallest value allowed.

    Raises:
        ValueError: it is none, a bool, or below ``least``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return number
