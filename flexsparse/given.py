"""What a constructor is given, as plain numbers: numpy's numbers are taken, and stored as Python's."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from typing import Any, cast


def to_int(value: Any) -> int | None:
    """A plain int; None where it is none (a bool, a float, a word)."""
    if type(value) is int:  # a graph's own size stays symbolic: operator.index would make it a constant
        return value
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def to_float(value: Any) -> float | None:
    """A plain float; None where it is no real number (a bool, a word, a tensor). NaN is for the caller's range to refuse."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return float(value)


def to_axes(value: Any) -> tuple[int, int, int] | None:
    """Three plain ints of at least 1, as (t, h, w); None where they are none."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 3:
        return None
    axes = tuple(to_int(item) for item in value)
    if any(axis is None or axis < 1 for axis in axes):
        return None
    return cast(tuple[int, int, int], axes)
