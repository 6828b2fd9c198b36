"""What Dynamo traces of a wrapped model, as a whole, by region, and as it was before wrapping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from flexsparse.compile_passes import marks
from flexsparse.forwards import STATE
from flexsparse.gates import ADDED, FINE, NAME
from flexsparse.intercept import Gates
from flexsparse.tables import is_compiling

if TYPE_CHECKING:
    from flexsparse.wrapped import State


def original(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run the forward that was there before wrapping: the class's, or an instance's own (offloading hooks set one)."""
    return module._flexsparse_forward(*args, **kwargs)  # type: ignore[operator]


def _mark(
    args: tuple[Any, ...], kwargs: dict[str, Any], mark: Callable[..., Tensor], *values: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Send the first floating point argument through a mark; where no argument is one, the first in a list, tuple or dict.

    An argument that is the same tensor stays the same: torch's multi-head attention, and others, ask by ``is``.
    """
    given = [*enumerate(args), *kwargs.items()]
    for inside in (False, True):
        for place, value in given:
            if (new := _marked(value, inside, mark, values)) is not None:
                alike = [other for other, one in given if other == place or one is value]
                return (
                    tuple(new if i in alike else one for i, one in enumerate(args)),
                    {name: new if name in alike else one for name, one in kwargs.items()},
                )
    raise ValueError("a wrapped module was called without a floating point tensor to tell its graph the grid by")


def _marked(value: Any, inside: bool, mark: Callable[..., Tensor], values: tuple[Any, ...]) -> Any:
    """A value whose first floating point tensor went through a mark; None where it has none."""
    if isinstance(value, Tensor):
        return mark(value, *values) if value.is_floating_point() else None
    if inside and type(value) in (list, tuple, dict):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            if (new := _marked(one, inside, mark, values)) is not None:
                if isinstance(value, dict):
                    return {**value, key: new}
                return type(value)((*value[:key], new, *value[key + 1 :]))
    return None


def gates_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Gates | None:
    """The gates of an attention module's input hidden states, ``[B, S, H * D]``: coarse, and fine or None; None without."""
    linear, fine = module._modules.get(NAME), module._modules.get(FINE)
    if linear is None or ADDED not in module.__dict__ or module.__dict__[STATE].runs_dense():
        return None
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
    # a timestep's embedding may come first
    tokens = [x for x in given if x.dim() == 3 and x.shape[2] == linear.in_features]
    for value in tokens or given:
        return linear(value), None if fine is None else fine(value)
    raise ValueError("a gated attention module was called without hidden states")


def traced_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is compiled for a whole model: one frame, as a hook would be compiled as a graph of its own."""
    state: State = getattr(module, STATE)
    geometry = state.reader(module, args, kwargs)
    if state.backend.parallel is not None:  # here: what a checkpointed block stored would be an effect of its graph
        state.tokens = geometry[0] * geometry[1] * geometry[2]
    args, kwargs = _mark(args, kwargs, marks.GRID, *geometry)
    return spread(state, module, args, kwargs)


def spread(state: State, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the whole model's forward; of a sequence parallel one, with this rank's part of what it is given."""
    if state.ends is None:
        return original(module, args, kwargs)
    args, kwargs = state.ends.enter(module, args, kwargs)
    return state.ends.leave(module, original(module, args, kwargs))


def traced_dense(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is compiled for a model, or a region, as it was."""
    state: State = getattr(module, STATE)
    if not is_compiling():  # torch was told to compile nothing
        return original(module, args, kwargs)
    state.traces_dense = True
    out = original(module, args, kwargs)
    state.traces_dense = False
    return out


def traced_region(
    module: nn.Module, T: int, H: int, W: int, first: int, last: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What is compiled for a region; the geometry comes as plain ints, which become symbolic when they change."""
    args, kwargs = _mark(args, kwargs, marks.GRID, T, H, W, first, last)
    return inner_call(module, args, kwargs)


def inner_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is traced of a module inside of a graph: its own forward, its tokens marked with its gates."""
    gates = gates_of(module, args, kwargs)
    if gates is not None:
        args, kwargs = _mark(args, kwargs, marks.GATE, *gates)
    return original(module, args, kwargs)
