"""One step of a model on fake tensors: what its attention calls are, and what all else computes and saves.

No formula of a model: the model itself runs. `flexsparse.wrap` says which calls become sparse; attention itself is not run,
as its costs follow from its sizes (`planning.attention`).
Shape letters: B batch, H query heads, S tokens, D head dim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

import flexsparse as fs
from flexsparse.compile_passes import RewriteError
from flexsparse.compile_passes.sdpa_call import SDPACall
from flexsparse.planning.attention import Builder, Call, Tensors, dense_flops
from flexsparse.planning.modes import Products, Saved, values
from flexsparse.reporting import Call as Seen
from flexsparse.reporting import Report
from flexsparse.wrap import repeated_blocks, state_of


class PlanError(ValueError):
    """What cannot be planned: one sentence that names the argument, its value and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A call that stays dense."""

    name: str
    shape: tuple[int, int, int, int, int]

    @property
    def flops(self) -> float:
        """Forward FLOPs."""
        return dense_flops(*self.shape)


@dataclass(kw_only=True)
class Counts:
    """One step of one GPU that has the whole model and the whole sequence.

    Attributes:
        sparse: its sparse calls, in order.
        dense: its other attention calls.
        products: matrix products outside of attention, of the forward: how often one of (FLOPs, bytes) ran.
        backward: the same of the backward, with what checkpointing computes again.
        moved: bytes that all other ops of an uncompiled forward read and write, attention left out.
        moved_backward: the same of the backward, with what checkpointing computes again.
        saved: bytes that autograd saves, attention's included.
        largest_block: the part of them that one block saves, at most.
        peak: bytes alive at once in the step; without what attention needs in passing, and without parameters and their
            gradients, which are there before.
        parameters: of the model as it ran, gates included, as the next two.
        in_blocks: those of them in repeated blocks.
        block_parameters: the most that one repeated block has.
        gate_parameters: of the gates that wrapping added.
    """

    sparse: list[Call] = field(default_factory=list)
    dense: list[Dense] = field(default_factory=list)
    products: Counter[tuple[float, int]] = field(default_factory=Counter)
    backward: Counter[tuple[float, int]] = field(default_factory=Counter)
    moved: int = 0
    moved_backward: int = 0
    saved: int = 0
    largest_block: int = 0
    peak: int = 0
    parameters: int = 0
    in_blocks: int = 0
    block_parameters: int = 0
    gate_parameters: int = 0

    @property
    def other(self) -> float:
        """Forward FLOPs outside of attention."""
        return values(self.products)

    @property
    def dense_attention(self) -> float:
        """Forward FLOPs of the calls that stay dense."""
        return sum(call.flops for call in self.dense)


class _Decided(Exception):
    """Ends an intercepted call once it is known whether it is sparse: attention is not to run."""

    def __init__(self, call: Seen) -> None:
        self.call = call


class _Decisions(Report):
    """A report that ends a call as soon as it is told of it."""

    def record(self, call: Seen, density: Callable[[], float] | None = None) -> None:
        super().record(call)
        raise _Decided(call)


class _Attention(torch.autograd.Function):
    """Stands for an attention call: its output, its gradients, and what it saves, as shapes."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, fine_gate: Tensor | None, saved: Tensors | None
    ) -> Tensor:
        out = torch.empty_like(q) if v.shape[3] == q.shape[3] else q.new_empty((*q.shape[:3], v.shape[3]))
        gates = [x for x in (gate, fine_gate) if x is not None]
        if saved is None:
            kept = [q, k, v, out.detach(), q.new_empty(q.shape[:3], dtype=torch.float32)]
        else:
            kept = [q.new_empty(shape, dtype=dtype) for shape, dtype in saved]
        ctx.save_for_backward(*kept, *gates)
        ctx.inputs = [None if x is None else (x.shape, x.dtype) for x in (q, k, v, gate, fine_gate)]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _ = ctx.saved_tensors  # read: it is then that a checkpoint computes them again
        return (*(None if x is None else grad.new_empty(x[0], dtype=x[1]) for x in ctx.inputs), None)


