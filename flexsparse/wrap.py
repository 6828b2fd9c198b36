"""Wrapping a model: its self-attention over video tokens becomes sparse, compiled or not.

Every wrapped module gets a ``forward`` of its own (an instance attribute), so that its class and its state dict stay
what they were, and hooks, checkpointing, regional compilation and ``copy.deepcopy`` go on working.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.fx.experimental._config
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from flexsparse.compile_passes import RewriteError, marks
from flexsparse.compiler import Backend, no_match
from flexsparse.gates import NAME, add_gates
from flexsparse.grids import FixedGrid, Grid, GridFunction, VideoInput, grid_reader
from flexsparse.intercept import Interceptor, two_sequences
from flexsparse.reporting import Report

Model = TypeVar("Model", bound=nn.Module)
STATE = "_flexsparse"
OWN_OPTIONS = (
    "text_first",
    "text_last",
    "min_tokens",
    "attention",
    "inner",
    "fuse_selection",
    "lower_flex",
    "keep_tiles",
    "expect",
)


class State:
    """What a wrapped model carries; shared by its modules."""

    def __init__(self, backend: Backend, reader: GridFunction, compile: bool | str, options: dict[str, Any]) -> None:
        self.backend, self.reader, self.compile, self.options = backend, reader, compile, options
        self.own_grid: GridFunction | None = None
        self.interceptor = Interceptor(backend)
        self.compiled: dict[Any, Callable[..., Any]] = {}
        self.checked: dict[Grid, int] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        new = State(self.backend, self.reader, self.compile, self.options)
        new.own_grid = self.own_grid
        memo[id(self)] = new
        return new

    def grid_of(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid:
        """The call's grid, checked; a given grid that is not the input's raises."""
        if isinstance(self.reader, VideoInput):
            self.reader.check(args, kwargs)
        grid = tuple(int(size) for size in self.reader(module, args, kwargs))
        if isinstance(self.own_grid, VideoInput):
            own = self._own(module, args, kwargs)
            if own is not None and own != grid:
                raise ValueError(
                    f"grid is {grid}, but the input's grid is {own}: wrap without grid= to follow the input, or call the "
                    "model with inputs of that grid"
                )
        if grid not in self.checked:
            self.backend.check(grid)  # type: ignore[arg-type]
            self.checked[grid] = len(self.checked)  # type: ignore[index]
        return grid  # type: ignore[return-value]

    def _own(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid | None:
        reader = self.own_grid
        assert isinstance(reader, VideoInput)
        try:
            reader.check(args, kwargs)
        except ValueError:
            return None  # not a video: the given grid is all there is
        return tuple(int(size) for size in reader(module, args, kwargs))  # type: ignore[return-value]

    def variant(self, grid: Grid, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Which compiled form serves a grid, and how it is compiled.

        The first grid has static shapes, all others share one form with dynamic shapes: two graphs for any number of
        resolutions. Left to itself, torch makes one size after the other dynamic, and may redo a checkpointed block with
        another graph than the forward's. ``tile="auto"`` depends on the numbers, so each grid has a form of its own.
        """
        if self.backend.tile == "auto":
            return grid, {"dynamic": False, **options}
        first = self.checked.get(grid, 1) == 0
        return first, options if first or options.get("dynamic") is not None else {**options, "dynamic": True}

    def whole(self, grid: Grid) -> Callable[..., Any]:
        """The compiled form of the model for a grid."""
        key, options = self.variant(grid, self.options)
        if key not in self.compiled:
            self.compiled[key] = _distinct_sizes(torch.compile(_fresh(_traced_model), backend=self.backend, **options))
        return self.compiled[key]

    def region(self, module: nn.Module, grid: Grid, options: dict[str, Any]) -> Callable[..., Any]:
        """The compiled form of a class of modules: one for all of them, so that N blocks compile once."""
        kind = type(module)
        key, options = self.variant(grid, options)
        if (kind, key) not in self.compiled:
            name = f"{kind.__name__}::"

            def compile_region(gm: torch.fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
                return self.backend.compile(gm, inputs, name, kwargs)

            self.compiled[kind, key] = _distinct_sizes(
                torch.compile(_fresh(_traced_region), backend=compile_region, **options)
            )
        return self.compiled[kind, key]


def _fresh(function: types.FunctionType | Callable[..., Any]) -> Callable[..., Any]:
    """A copy with a code object of its own: Dynamo counts recompilations per code object."""
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _distinct_sizes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Sizes that happen to be equal get symbols of their own: 16 frames and 16 channels would tie the grid to the model."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.fx.experimental._config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return function(*args, **kwargs)

    return call


def _original(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run the forward that was there before wrapping: the class's, or an instance's own (offloading hooks set one)."""
    return module._flexsparse_forward(*args, **kwargs)  # type: ignore[operator]


def _mark(
    args: tuple[Any, ...], kwargs: dict[str, Any], mark: Callable[..., Tensor], *values: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Send the first floating point argument through a mark."""
    for index, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return (*args[:index], mark(value, *values), *args[index + 1 :]), kwargs
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return args, {**kwargs, name: mark(value, *values)}
    raise ValueError("a wrapped module was called without a floating point tensor to tell its graph the grid by")


def _gate(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The gate of an attention module's input hidden states, ``[B, S, H * D]``; None without a gate."""
    linear = module._modules.get(NAME)
    if linear is None:
        return None
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return linear(value)
    raise ValueError("a gated attention module was called without hidden states")


def _traced_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is compiled for a whole model: one frame, as a hook would be compiled as a graph of its own."""
    T, H, W = getattr(module, STATE).reader(module, args, kwargs)
    args, kwargs = _mark(args, kwargs, marks.GRID, T, H, W)
    return _original(module, args, kwargs)


def _traced_region(module: nn.Module, T: int, H: int, W: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is compiled for a region; the grid comes as plain ints, which become symbolic when they change."""
    args, kwargs = _mark(args, kwargs, marks.GRID, T, H, W)
    return _inner_call(module, args, kwargs)


def _inner_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    gate = _gate(module, args, kwargs)
    if gate is not None:
        args, kwargs = _mark(args, kwargs, marks.GATE, gate)
    return _original(module, args, kwargs)


def _model_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state: State = getattr(module, STATE)
    if torch.compiler.is_compiling():
        return _traced_model(module, args, kwargs)
    grid = state.grid_of(module, args, kwargs)
    if state.compile is True:
        try:
            out = state.whole(grid)(module, args, kwargs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, RewriteError):
                raise error.inner_exception from None
            raise
    else:
        with state.interceptor.forward(grid):
            out = _original(module, args, kwargs)
        out = state.interceptor.remember(out, grid)
    if not state.backend.calls.sparse_calls:
        layout = state.backend.layout_of(grid)
        raise RewriteError(no_match(type(module).__name__, layout, state.backend.calls))
    return out


def _module_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling():
        return _inner_call(module, args, kwargs)
    state: State = getattr(module, STATE)
    gate = _gate(module, args, kwargs)
    run = functools.partial(_original, module, args, kwargs)
    return state.interceptor.call(module.__dict__["_flexsparse_name"], run, two_sequences(args, kwargs), gate)


def _compile_module(module: nn.Module, *args: Any, backend: Any = None, **options: Any) -> None:
    """``module.compile(...)`` of a wrapped model: compiled as a region, by flexsparse's backend."""
    if args or not (backend is None or backend == "inductor" or isinstance(backend, Backend)):
        raise ValueError(f"backend is {backend!r}: a wrapped model compiles with flexsparse's own; leave it out")
    compile_region(module, options)


def compile_region(module: nn.Module, options: dict[str, Any]) -> None:
    """Compile one module of a wrapped model; modules of one class share one compiled form."""
    state: State = getattr(module, STATE)
    state.backend.calls.add_region(type(module).__name__, module.__dict__["_flexsparse_name"])

    def call(*args: Any, **kwargs: Any) -> Any:
        grid = state.interceptor.current_grid()
        compiled = state.region(module, grid, options)
        with state.interceptor.suspended():
            try:
                return compiled(module, *grid, args, kwargs)
            except BackendCompilerFailed as error:
                if isinstance(error.inner_exception, RewriteError):
                    raise error.inner_exception from None
                raise

    module._compiled_call_impl = call  # type: ignore[assignment]


def _override(module: nn.Module, state: State, name: str, forward: Callable[..., Any]) -> None:
    before = module.forward
    was_instance = "forward" in module.__dict__

    @functools.wraps(module.forward)
    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, args, kwargs)

    module.__dict__[STATE] = state
    module.__dict__["_flexsparse_name"] = name
    module.__dict__["_flexsparse_forward"] = before
    module.__dict__["_flexsparse_restore"] = was_instance
    module.__dict__["forward"] = types.MethodType(replaced, module)


def _repeated(model: nn.Module) -> list[nn.Module]:
    """Blocks for regional compilation: what the model declares, else members of lists of one class."""
    declared = getattr(model, "_repeated_blocks", None)
    if declared:
        return [module for module in model.modules() if type(module).__name__ in declared]
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    blocks = [b for members in lists for b in members if len(members) > 1 and len({type(x) for x in members}) == 1]
    inner = {id(child) for block in blocks for child in block.modules() if child is not block}
    return [block for block in blocks if id(block) not in inner and any(True for _ in block.children())]


def wrap(
    model: Model,
    builder: Any,
    tile: Sequence[int] | str = (4, 4, 4),
    grid: Sequence[int] | GridFunction | None = None,
    gates: bool | Sequence[str] = False,
    compile: bool | str = True,
    **options: Any,
) -> Model:
    """Make a video transformer's self-attention sparse, in place.

    >>> model = fs.wrap(WanTransformer3DModel.from_pretrained(...), fs.VSA(sparsity=0.9), gates=True, fullgraph=True)
    >>> print(fs.report(model))      # after the first call

    Args:
        model: a module whose attention goes through ``scaled_dot_product_attention``.
        builder: a mask builder.
        tile: tokens of one tile along (t, h, w), or ``"auto"``, which compiles once per grid.
        grid: None to read it from the model's video input ``[B, C, T, H, W]`` and patch size at every call; a fixed
            (T, H, W); or ``function(module, args, kwargs) -> (T, H, W)``.
        gates: add VSA's zero-initialised gate (`to_gate_compress`) to every self-attention, or to the modules whose names
            match one of the given patterns. Create optimizers after wrapping.
        compile: True compiles the whole model at its first call; ``"regional"`` its repeated blocks, once for all of them;
            False intercepts the calls of the uncompiled model.
        options: ``text_first``, ``text_last``, ``min_tokens``, ``attention`` as for `backend`; everything else
            goes to torch.compile (``fullgraph``, ``dynamic``, ``mode``, ...).

    Returns:
        The model: same class, same state dict besides the gates.

    Raises:
        ValueError: an argument that makes no sense for this model; at a call, a grid that the builder cannot meet.
        RewriteError: at the first call, that no attention could be made sparse, with what was seen.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}: give a torch.nn.Module (a pipeline's .transformer)")
    if STATE in model.__dict__:
        raise ValueError(f"{type(model).__name__} is wrapped already: call flexsparse.unwrap(model) first")
    if compile not in (True, False, "regional"):
        raise ValueError(f"compile is {compile!r}: give True, False or 'regional'")
    own = {name: options.pop(name) for name in OWN_OPTIONS if name in options}
    if options and compile is False:
        raise TypeError(f"options {sorted(options)} go to torch.compile, but compile is False: leave them out")
    reader = grid_reader(model, grid)
    fixed = reader.grid if isinstance(reader, FixedGrid) else None
    blocks = _repeated(model) if compile == "regional" else []
    if compile == "regional" and not blocks:
        raise ValueError(f"compile is 'regional', but {type(model).__name__} has no repeated blocks: use compile=True")
    backend = Backend(builder, tile=tile, grid=None, gates=bool(gates), wrapped=True, **own)
    state = State(backend, reader, compile, options)
    if fixed is not None:
        backend.check(fixed)
        try:
            state.own_grid = grid_reader(model, None)
        except ValueError:
            state.own_grid = None  # the input does not say its grid; the given one is all there is
    if gates:
        add_gates(model, gates)
    for name, module in list(model.named_modules()):
        if module is model or isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue
        builtin = type(module).__module__.startswith("torch.nn.modules") and not any(True for _ in module.children())
        if NAME in module._modules or (compile is not True and not builtin):
            _override(module, state, name, _module_forward)
            if compile is False:
                module.__dict__["compile"] = types.MethodType(_compile_module, module)
    _override(model, state, "", _model_forward)
    for block in blocks:
        compile_region(block, options)
    return model


def _state(model: nn.Module) -> State:
    state = model.__dict__.get(STATE) if isinstance(model, nn.Module) else None
    if state is None and isinstance(model, nn.Module):
        state = getattr(model, "_orig_mod", model).__dict__.get(STATE)
    if state is None:
        raise ValueError(f"{type(model).__name__} is not wrapped: call flexsparse.wrap(model, builder) first")
    return state


def report(model: nn.Module) -> Report:
    """Every attention call of a wrapped model: sparse or dense, why, shapes, density, backend; prints as a table.

    Raises:
        ValueError: the model is not wrapped.
    """
    return _state(model).backend.calls


def unwrap(model: Model) -> Model:
    """Restore a wrapped model, in place; its gates are removed (see `save_gates`).

    Raises:
        ValueError: the model is not wrapped.
    """
    _state(model)
    for module in model.modules():
        if STATE not in module.__dict__:
            continue
        before = module.__dict__.pop("_flexsparse_forward")
        if module.__dict__.pop("_flexsparse_restore"):
            module.__dict__["forward"] = before
        else:
            module.__dict__.pop("forward", None)
        for name in (STATE, "_flexsparse_name", "compile"):
            module.__dict__.pop(name, None)
        module._compiled_call_impl = None
        module._modules.pop(NAME, None)
    return model
