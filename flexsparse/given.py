"""What a constructor is given: numbers, of numpy too and stored as Python's, and arguments by keyword."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch

Class = TypeVar("Class", bound=type)
PLAIN: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None), torch.dtype)


def never_changes(value: Any) -> bool:
    """Whether a value can stand for what was made of it: a number, a text, a tuple or a frozen dataclass of such."""
    if isinstance(value, tuple):
        return all(never_changes(each) for each in value)
    parameters = getattr(type(value), "__dataclass_params__", None)
    if parameters is None or isinstance(value, type):
        return isinstance(value, PLAIN)
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    own = getattr(value, "__dict__", fields).keys() <= fields.keys()
    return parameters.frozen and own and all(map(never_changes, fields.values()))


def to_int(value: Any) -> int | None:
    """A plain int; None where it is none (a bool, a float, a word)."""
    if type(value) is int:  # a graph's own size stays symbolic: operator.index would make it a constant
        return value
    if value is None or isinstance(value, bool | float | str):  # Dynamo of torch 2.11 fails on operator.index of these
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


def keywords_only(either: str | None = None) -> Callable[[Class], Class]:
    """Decorates a class that takes keywords only: a positional argument gets an error that writes the keyword.

    Args:
        either: a second keyword that may have been meant instead of the first.
    """

    def decorate(cls: Class) -> Class:
        init = cls.__init__  # type: ignore[misc]
        names = list(inspect.signature(init).parameters)[1:]

        @functools.wraps(init)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            if args:
                given = args[:1] if either else args
                right = ", ".join(f"{name}={value!r}" for name, value in zip(names, given))
                other = f" or {cls.__name__}({either}=...)" if either else ""
                what = f"{args[0]!r} was" if len(args) == 1 else f"{' and '.join(map(repr, args))} were"
                raise TypeError(
                    f"{cls.__name__} takes keywords only, and {what} given by position: write {cls.__name__}({right}){other}"
                )
            init(self, **kwargs)

        cls.__init__ = checked  # type: ignore[misc]
        return cls

    return decorate
