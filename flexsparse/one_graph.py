"""How the functions of a wrapped model are compiled: each as one graph, and its errors in our words."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx.experimental._config
from torch.utils._python_dispatch import is_in_any_mode_without_ignore_compile_internals

from flexsparse import naming
from flexsparse.errors import RewriteError

FEW = 3
"""Graphs of one form in which numbers that modules hold are constants."""


class OneGraph:
    """A function compiled as one graph: after a break torch may run a frame uncompiled, and its attention dense.

    Torch's settings meanwhile:

    - Sizes that happen to be equal get symbols of their own: 16 frames and 16 channels would tie the grid to the model.
    - Numbers that modules hold (an epsilon) are constants of the first graphs. Where all sizes are symbolic torch makes inputs
      of them, and compiles everything a second time when it finds that it cannot. Where they change, graphs become many: from
      then on they are inputs.
    - Torch's own multi-head attention shows its calls in evaluation, too: else it is one op there, dense and in no report.
    - DDP's graph is not split at its buckets: the pieces would know neither the grid nor which tokens keys are of.

    Args:
        function: what is compiled; its first argument is the module whose forward it is.
        name: tells it from other forms of the same function.
        backend: what compiles a graph.
        options: of torch.compile.
    """

    def __init__(self, function: Any, name: str, backend: Callable[..., Any], options: dict[str, Any]) -> None:
        self.backend, self.graphs, self.dynamic = backend, 0, bool(options.get("dynamic"))
        fresh = _fresh(function, name)
        self.code = fresh.__code__
        self.compiled = torch.compile(fresh, backend=self.compile, **{"fullgraph": True, **options})

    def compile(self, gm: torch.fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        """What torch calls with a graph."""
        self.graphs += 1
        return self.backend(gm, inputs, **kwargs)

    def __call__(self, *args: Any) -> Any:
        ddp = "no_optimization" if splits_graphs() else torch._dynamo.config.optimize_ddp
        numbers = self.graphs < FEW or torch._dynamo.config.specialize_float
        dynamo = set_to(torch._dynamo.config, specialize_float=numbers, optimize_ddp=ddp)
        duck = set_to(torch.fx.experimental._config, use_duck_shape=False)
        with no_fast_path, duck, dynamo, naming.compiling(args[0]):
            return self.compiled(*args)


@contextmanager
def set_to(config: Any, **values: Any) -> Iterator[None]:
    """Settings of torch's meanwhile. Its own `config.patch` leaves a context variable behind in the thread at every use."""
    before = {name: getattr(config, name) for name in values}
    changed = [name for name, value in values.items() if before[name] != value]
    try:
        for name in changed:
            setattr(config, name, values[name])
        yield
    finally:
        for name in changed:
            setattr(config, name, before[name])


def forget(codes: Sequence[types.CodeType]) -> None:
    """Let torch forget what it compiled for functions that nobody calls any more.

    By itself it keeps their graphs until the process ends: code and what was compiled for it hold each other, and all backends
    that it was ever given are in a list.
    """
    for code in codes:
        torch._dynamo.eval_frame.reset_code(code)
    cached = torch._dynamo.eval_frame.cached_backends
    for key, kept in list(cached.items()):
        form = getattr(getattr(kept, "compiler_fn", kept), "__self__", None)
        if isinstance(form, OneGraph) and any(form.code is code for code in codes):  # code of two models may be equal
            cached.pop(key, None)


def splits_graphs() -> bool:
    """Whether torch would split the graphs of a model in DDP at its buckets."""
    return torch._dynamo.utils.get_optimize_ddp_mode() == "ddp_optimizer"


class _NoFastPath:
    """Meanwhile torch's multi-head attention takes no path of its own, in any thread: the last one out restores what was."""

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                torch.backends.mha.set_fastpath_enabled(self.before)


no_fast_path = _NoFastPath()


def _fresh(function: types.FunctionType, name: str) -> types.FunctionType:
    """A copy with a code object and a name of its own.

    Dynamo counts recompilations per code object, and remembers by name which sizes of an earlier one have changed.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}: {name}")
    return types.FunctionType(code, function.__globals__, function.__name__)


def _is_ours(error: BaseException) -> bool:
    """Whether our own code refused something, and not torch or a kernel's compiler."""
    if isinstance(error, RewriteError):
        return True
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    raised_in = "" if at is None else str(at.tb_frame.f_globals.get("__name__", ""))
    return isinstance(error, ValueError | TypeError) and raised_in.partition(".")[0] == __name__.partition(".")[0]


def clear_errors(compiled: OneGraph, *args: Any) -> Any:
    """Call compiled code; our own error is raised as it is, not inside of torch's, and a graph break says the remedy."""
    try:
        return compiled(*args)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if _is_ours(error.inner_exception):
            raise error.inner_exception from None
        if compiled.dynamic:
            raise RewriteError(
                "torch cannot compile this model with symbolic sizes, which all grids but the first share a graph of: give "
                "wrap(..., dynamic=False), which compiles each grid by itself (up to torch._dynamo.config.recompile_limit of "
                f"them). torch says: {error}"
            ) from error
        raise
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise RewriteError(
            "this model was to be compiled once more than torch._dynamo.config.recompile_limit="
            f"{torch._dynamo.config.recompile_limit} allows: sizes of 1 (an image, a batch of one), gradients on and off, "
            "autocast and dtypes have graphs of their own, and each number that a grid= function reads elsewhere than in the "
            "model's arguments; raise the limit, or find with TORCH_LOGS=recompiles what changes"
        ) from error
    except torch._dynamo.exc.Unsupported as error:
        raise RewriteError(
            "the model's own code breaks the graph, and attention that torch then runs uncompiled would stay dense unseen: use "
            "wrap(..., compile='regional') if the break is outside of the blocks, compile=False if it is inside, or mend it. "
            f"torch says: {error}"
        ) from error
    except RuntimeError as error:
        if is_in_any_mode_without_ignore_compile_internals():
            raise RewriteError(
                "a torch dispatch mode is active (FlopCounterMode is one), under which torch runs nothing compiled: use it on "
                f"a model that is wrapped with compile=False. torch says: {error}"
            ) from error
        raise
