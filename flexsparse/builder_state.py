"""What a mask builder of a user's own holds, which a compiled graph has read once and for all.

`select` is traced: a number that it reads is a constant of the graph, a tensor the very tensor. Changed in place, the tensor is
read anew at every call. A number that has changed, or a tensor put in another's place, is not, and nothing would show it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar, cast

from torch import Tensor, nn

from flexsparse.errors import RewriteError
from flexsparse.given import PLAIN
from flexsparse.schedule import SparsitySchedule

Compile = TypeVar("Compile", bound=Callable[..., Any])
Held = dict[str, Any]
"""Names of attributes (``Own.n``) to numbers, texts, tensors, functions and parts that are builders, modules or settings."""


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


class Maybe(NamedTuple):
    """What a dict, or a list with tensors, holds: one that fills up (a cache, a history) is no change."""

    value: Any


def _object(name: str, value: Any, found: Held, seen: set[int]) -> None:
    if id(value) in seen or isinstance(value, SparsitySchedule):  # graphs read a schedule's tensor
        return
    seen.add(id(value))
    for key, each in _attributes(value).items():
        _value(f"{name}.{key}", each, found, seen, _is_frozen(value))


def _is_frozen(value: Any) -> bool:
    parameters = getattr(type(value), "__dataclass_params__", None)
    return parameters is not None and parameters.frozen


def _attributes(value: Any) -> Held:
    """Of an object, of its slots, and of its own classes; of a module its parameters, buffers and modules."""
    own = [one for one in type(value).__mro__ if _of_users(one)]
    held: Held = {}
    for one in reversed(own):
        held |= {key: each for key, each in vars(one).items() if isinstance(each, PLAIN) and not key.startswith("__")}
    slots = [key for one in own for key in _names(vars(one).get("__slots__", ()))]
    held |= {key: getattr(value, key) for key in slots if not key.startswith("__") and hasattr(value, key)}
    held |= getattr(value, "__dict__", {})
    if isinstance(value, nn.Module):
        parts = {key: dict(held.pop(key)) for key in ("_parameters", "_buffers", "_modules")}
        held = {key: each for key, each in held.items() if not key.startswith("_")}
        held |= {key: each for part in parts.values() for key, each in part.items()}
    return held


LIBRARIES = ("flexsparse", "torch", "builtins", "typing", "abc")


def _of_users(one: type) -> bool:
    """Whether a class may have settings of a user's own."""
    return one.__module__.partition(".")[0] not in LIBRARIES


def _names(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def _value(name: str, value: Any, found: Held, seen: set[int], frozen: bool, maybe: bool = False) -> None:
    """Note a value, or what it consists of. Other objects say nothing. ``frozen``: it cannot be replaced."""
    if isinstance(value, dict | list | tuple):
        if id(value) not in seen:  # one that contains itself
            seen.add(id(value))
            _entries(name, value, found, seen, frozen, maybe)
            seen.remove(id(value))
        return
    settings = isinstance(value, SimpleNamespace) or (dataclasses.is_dataclass(value) and _of_users(type(value)))
    part = isinstance(value, nn.Module | SparsitySchedule) or _selects(value) or settings
    if not frozen and (part or isinstance(value, (*PLAIN, Tensor)) or callable(value)):
        found[name] = Maybe(value) if maybe else value
    if part:
        _object(name, value, found, seen)


def _entries(name: str, value: Any, found: Held, seen: set[int], frozen: bool, maybe: bool) -> None:
    if isinstance(value, dict):
        for key, each in value.items():
            if isinstance(key, PLAIN) and not isinstance(each, Tensor):  # tensors of a dict are a cache's
                _value(f"{name}[{key!r}]", each, found, seen, False, True)
        return
    some = maybe or any(isinstance(each, Tensor) for each in value)
    for index, each in enumerate(value):
        _value(f"{name}[{index}]", each, found, seen, frozen and isinstance(value, tuple), some)


def _selects(value: Any) -> bool:
    return callable(getattr(value, "select", None)) and not isinstance(value, Tensor)  # a tensor's is something else


def _same(was: Any, new: Any) -> bool:
    if was is new:
        return True
    if type(was) is not type(new):
        return False
    if isinstance(was, PLAIN):
        return bool(was == new)
    return _is_frozen(was) and all(
        _same(getattr(was, one.name), getattr(new, one.name)) for one in dataclasses.fields(was)
    )


def check_held(before: Held, now: Held) -> None:
    """Refuse to run a graph that a builder has changed since.

    Raises:
        RewriteError: with the attribute's name and both values.
    """
    for name in sorted(before.keys() | now.keys()):  # what holds a part comes before what the part holds
        was, new = before.get(name), now.get(name)
        if isinstance(was, Maybe) or isinstance(new, Maybe):
            if name not in before or name not in now:
                continue
            was, new = (x.value if isinstance(x, Maybe) else x for x in (was, new))
        if _same(was, new):
            continue
        values = [f"a tensor {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x) for x in (was, new)]
        another = type(was) is type(new) and (isinstance(was, Tensor) or values[0] == values[1])
        change = (
            f"is another {'tensor' if isinstance(was, Tensor) else 'object'} now" if another else f"is {values[1]} now"
        )
        raise RewriteError(
            f"{name} was {values[0]} when this graph was compiled and {change}: a graph keeps what the builder's select read "
            "then; hold it in a tensor and change that in place (fill_, copy_), read a SparsitySchedule's tensor, or wrap the "
            "model anew (compile=False reads it at every call)"
        )
