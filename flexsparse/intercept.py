"""Eager interception: scaled_dot_product_attention calls of an uncompiled model, activation checkpointing included.

A `TorchFunctionMode` sees the calls. Activation checkpointing runs blocks again during backward, outside of the model's
forward: every module of a wrapped model enters the mode itself then, with the grid of the forward that is being redone
(`redone.py`).
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flexsparse.calls import Gates, sparse_call
from flexsparse.compile_passes import multi_head
from flexsparse.compile_passes.sdpa_call import SDPA, SDPACall
from flexsparse.compiler import Backend
from flexsparse.crossing import ANY, CROSSES, Lengths
from flexsparse.grids import Geometry
from flexsparse.redone import Forward, Redone
from flexsparse.reporting import DENSE
from flexsparse.text_masks import SeenMasks


class _Local(threading.local):
    """What holds for the thread that runs the model; backward of a CUDA graph runs in a thread of its own.

    Attributes:
        ran: the forward that runs or is redone; None outside of both, and where it has no backward.
        cut: whether the tokens of the forward that runs are cut now, each rank having its part (`distributed.ulysses`).
        dense: whether what runs is the model as it was, as its video is too short.
    """

    def __init__(self) -> None:
        self.grid: Geometry | None = None
        self.ran: Forward | None = None
        self.depth = 0
        self.names: list[str] = []
        self.crossing: list[frozenset[int] | None] = []
        self.others: list[Lengths | None] = []
        self.cut = self.dense = False
        self.gate: Gates | None = None
        self.masks = SeenMasks()


class Interceptor:
    """Makes attention calls sparse while a model runs uncompiled.

    Args:
        backend: what describes and computes them.
        fixed: the geometry of every call, where there is one only: of parts of the model that run by themselves, too.
    """

    def __init__(self, backend: Backend, fixed: Geometry | None = None) -> None:
        self.backend, self.fixed = backend, fixed
        self.local = _Local()
        self.redone = Redone()
        self.sparse_names: set[str] = set()
        self.mode = _Mode(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Interceptor:
        return Interceptor(self.backend, self.fixed)

    def current_grid(self) -> Geometry:
        """The grid of the forward that is running, or that backward is redoing.

        Raises:
            RuntimeError: a part of the model runs by itself; a schedule has moved on since the forward that backward redoes.
        """
        grid = self.known_grid()
        if grid is not None:
            if self.local.grid is None:
                self.check_values(self.redone.current())
            return grid
        raise RuntimeError(
            "a part of a wrapped model runs outside of the model's forward, where the grid is not known: call the whole "
            "model, or give wrap(..., grid=(T, H, W)); where backward redoes a checkpointed function, let "
            "the checkpoint be one of a module, or the loss depend on what the model returns"
        )

    def check_values(self, ran: Forward | None) -> None:
        """Raise where a schedule has moved on since a forward that backward redoes."""
        if ran is not None and ran.values != self.values():
            raise RuntimeError(
                f"a SparsitySchedule moved from {ran.values} to {self.values()} between a forward and its backward, which "
                "redoes what is checkpointed: its gradients would be those of another sparsity; call schedule.advance() after "
                "backward"
            )

    def check_whole(self, grid: Geometry, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise where backward redoes the whole model, and a schedule has moved on since."""
        if not self.backend.rules.schedules:
            return
        if torch._C._current_graph_task_id() == -1:
            self.redone.forget()
            self.redone.note_whole(Forward(grid, self.values()), args, kwargs)
        else:
            self.check_values(self.redone.find_whole(args, kwargs))

    def values(self) -> tuple[float, ...]:
        """The schedules' values now."""
        return tuple(schedule.value for schedule in self.backend.rules.schedules)

    def known_grid(self) -> Geometry | None:
        """As `current_grid`; None outside of both, where there is more than one grid."""
        if self.local.grid is not None:
            return self.local.grid
        ran = self.redone.current()
        return self.fixed if ran is None else ran.grid

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A module of the model is called: in a forward, or outside of it, as where backward redoes it."""
        local = self.local
        if local.ran is not None:
            self.redone.note(local.ran, args, kwargs)
        elif local.grid is None:
            self.redone.find(args, kwargs)

    @contextmanager
    def forward(self, grid: Geometry) -> Iterator[Forward | None]:
        """The model's forward on a grid; yields it, where it has a backward."""
        local = self.local
        before = local.grid, local.ran, local.cut
        self.redone.forget()
        ran = Forward(grid, self.values()) if torch.is_grad_enabled() else None
        local.grid, local.ran, local.cut = grid, ran, False
        try:
            with self.active():
                yield ran
        finally:
            local.grid, local.ran, local.cut = before

    @contextmanager
    def active(self) -> Iterator[None]:
        """Intercept calls; nested uses count once."""
        if self.local.depth:
            yield
            return
        self.local.depth = 1
        try:
            with self.mode:
                yield
        finally:
            self.local.depth = 0
            self.local.masks.forget()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """No interception: a compiled region rewrites its own graph, and cannot trace through the mode.

        Modes that the model entered since (``torch.device`` is one) stay.
        """
        if not self.local.depth:
            yield
            return
        before = torch.overrides._get_current_function_mode_stack()
        self.local.depth = 0
        try:
            with _stacked(before, [mode for mode in before if mode is not self.mode]):
                yield
        finally:
            self.local.depth = 1

    def call(
        self,
        name: str,
        run: Callable[[], Any],
        crossing: frozenset[int] | None,
        others: Lengths | None,
        gate: Gates | None,
    ) -> Any:
        """Run a module of the model, entering the mode where backward redoes it.

        Args:
            name: the module's path.
            run: its forward.
            crossing: lengths of which it was given two token sequences (`two_sequences`).
            others: lengths of what it was given besides its own tokens (`other_sequences`).
            gate: its gates ``[B, S, H * D]``, or None.
        """
        local = self.local
        gradients = torch.is_grad_enabled()  # noqa: F841  # read by `_redone_without_us`: a reentrant checkpoint switches them off inside
        # outside of a forward that is known, as of a module that another model has too, only attention needs its grid
        grid = None if gate is None and self.known_grid() is None else self.current_grid()
        before = local.grid, local.ran
        if local.grid is None:
            local.ran = self.redone.current()
        local.grid = grid
        outer_gate = local.gate
        if gate is not None:
            local.gate = gate
        local.names.append(name)
        local.crossing.append(crossing)
        local.others.append(others)
        self.backend.tally.others += name in self.sparse_names  # whatever computes its attention this time
        try:
            with self.active():
                out = run()
            if local.ran is not None:
                self.redone.tell(out, local.ran)
            if gate is not None and local.gate is not None:
                raise RuntimeError(
                    f"the gate of {name} was not used: its attention stayed dense; give wrap(..., gates=[names]) with the "
                    f"attention modules that become sparse. Seen:\n{self.backend.calls}"
                )
            return out
        finally:
            local.names.pop()
            local.crossing.pop()
            local.others.pop()
            local.gate = outer_gate if gate is not None else local.gate
            local.grid, local.ran = before

    def attention(self, *args: Any, **kwargs: Any) -> Any:
        """A scaled_dot_product_attention call of the model, of all tokens or, under sequence parallelism, of a rank's."""
        if self.backend.parallel is not None:
            return self.backend.parallel.intercepted(self, self.sdpa, *args, **kwargs)
        return self.sdpa(*args, **kwargs)

    def sdpa(self, *args: Any, **kwargs: Any) -> Any:
        """A scaled_dot_product_attention call: sparse, or dense with the reason in the report."""
        call = SDPACall.of(args, kwargs)
        q, k, v = call.query, call.key, call.value
        backend = self.backend
        grid = self.geometry_of(q)
        layout, kv_layout = backend.layouts_of(grid)
        name = self.local.names[-1] if self.local.names else "."
        mask = None if call.attn_mask is None else self.local.masks.of(call.attn_mask)
        keys = None if mask is None else mask.keys
        text = layout.text_first + layout.text_last
        reason = call.stays_dense(q, k, v, layout.seq_len, backend.min_tokens, keys, text)
        if reason is None and self.crosses(q):
            reason = CROSSES
        if reason is None and mask is not None:
            reason = mask.stays_dense(layout)
        number = backend.rules.index(name)
        if reason is None and number is None:
            reason = DENSE
        if reason is not None or number is None:
            backend.tally.others += q.shape[-2] == k.shape[-2] and reason not in (CROSSES, DENSE)
            backend.calls.record(
                backend.describe(backend.calls.numbered(name, False), q, k, grid, reason, ("sdpa", ""))
            )
            return SDPA(*args, **kwargs)
        if _redone_without_us():
            raise RuntimeError(
                f"{name} computes its attention inside of a checkpointed function (or another autograd.Function); backward "
                "redoes that function without the model around it, where its attention would be dense and its gradients wrong. "
                "Checkpoint a module (such as the attention block) and not a function, or let wrap(..., compile=True) compile "
                "the model with torch.utils.checkpoint"
            )
        gate = self.local.gate
        if backend.gates:
            if gate is None:
                raise RuntimeError(
                    f"gates are on, but {name} became sparse without one: its module is not among those of gates=, or was "
                    "not recognised as self-attention; name it in wrap(..., gates=[names]), or leave it dense by dense_layers"
                )
            gate, self.local.gate = of_samples(gate, q.shape[0]) if backend.ragged else (gate, None)
        gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        chosen = backend.choose_backend(q, grid, compiled=False, gradients=gradients)
        builder = backend.rules.builders[number]
        backend.tally.sparse += 1
        self.sparse_names.add(name)
        row = backend.describe(backend.calls.numbered(name, True), q, k, grid, None, chosen)
        backend.calls.record(row, backend.density(builder, grid))
        left = None if mask is None else mask.text(kv_layout)
        how = (call.scale, chosen[0], False, name, left, kv_layout)
        return sparse_call(builder, q, k, v, gate or (None, None), layout, *how)

    def crosses(self, q: Tensor) -> bool:
        """Whether the innermost module that was given token sequences got two of the length of a call's queries.

        One that only computes ``softmax(QK)V`` is given heads, which say nothing.
        """
        lengths = next((each for each in reversed(self.local.crossing) if each is not None), frozenset())
        return q.shape[2] in lengths

    def reads_others(self, q: Tensor, k: Tensor) -> bool:
        """Whether a call's keys are as many as tokens that its module was given besides its own: they are those then.

        The innermost module that was given token sequences says so.
        """
        others = next((each for each in reversed(self.local.others) if each is not None), ())
        return others == ANY or any(length == k.shape[-2] != q.shape[-2] for length in others)

    def geometry_of(self, q: Tensor) -> Geometry:
        """The geometry of a call: the model's, with fewer text tokens where its samples run without their padding."""
        T, H, W, first, last = self.current_grid()
        text = q.shape[2] - T * H * W if q.dim() == 4 else -1
        if self.backend.ragged and 0 <= text < first + last:
            return (T, H, W, text, 0) if first else (T, H, W, 0, text)
        return T, H, W, first, last


