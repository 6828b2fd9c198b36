"""Lists on the command line: values separated by commas."""

from collections.abc import Callable
from typing import TypeVar

from flexsparse.training.errors import RunError

Number = TypeVar("Number", int, float)


def words(text: str) -> tuple[str, ...]:
    """The words of a list."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(name: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """The numbers of a list.

    Raises:
        RunError: something that is no such number.
    """
    try:
        return tuple(kind(word) for word in words(text))
    except ValueError:
        raise RunError(
            f"--{name} {text!r} is not understood: pass numbers separated by commas, such as 1,2,4"
        ) from None
