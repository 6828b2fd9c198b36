"""What a wrapped model carries, and the forward that each of its modules gets.

Every wrapped module gets a ``forward`` of its own (an instance attribute), so that its class and its state dict stay
what they were, and hooks, checkpointing, regional compilation and ``copy.deepcopy`` go on working.
"""

from __future__ import annotations

import copy
import functools
import operator
import types
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flexsparse.compile_passes import RewriteError
from flexsparse.compiler import Backend
from flexsparse.crossing import other_sequences, two_sequences
from flexsparse.expected import no_match
from flexsparse.forms import Forms
from flexsparse.forwards import OWN, STATE, WRAPPED, takes_the_arguments_of
from flexsparse.gates import check_synchronised
from flexsparse.grids import Geometry, GeometryReader
from flexsparse.intercept import Interceptor
from flexsparse.one_graph import clear_errors
from flexsparse.reporting import Call
from flexsparse.tables import is_compiling, is_exporting
from flexsparse.tally import Ran
from flexsparse.traced import gates_of, inner_call, original, spread, traced_model


class State:
    """What a wrapped model carries; shared by its modules.

    Attributes:
        dense: whether the model runs as it did before it was wrapped, for the time being (`flexsparse.DenseSteps`).
        traces_dense: whether what Dynamo traces is the model as it was. Traced code sets it, and sets it back, so that no
            thread ever sees it; a value of the thread's own could not be traced.
        modules: those that have a forward of ours; of a deep copy, none.
        shell: the DistributedDataParallel that is known to have the gates, by its id.
        tokens: video tokens of the forward that is being compiled, for a sequence parallel model.
        ends: what such a model does to its own arguments and to what it returns (`distributed.cuts.Ends`).
    """

    def __init__(self, backend: Backend, reader: GeometryReader, compile: bool | str, options: dict[str, Any]) -> None:
        self.backend, self.reader, self.compile, self.options = backend, reader, compile, options
        self.own: GeometryReader | None = None
        self.dense = self.traces_dense = False
        self.modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.shell: int | None = None
        self.tokens = 0
        self.ends: Any = None
        self.interceptor = Interceptor(backend, reader.fixed)
        self.checked: dict[Geometry, int] = {}
        self.forms = Forms(backend, options, self.checked, self.interceptor.local)

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
        self.forms.drop()
        self.forms = Forms(backend, self.options, self.checked, self.interceptor.local)

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
        """Runs the model as it was, in this thread."""
        local = self.interceptor.local
        before, local.dense = local.dense, True
        try:
            yield
        finally:
            local.dense = before

    def runs_dense(self) -> bool:
        """Whether what runs now is the model as it was: for some denoising steps, or as the video is too short."""
        if is_compiling():
            return self.traces_dense
        dense: bool = self.dense or self.interceptor.local.dense
        if dense or not self.backend.min_tokens:
            return dense
        grid = self.interceptor.known_grid()
        return grid is not None and self.too_short(grid)


