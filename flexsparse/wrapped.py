"""What a wrapped model carries, and the forward that each of its modules gets.

Every wrapped module gets a ``forward`` of its own (an instance attribute), so that its class and its state dict stay
what they were, and hooks, checkpointing, regional compilation and ``copy.deepcopy`` go on working.
"""

from __future__ import annotations

import copy
import functools
import operator
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flexsparse.compile_passes import RewriteError, marks
from flexsparse.compiler import Backend
from flexsparse.crossing import other_sequences, two_sequences
from flexsparse.expected import no_match
from flexsparse.forwards import OWN, STATE, takes_the_arguments_of
from flexsparse.gates import ADDED, FINE, NAME, check_synchronised
from flexsparse.grids import Geometry, GeometryReader
from flexsparse.intercept import Gates, Interceptor
from flexsparse.one_graph import clear_errors, one_graph
from flexsparse.reporting import Call
from flexsparse.tables import is_compiling, is_exporting
from flexsparse.tally import Ran


class State:
    """What a wrapped model carries; shared by its modules.

    Attributes:
        dense: whether the model runs as it did before it was wrapped, for the time being (`flexsparse.DenseSteps`).
        shell: the DistributedDataParallel that is known to have the gates, by its id.
        tokens: video tokens of the forward that is being compiled, for a sequence parallel model.
        ends: what such a model does to its own arguments and to what it returns (`distributed.cuts.Ends`).
    """

    def __init__(self, backend: Backend, reader: GeometryReader, compile: bool | str, options: dict[str, Any]) -> None:
        self.backend, self.reader, self.compile, self.options = backend, reader, compile, options
        self.own: GeometryReader | None = None
        self.dense = False
        self.shell: int | None = None
        self.tokens = 0
        self.ends: Any = None
        self.interceptor = Interceptor(backend, reader.fixed)
        self.compiled: dict[Any, Callable[..., Any]] = {}
        self.checked: dict[Geometry, int] = {}
        self.labels: dict[tuple[str, tuple[int | None, ...]], str] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        new = State(self.backend, self.reader, self.compile, self.options)
        new.own = self.own  # and sparse: `DenseSteps` knows the models that it was given, and no copy
        memo[id(self)] = new
        new.ends = copy.deepcopy(self.ends, memo)  # whose state is the copy's
        return new

    def __reduce__(self) -> Any:
        raise TypeError("a wrapped model is not pickled: save its state_dict(), or unwrap it before")

    def use(self, backend: Backend) -> None:
        """Go on with another backend; what was compiled by the one before is dropped."""
        self.backend = self.interceptor.backend = backend
        self.compiled.clear()

    def geometry_of(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Geometry:
        """The call's geometry, checked; a given grid that is not the input's raises."""
        self.reader.check(args, kwargs)
        text = self.reader.text
        if self.compile is True and text.trimmed is not None and text.trimmed_by(args, kwargs) is not None:
            raise RewriteError(
                f"{type(module).__name__} leaves out the text that {text.trimmed.name} hides where there is one sample, and "
                "how many tokens it has depends on data: use wrap(..., compile='regional') or compile=False"
            )
        geometry = _numbers(self.reader, module, args, kwargs)
        if self.own is not None:
            try:
                self.own.check(args, kwargs)
            except ValueError:
                own = None  # not a video: the given grid is all there is
            else:
                own = _numbers(self.own, module, args, kwargs)
            if own is not None and own[:3] != geometry[:3]:
                raise ValueError(
                    f"grid is {geometry[:3]}, but the input's grid is {own[:3]}: wrap without grid= to follow the input, or "
                    "call the model with inputs of that grid"
                )
        if geometry not in self.checked:
            self.backend.check(geometry)
            self.checked[geometry] = len(self.checked)
        return geometry

    def too_short(self, geometry: Geometry) -> bool:
        """Whether a call has fewer tokens than ``min_tokens``: the whole model runs as it was then."""
        T, H, W, first, last = geometry
        return first + T * H * W + last < self.backend.min_tokens

    @contextmanager
    def as_dense(self) -> Iterator[None]:
        """Runs, and compiles, the model as it was."""
        before, self.dense = self.dense, True
        try:
            yield
        finally:
            self.dense = before

    def runs_dense(self) -> bool:
        """Whether what runs now is the model as it was: for some denoising steps, or as the video is too short."""
        if self.dense or not self.backend.min_tokens or is_compiling():
            return self.dense
        grid = self.interceptor.known_grid()
        return grid is not None and self.too_short(grid)

    def variant(self, geometry: Geometry, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Which compiled form serves a geometry, and how it is compiled.

        The first one has static shapes, all others share one form with dynamic shapes: two graphs for any number of
        resolutions. Left to itself, torch makes one size after the other dynamic, and may redo a checkpointed block with
        another graph than the forward's. ``tile="auto"`` depends on the numbers, so each geometry has a form of its own.
        """
        if "auto" in (self.backend.tile, self.backend.query_tile):
            return geometry, {"dynamic": False, **options}
        first = self.checked.get(geometry, 1) == 0
        return first, options if first or options.get("dynamic") is not None else {**options, "dynamic": True}

    def whole(self, geometry: Geometry) -> Callable[..., Any]:
        """The compiled form of the model for a geometry."""
        key, options = self.variant(geometry, self.options)
        if key not in self.compiled:
            self.compiled[key] = one_graph(_traced_model, str(key), self.backend, options)
        return self.compiled[key]

    def region(self, module: nn.Module, geometry: Geometry, options: dict[str, Any]) -> Callable[..., Any]:
        """The compiled form of a class of modules: one for all that take the same builders, so that N blocks compile once."""
        key, options = self.variant(geometry, options)
        label, within = self.label(module), module.__dict__["_flexsparse_name"]
        if (label, key) not in self.compiled:

            def compile_region(gm: torch.fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
                return self.backend.compile(gm, inputs, kwargs, f"{label}::", within, self.interceptor.local.cut)

            self.compiled[label, key] = one_graph(_traced_region, f"{label} {key}", compile_region, options)
        return self.compiled[label, key]

    def whole_dense(self) -> Callable[..., Any]:
        """The compiled form of the model as it was."""
        if "dense" not in self.compiled:
            self.compiled["dense"] = one_graph(_original, "dense", self._compile_dense, self.options)
        return self.compiled["dense"]

    def region_dense(self, module: nn.Module, options: dict[str, Any]) -> Callable[..., Any]:
        """The compiled form of a class of modules as it was."""
        kind = type(module).__name__
        if ("dense", kind) not in self.compiled:
            self.compiled["dense", kind] = one_graph(_original, f"dense {kind}", self._compile_dense, options)
        return self.compiled["dense", kind]

    def _compile_dense(self, gm: torch.fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        return self.backend.compile_dense(gm, inputs, kwargs)

    def label(self, module: nn.Module) -> str:
        """What the report calls a region: its class, numbered where modules of one class take different builders."""
        kind, path = type(module).__name__, module.__dict__["_flexsparse_name"]
        rules = self.backend.rules
        names = [f"{path}.{name}" if name else path for name, _ in module.named_modules()]
        key = (kind, tuple(rules.index(name) for name in names) if len(rules.rules) > 1 else ())
        if key not in self.labels:
            others = sum(other == kind for other, _ in self.labels)
            self.labels[key] = f"{kind} ({others + 1})" if others else kind
        return self.labels[key]


def _numbers(reader: GeometryReader, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Geometry:
    sizes = reader(module, args, kwargs)
    try:
        return tuple(operator.index(size) for size in sizes)  # type: ignore[return-value]
    except TypeError:
        raise ValueError(f"the grid function returned {sizes}: return ints (divide sizes by //)") from None


def _original(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
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


def _gates(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Gates | None:
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


def _traced_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is compiled for a whole model: one frame, as a hook would be compiled as a graph of its own."""
    state: State = getattr(module, STATE)
    geometry = state.reader(module, args, kwargs)
    if state.backend.parallel is not None:  # here: what a checkpointed block stored would be an effect of its graph
        state.tokens = geometry[0] * geometry[1] * geometry[2]
    args, kwargs = _mark(args, kwargs, marks.GRID, *geometry)
    return _spread(state, module, args, kwargs)


def _spread(state: State, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the whole model's forward; of a sequence parallel one, with this rank's part of what it is given."""
    if state.ends is None:
        return _original(module, args, kwargs)
    args, kwargs = state.ends.enter(module, args, kwargs)
    return state.ends.leave(module, _original(module, args, kwargs))


def _traced_region(
    module: nn.Module, T: int, H: int, W: int, first: int, last: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What is compiled for a region; the geometry comes as plain ints, which become symbolic when they change."""
    args, kwargs = _mark(args, kwargs, marks.GRID, T, H, W, first, last)
    return _inner_call(module, args, kwargs)


def _inner_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    gates = _gates(module, args, kwargs)
    if gates is not None:
        args, kwargs = _mark(args, kwargs, marks.GATE, *gates)
    return _original(module, args, kwargs)


NO_EXPORT = (
    "a wrapped model is not exported: its sparse attention is made by torch.compile; unwrap it to export it dense"
)


def model_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of a wrapped model."""
    state: State = getattr(module, STATE)
    if is_compiling():
        if is_exporting():
            raise NotImplementedError(NO_EXPORT)
        return _traced_model(module, args, kwargs)
    if torch.jit.is_tracing():
        raise NotImplementedError(NO_EXPORT)
    if getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None) is not None:
        raise ValueError(
            f"{type(module).__name__} has diffusers' context parallelism enabled, whose backward recomputes attention where "
            "flexsparse cannot see it, dense: call flexsparse.distributed.ulysses(model) after wrap, which takes it over where "
            "ring_degree is 1"
        )
    if state.dense:
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters()):
            raise RuntimeError(
                f"fs.DenseSteps lets {type(module).__name__} run dense, but this forward has gradients: call its remove() "
                "before training goes on, or sample under torch.no_grad()"
            )
        return (state.whole_dense() if state.compile is True else _original)(module, args, kwargs)
    if state.backend.parallel is not None:
        state.backend.parallel.same_inputs(module, args, kwargs)
    geometry = state.geometry_of(module, args, kwargs)
    state.interceptor.check_whole(geometry, args, kwargs)
    if state.backend.gates and torch.is_grad_enabled():
        state.shell = check_synchronised(module, state.shell)
    if state.too_short(geometry) and state.compile is not False:
        state.backend.calls.record(_whole_row(state, geometry))
        if state.compile is True:
            with state.as_dense():
                return state.whole_dense()(module, args, kwargs)
    before = state.backend.tally.snapshot()
    if state.compile is True:
        out = clear_errors(state.whole(geometry), module, args, kwargs)
    else:
        with state.interceptor.forward(geometry) as ran:
            out = _spread(state, module, args, kwargs)
        if ran is not None:
            state.interceptor.redone.tell(out, ran)
    if not state.too_short(geometry):
        _check_sparse(state, module, geometry, state.backend.tally.since(before))
    return out


def _whole_row(state: State, geometry: Geometry) -> Call:
    """The report's row for a compiled model whose video has fewer tokens than ``min_tokens``."""
    T, H, W, first, last = geometry
    tokens = first + T * H * W + last
    reason = f"grid {(T, H, W)}: {tokens} tokens are below min_tokens={state.backend.min_tokens}; all of it runs dense"
    return Call(name="the model", sparse=False, reason=reason, backend="sdpa", shape=(tokens,), density=1.0)


def _check_sparse(state: State, module: nn.Module, geometry: Geometry, ran: Ran) -> None:
    """Raise where a forward computed attention, and none of it sparse; or not as much as ``expect`` says.

    A forward that ran none of the modules that had sparse attention before, and no other attention of the video's tokens
    than what was to stay dense, is none of those: a cache left blocks, or their self-attention, out.
    """
    backend = state.backend
    if backend.expect is not None:
        if state.compile is False and ran.sparse != backend.expect:
            raise RewriteError(
                f"expect is {backend.expect} sparse attention calls, but this forward had {ran.sparse}. Seen:\n{backend.calls}"
            )
        return
    if not ran.sparse and (ran.others or not backend.calls.sparse_calls or state.compile is True):
        layout, before = backend.layout_of(geometry), bool(backend.calls.sparse_calls)
        raise RewriteError(no_match(type(module).__name__, layout, backend.calls, before))


def module_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of a module of a wrapped model."""
    if is_compiling():
        return _inner_call(module, args, kwargs)
    state: State = getattr(module, STATE)
    if state.dense:
        return _original(module, args, kwargs)
    state.interceptor.given(args, kwargs)
    gates = _gates(module, args, kwargs)
    run = functools.partial(_original, module, args, kwargs)
    crossing = two_sequences(module, args, kwargs)
    others = other_sequences(module, args, kwargs) if state.interceptor.local.cut else None
    return state.interceptor.call(module.__dict__["_flexsparse_name"], run, crossing, others, gates)


def compile_module(module: nn.Module, *args: Any, backend: Any = None, **options: Any) -> None:
    """``module.compile(...)`` of a wrapped model: compiled as a region, by flexsparse's backend."""
    if args or not (backend is None or backend == "inductor" or isinstance(backend, Backend)):
        raise ValueError(f"backend is {backend!r}: a wrapped model compiles with flexsparse's own; leave it out")
    compile_region(module, options)


def compile_region(module: nn.Module, options: dict[str, Any]) -> None:
    """Compile one module of a wrapped model; modules of one class share one compiled form."""
    state: State = getattr(module, STATE)
    state.backend.calls.add_region(state.label(module), module.__dict__["_flexsparse_name"])

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state: State = getattr(self, STATE)
        state.interceptor.given(args, kwargs)
        if state.runs_dense():
            with state.interceptor.suspended(), state.as_dense():
                return state.region_dense(self, options)(self, args, kwargs)
        geometry = state.interceptor.current_grid()
        name, tally, known = self.__dict__["_flexsparse_name"], state.backend.tally, state.interceptor.sparse_names
        tally.others += name in known
        before, compiled = tally.sparse, state.region(self, geometry, options)
        with state.interceptor.suspended():
            out = clear_errors(compiled, self, *geometry, args, kwargs)
        if (ran := state.interceptor.local.ran) is not None:
            state.interceptor.redone.tell(out, ran)
        if tally.sparse > before:
            known.add(name)
        return out

    # forward, and not _compiled_call_impl, which would skip the module's hooks: FSDP2 gathers parameters in one
    takes_the_arguments_of(call, module.forward)
    module.__dict__["forward"] = module.__dict__[OWN] = types.MethodType(call, module)
