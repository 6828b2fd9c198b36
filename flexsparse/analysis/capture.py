"""Watching the sparse calls of a wrapped model while it runs, without changing what it computes.

Shape letters: B batch, H query heads, G KV heads, S tokens in raster order, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flexsparse.arguments import softmax_scale
from flexsparse.calls import with_text_counts
from flexsparse.compile_passes.sdpa_call import SDPACall
from flexsparse.layout import TileLayout
from flexsparse.masks.base import MaskBuilder
from flexsparse.masks.coarse import CoarseInputs
from flexsparse.rules import BuilderRules
from flexsparse.selection import TileSelection
from flexsparse.wrap import state_of


@dataclass(frozen=True, kw_only=True)
class SparseCall:
    """One sparse attention call, as it ran.

    Attributes:
        name: the attention module's path; a module that is called again (a model that runs samples one by one) says it again.
        q: ``[B, H, S, D]`` as the model gave it: raster order, after QK-norm and RoPE, no gradient.
        k: ``[B, G, S, D]``; text that the call's mask hides is in it.
        scale: softmax scale.
        selection: what the builder chose; its ``tile_counts`` leave out hidden text.
    """

    name: str
    q: Tensor
    k: Tensor
    scale: float
    selection: TileSelection


class _Recorder(MaskBuilder):
    """A builder that delegates to another and notes what it chose."""

    def __init__(self, builder: MaskBuilder, found: list[TileSelection]) -> None:
        self.builder, self.found = builder, found
        self.has_coarse = builder.has_coarse  # type: ignore[misc]

    def plan(self, coarse: CoarseInputs, v: Tensor | None = None) -> tuple[TileSelection, Tensor | None]:
        selection, out = self.builder.plan(coarse, v)
        self.found.append(selection)
        return selection, out

    def check(self, layout: TileLayout, kv_layout: TileLayout) -> None:
        self.builder.check(layout, kv_layout)

    def nominal_density(self, layout: TileLayout, kv_layout: TileLayout) -> float:
        return self.builder.nominal_density(layout, kv_layout)


class _SelectRecorder:
    """The same for a user's own object with ``select``."""

    def __init__(self, builder: Any, found: list[TileSelection]) -> None:
        self.builder, self.found = builder, found

    def select(self, *args: Any, **kwargs: Any) -> TileSelection:
        selection = self.builder.select(*args, **kwargs)
        self.found.append(selection)
        return selection


def _recorder(builder: Any, found: list[TileSelection]) -> Any:
    kind = _Recorder if isinstance(builder, MaskBuilder) else _SelectRecorder
    return kind(builder, found)


@contextmanager
def watch(model: nn.Module, each: Callable[[SparseCall], None]) -> Iterator[None]:
    """Hand every sparse call of a wrapped, uncompiled model to a function, while the context is entered.

    >>> # not run: needs a model
    >>> calls = []
    >>> # not run: needs a wrapped model
    >>> with torch.no_grad(), watch(model, calls.append):        # keeps q and k of every layer
    ...     model(hidden_states, timestep, text)

    Nothing is kept here: what ``each`` does not keep is freed before the next layer. Dense calls are not seen.

    Args:
        model: wrapped with ``compile=False``.
        each: called with a `SparseCall`, right after it ran.

    Raises:
        ValueError: the model is not wrapped, or compiled, or watched already.
    """
    state = state_of(model)
    if state.compile is not False or state.backend.calls._regions:  # a part that is compiled is a region of the report
        raise ValueError(
            f"{type(model).__name__} is wrapped with compile={state.compile!r} or has compiled parts: q and k can be watched "
            "in an uncompiled model only; give wrap(..., compile=False)"
        )
    interceptor, backend = state.interceptor, state.backend
    if "sdpa" in interceptor.__dict__:
        raise ValueError(f"{type(model).__name__} is watched already: leave the other watch() first")
    found: list[TileSelection] = []
    rules, attend = backend.rules, interceptor.sdpa
    recorders = [_recorder(builder, found) for builder in rules.builders]

    def attend_and_tell(*args: Any, **kwargs: Any) -> Any:
        found.clear()
        out = attend(*args, **kwargs)
        if found:
            call, selection = SDPACall.of(args, kwargs), found[-1]
            mask = None if call.attn_mask is None else interceptor.local.masks.of(call.attn_mask)
            text = None if mask is None else mask.text(selection.kv_layout)
            each(
                SparseCall(
                    name=interceptor.local.names[-1] if interceptor.local.names else ".",
                    q=call.query.detach(),
                    k=call.key.detach(),
                    scale=softmax_scale(call.scale, call.query.shape[-1]),
                    selection=with_text_counts(selection, text),
                )
            )
        return out

    recorded = [
        (pattern, None if builder is None else recorders[next(i for i, b in enumerate(rules.builders) if b is builder)])
        for pattern, builder in rules.rules
    ]
    backend.rules = BuilderRules(tuple(recorded), tuple(recorders))
    interceptor.__dict__["sdpa"] = attend_and_tell
    try:
        yield
    finally:
        backend.rules = rules
        del interceptor.__dict__["sdpa"]