def _numbers(reader: GeometryReader, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Geometry:
    sizes = reader(module, args, kwargs)
    try:
        return tuple(operator.index(size) for size in sizes)  # type: ignore[return-value]
    except TypeError:
        raise ValueError(f"the grid function returned {sizes}: return ints (divide sizes by //)") from None


NO_EXPORT = (
    "a wrapped model is not exported: its sparse attention is made by torch.compile; unwrap it to export it dense"
)


def model_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of a wrapped model."""
    state: State = getattr(module, STATE)
    if is_compiling():
        if is_exporting():
            raise NotImplementedError(NO_EXPORT)
        return traced_model(module, args, kwargs)
    if torch.jit.is_tracing():
        raise NotImplementedError(NO_EXPORT)
    if module not in WRAPPED:
        _join(module, state)
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
        if state.compile is True:
            return clear_errors(state.forms.whole_dense(), module, args, kwargs)
        return original(module, args, kwargs)
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
                return clear_errors(state.forms.whole_dense(), module, args, kwargs)
    before = state.backend.tally.snapshot()
    if state.compile is True:
        out = clear_errors(state.forms.whole(geometry), module, args, kwargs)
    else:
        with state.interceptor.forward(geometry) as ran:
            out = spread(state, module, args, kwargs)
        if ran is not None:
            state.interceptor.redone.tell(out, ran)
    if not state.too_short(geometry):
        _check_sparse(state, module, geometry, state.backend.tally.since(before))
    return out


def _join(module: nn.Module, state: State) -> None:
    """Count a deep copy among the wrapped models.

    Raises:
        RuntimeError: a part of it was wrapped by itself, which would have no effect.
    """
    for name, inner in module.named_modules():
        if inner.__dict__.get(STATE, state) is not state:
            raise RuntimeError(
                f"{name} is wrapped, and part of a copy of a wrapped {type(module).__name__}, which computes it: unwrap one "
                "of the two, or give wrap a dict of builders by name"
            )
    WRAPPED.add(module)


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
        return inner_call(module, args, kwargs)
    state: State = getattr(module, STATE)
    if state.dense or state.interceptor.local.dense:
        return original(module, args, kwargs)
    state.interceptor.given(args, kwargs)
    gates = gates_of(module, args, kwargs)
    run = functools.partial(original, module, args, kwargs)
    crossing = two_sequences(module, args, kwargs)
    others = other_sequences(module, args, kwargs) if state.interceptor.local.cut else None
    return state.interceptor.call(module.__dict__["_flexsparse_name"], run, crossing, others, gates)


def compile_module(module: nn.Module, *args: Any, backend: Any = None, **options: Any) -> None:
    """``module.compile(...)`` of a wrapped model: compiled as a region, by flexsparse's backend."""
    if args or not (backend is None or backend == "inductor" or isinstance(backend, Backend)):
        raise ValueError(f"backend is {backend!r}: a wrapped model compiles with flexsparse's own; leave it out")
    compile_region(module, options)


def _of_their_own(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments of a region without gradients, where none is a view of another tensor.

    Dynamo's guards know a view from what is none, and look at what it is a view of: the first block of a stack, whose hidden
    states the embedding may hand on as a view, would cost a graph of its own for each kind of sizes.

    Lists and dicts are handed on, as the block may write to them, and so is what is given twice, or has attributes.
    """
    if torch.is_grad_enabled():  # what a block writes into a view has to reach what it is a view of, gradients included
        return args, kwargs
    times = Counter(id(x) for x in tree_leaves((args, kwargs)))

    def own(x: Any) -> Any:
        if type(x) is tuple:
            return tuple(own(one) for one in x)
        return x.detach() if isinstance(x, Tensor) and x._base is not None and times[id(x)] == 1 and not vars(x) else x

    return own(args), {name: own(x) for name, x in kwargs.items()}


def compile_region(module: nn.Module, options: dict[str, Any]) -> None:
    """Compile one module of a wrapped model; modules of one class share one compiled form."""
    state: State = getattr(module, STATE)
    state.backend.calls.add_region(state.forms.label(module), module.__dict__["_flexsparse_name"])

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state: State = getattr(self, STATE)
        state.interceptor.given(args, kwargs)
        if state.runs_dense():
            with state.interceptor.suspended(), state.as_dense():
                return clear_errors(state.forms.region_dense(self, options), self, args, kwargs)
        geometry = state.interceptor.current_grid()
        name, tally, known = self.__dict__["_flexsparse_name"], state.backend.tally, state.interceptor.sparse_names
        tally.others += name in known
        before, compiled = tally.sparse, state.forms.region(self, geometry, options)
        with state.interceptor.suspended():
            out = clear_errors(compiled, self, *geometry, *_of_their_own(args, kwargs))
        if (ran := state.interceptor.local.ran) is not None:
            state.interceptor.redone.tell(out, ran)
        if tally.sparse > before:
            known.add(name)
        return out

    # forward, and not _compiled_call_impl, which would skip the module's hooks: FSDP2 gathers parameters in one
    takes_the_arguments_of(call, module.forward)
    module.__dict__["forward"] = module.__dict__[OWN] = types.MethodType(call, module)