@contextmanager
def _stacked(before: Sequence[TorchFunctionMode], modes: Sequence[TorchFunctionMode]) -> Iterator[None]:
    """Function modes meanwhile, in place of those there were."""
    _change(before, modes)
    try:
        yield
    finally:
        _change(modes, before)


def _change(before: Sequence[TorchFunctionMode], after: Sequence[TorchFunctionMode]) -> None:
    for _ in before:
        torch.overrides._pop_mode()
    for mode in after:
        torch.overrides._push_mode(mode)


def of_samples(gates: Gates, count: int) -> tuple[Gates, Gates | None]:
    """The gates of the next samples of a model that runs them one by one, and those of the samples after them."""
    (coarse, fine), more = gates, None
    if coarse is not None and coarse.shape[0] > count:
        more = (coarse[count:], None if fine is None else fine[count:])
    return (None if coarse is None else coarse[:count], None if fine is None else fine[:count]), more


def _redone_without_us() -> bool:
    """Whether backward will redo this call from outside of every module of the model.

    True where a checkpoint's frame stands between the call and the module that it is in: what is redone is then a
    function, which enters no module and so not the mode. A checkpoint of somebody else's (latent-diffusion's and DeepSpeed's
    `CheckpointFunction`) is an `autograd.Function`, whose backward computes with what was before us whatever it is for.
    """
    frame, between = sys._getframe(1), []
    while frame is not None and frame.f_code is not Interceptor.call.__code__:
        between.append(frame.f_code)
        frame = frame.f_back  # type: ignore[assignment]
    if not (torch.is_grad_enabled() if frame is None else bool(frame.f_locals["gradients"])):
        return False
    places = [(code, code.co_filename) for code in between]  # code alike in two files is equal
    return any(name == torch.utils.checkpoint.__file__ or _of_a_function(code, name) for code, name in places)


@functools.lru_cache(4096)
def _of_a_function(code: types.CodeType, _: str) -> bool:
    """Whether code is the forward of an `autograd.Function`. Torch 2.14 has no frame of its own above it."""
    kinds: list[Any] = [torch.autograd.Function]
    for kind in kinds:
        kinds += kind.__subclasses__()
        if getattr(inspect.unwrap(kind.forward), "__code__", None) is code:  # `custom_fwd` wraps it
            return True
    return False


class _Mode(TorchFunctionMode):
    def __init__(self, interceptor: Interceptor) -> None:
        super().__init__()
        self.interceptor = interceptor
        self.multi_head = multi_head.multi_head_with(
            interceptor.attention
        )  # a mode does not see calls inside of functions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is SDPA:
            return self.interceptor.attention(*args, **(kwargs or {}))
        if func is multi_head.MULTI_HEAD:
            return self.multi_head(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
