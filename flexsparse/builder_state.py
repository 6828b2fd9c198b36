"""What a mask builder of a user's own holds, which a compiled graph has read once and for all.

`select` is traced: a number that it reads is a constant of the graph, a tensor the very tensor. Changed in place, the tensor is
read anew at every call. A number that has changed, or a tensor put in another's place, is not, and nothing would show it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from flexsparse.errors import RewriteError
from flexsparse.given import PLAIN
from flexsparse.schedule import SparsitySchedule

Compile = TypeVar("Compile", bound=Callable[..., Any])
Held = dict[str, Any]
"""Names of attributes (``Own.n``) to numbers, texts and tensors."""


class Watch:
    """What builders held when a graph was compiled last."""

    def __init__(self) -> None:
        self.builders: Sequence[Any] = ()
        self.held: Held = {}

    def note(self, builders: Sequence[Any]) -> None:
        """Builders are as they should be, for all graphs: what they noted while they were traced is no change."""
        self.builders, self.held = builders, held_by(builders)

    def check(self) -> None:
        """Raise a `RewriteError` where a builder has changed since."""
        if self.held:
            check_held(self.held, held_by(self.builders))


def watched(compile: Compile) -> Compile:
    """A method that compiles graphs, for an object with ``rules`` and a ``watch``: no graph runs once a builder has changed."""

    @functools.wraps(compile)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.watch.check()  # or one graph would be as before, and this one not
        try:
            compiled = compile(self, *args, **kwargs)
        finally:  # torch may begin anew
            self.watch.note(self.rules.builders)
        if not self.watch.held:
            return compiled

        def run(*inputs: Any) -> Any:
            self.watch.check()
            return compiled(*inputs)

        return run

    return cast(Compile, method)


def held_by(builders: Sequence[Any]) -> Held:
    """What builders hold that can change without their being told: nothing of those whose classes are frozen."""
    found: Held = {}
    for builder in builders:
        _object(type(builder).__name__, builder, found, set())
    return found


def _object(name: str, value: Any, found: Held, seen: set[int]) -> None:
    if id(value) in seen or isinstance(value, SparsitySchedule):  # graphs read a schedule's tensor
        return
    seen.add(id(value))
    held = dict(getattr(value, "__dict__", {}))
    if isinstance(value, nn.Module):
        parts = {key: dict(held.pop(key)) for key in ("_parameters", "_buffers", "_modules")}
        held = {key: each for key, each in held.items() if not key.startswith("_")}
        held |= {key: each for part in parts.values() for key, each in part.items()}
    parameters = getattr(type(value), "__dataclass_params__", None)
    frozen = parameters is not None and parameters.frozen
    for key, each in held.items():
        for place, one in _items(f"{name}.{key}", each):
            if isinstance(one, nn.Module) or _selects(one):
                _object(place, one, found, seen)
            elif not frozen or isinstance(each, list):  # a list changes in place
                found[place] = one


def _items(name: str, value: Any) -> list[tuple[str, Any]]:
    """A number, text, tensor, module or builder by its name; those in a list. Other objects (caches) say nothing."""
    if isinstance(value, list | tuple):
        each = [item for index, one in enumerate(value) for item in _items(f"{name}[{index}]", one)]
        return each if not any(isinstance(one, Tensor) for _, one in each) else []
    known = isinstance(value, (*PLAIN, Tensor, nn.Module)) or _selects(value)
    return [(name, value)] if known else []


def _selects(value: Any) -> bool:
    return callable(getattr(value, "select", None)) and not isinstance(value, Tensor)  # a tensor's is something else


def check_held(before: Held, now: Held) -> None:
    """Refuse to run a graph that a builder has changed since.

    Raises:
        RewriteError: with the attribute's name and both values.
    """
    for name in before.keys() | now.keys():
        was, new = before.get(name), now.get(name)
        if was is new or (isinstance(was, PLAIN) and type(was) is type(new) and was == new):
            continue
        values = [f"a tensor {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x) for x in (was, new)]
        change = "is another tensor" if isinstance(was, Tensor) and isinstance(new, Tensor) else f"is {values[1]} now"
        raise RewriteError(
            f"{name} was {values[0]} when this graph was compiled and {change}: a graph keeps what the builder's select read "
            "then; hold it in a tensor and change that in place (fill_, copy_), read a SparsitySchedule's tensor, or wrap the "
            "model anew (compile=False reads it at every call)"
        )