class Recorder:
    """Takes the place of attention in a wrapped model (`Backend.parallel`), and notes each call of the forward.

    Args:
        counts: where calls are noted.
        builder: None for dense attention everywhere.
    """

    def __init__(self, counts: Counts, builder: Builder | None) -> None:
        self.counts = counts
        self.builder = builder

    def same_inputs(self, *_: Any) -> None:
        """There is one process."""

    def intercepted(self, interceptor: Any, sdpa: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A call of the wrapped model (`Interceptor.attention`); a mask counts as one that leaves all tokens."""
        call = SDPACall.of(args, kwargs)
        gates = interceptor.local.gate or (None, None)
        try:
            with _disable_current_modes():  # layouts and densities have values, and are cached
                how = {"dropout_p": call.dropout_p, "is_causal": call.is_causal, "enable_gqa": call.enable_gqa}
                sdpa(call.query, call.key, call.value, scale=call.scale, **how)
        except _Decided as decided:
            seen = decided.call
        if not seen.sparse or self.builder is None:
            return self.attend(call, seen.name, None, (None, None))
        B, H, _, D = call.query.shape
        with _disable_current_modes():
            layout = interceptor.backend.layout_of(interceptor.geometry_of(call.query))
            sizes = {"batch": B, "heads": H, "head_dim": D, "layout": layout, "dtype": call.query.dtype}
            sparse = Call(**sizes, builder=self.builder, gates=sum(gate is not None for gate in gates))
        return self.attend(call, seen.name, sparse, gates)

    def attend(self, call: SDPACall, name: str, sparse: Call | None, gates: Any) -> Tensor:
        """The output of a call, as a shape."""
        q, k, v = call.query, call.key, call.value
        if torch._C._current_graph_task_id() == -1:  # not what a checkpoint computes again
            if sparse is not None:
                self.counts.sparse.append(sparse)
            else:
                self.counts.dense.append(Dense(name=name, shape=(*q.shape[:3], k.shape[2], q.shape[3])))
        return _Attention.apply(q, k, v, *gates, None if sparse is None else sparse.saved())


@contextmanager
def fake() -> Iterator[FakeTensorMode]:
    """Tensors made in here have no values."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def count(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    builder: Builder | None = None,
    tile: Any = (4, 4, 4),
    gates: bool = False,
    fine_gates: bool = False,
    training: bool = False,
    checkpointing: bool = False,
) -> Counts:
    """Run one step on fake tensors, under `fake`.

    Args:
        model: made under `fake`; wrapped in here, and unwrapped again.
        inputs: keyword arguments of its forward.
        builder: None for dense attention.
        tile: as `flexsparse.wrap`.
        gates: as `flexsparse.wrap`.
        fine_gates: as `flexsparse.wrap`.
        training: whether a backward follows.
        checkpointing: whether the model's blocks are computed again in backward (diffusers' gradient checkpointing).

    Raises:
        PlanError: arguments that do not fit the model; no call could be made sparse.
    """
    counts = Counts()
    recorder, products = Recorder(counts, builder), Products()
    if checkpointing:
        _checkpoint(model)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(training))
            chooser = fs.VSA(sparsity=0.0) if builder is None else builder
            fs.wrap(model, chooser, tile=tile, gates=gates, fine_gates=fine_gates, compile=False)
            stack.callback(fs.unwrap, model)
            backend = state_of(model).backend
            backend.calls, backend.parallel = _Decisions(), recorder
            counts.parameters, counts.in_blocks, counts.block_parameters = parameters(model)
            counts.gate_parameters = sum(x.numel() for x in fs.gate_parameters(model))
            for x in model.parameters() if training else ():
                x.grad = torch.empty_like(x)
            saved = Saved(model, repeated_blocks(model))
            stack.enter_context(products)
            with saved.watch():
                out = _forward(model, inputs)
            out = out[0] if isinstance(out, tuple) else out
            if training:
                products.phase = "backward"
                out.backward(torch.empty_like(out))
                model.zero_grad()
    except (RewriteError, ValueError) as error:
        raise PlanError(f"{type(model).__name__}: {error}") from error
    finally:
        if checkpointing:
            model.disable_gradient_checkpointing()
    counts.products, counts.backward = products.found["forward"], products.found["backward"]
    counts.moved, counts.moved_backward = products.moved["forward"], products.moved["backward"]
    counts.peak = products.peak
    if training:
        counts.saved, counts.largest_block = saved.bytes, saved.largest
    return counts


def _forward(model: Any, inputs: Mapping[str, Any]) -> Any:
    """What the model returns.

    Raises:
        PlanError: its own code raised, as for a grid that its tables of positions do not have.
    """
    grid = state_of(model).geometry_of(model, (), inputs)[:3]  # raises for one that the builder cannot meet
    try:
        return model(**inputs)
    except RewriteError:
        raise  # says what is wrong
    except Exception as error:  # whatever the model raises is the answer
        raise PlanError(
            f"cannot run on grid {grid} ({type(error).__name__}: {error}): give one that its tables of positions hold, by "
            "--grid, or --frames, --height and --width"
        ) from error


def parameters(model: nn.Module) -> tuple[int, int, int]:
    """(parameters, those in repeated blocks, the most that one repeated block has)."""

    def size(module: nn.Module) -> int:
        return sum(x.numel() for x in module.parameters())

    blocks = [size(block) for block in repeated_blocks(model)]
    return size(model), sum(blocks), max(blocks, default=0)


def _checkpoint(model: Any) -> None:
    if not getattr(model, "_supports_gradient_checkpointing", False):
        raise PlanError(
            f"{type(model).__name__} has no gradient checkpointing of its own: plan with --no-checkpointing"
        )
    model.enable_gradient_checkpointing()
