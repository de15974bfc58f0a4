"""Kinds of numbers on the command line, refused by argparse with the rule they break."""

import argparse
from math import isfinite

TRACE_HELP = 'recording for the scenario "trace" (default: the demo\'s, in the repository)'


def count(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def rate(text: str) -> float:
    """A positive, finite number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (value > 0 and isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value
