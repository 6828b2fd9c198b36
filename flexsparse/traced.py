"""What Dynamo traces of a wrapped model, as a whole, by region, and as it was before wrapping."""

from __future__ import annotations

from collections.abc import Mapping
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
    marks.GRID(*geometry)
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
    marks.GRID(T, H, W, first, last)
    return inner_call(module, args, kwargs)


def inner_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is traced of a module inside of a graph: its own forward, after a mark with its gates."""
    gates = gates_of(module, args, kwargs)
    if gates is not None:
        marks.GATE(*gates)
    return original(module, args, kwargs)
