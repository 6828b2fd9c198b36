"""What became of every attention call: `fs.report`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flexsparse.layout import TileLayout

DENSE = "dense_layers, or the builder's rules, leave it dense"
"""The `Call.reason` of a call that stays dense as its user asked."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One attention call of a model.

    Attributes:
        name: where in the model, or which call of a graph.
        sparse: whether it became sparse.
        reason: why it stayed dense; for a sparse call, why its backend was chosen.
        backend: whose code computes it; ``sdpa`` where it stayed dense.
        fused: whether the coarse stage runs as one fused op.
        lowered: whether ``flexsparse::tile_attention`` replaced FlexAttention: the templates, on CPU the code of ``gather``.
        shape: ``(B, H, S_q, S_kv, D)`` as compiled or seen last; -1 for a symbolic size.
        density: share of token pairs that the builder asks for; 1 where the call stayed dense, NaN (printed ``?``) for a
            builder of a user's own that has no ``nominal_density``.
    """

    name: str
    sparse: bool
    reason: str
    backend: str
    shape: tuple[int, ...]
    density: float
    fused: bool = False
    lowered: bool = False


class Report:
    """Attention calls of one model, by name; prints as a table.

    Attributes:
        dense_now: whether the model runs as it was when the report is asked for (`flexsparse.DenseSteps`).
    """

    def __init__(self) -> None:
        self.dense_now = False
        self._calls: dict[str, Call] = {}
        self._densities: dict[str, Callable[[], float]] = {}
        self._regions: dict[str, list[str]] = {}

    def record(self, call: Call, density: Callable[[], float] | None = None) -> None:
        """Add a call, or replace what was known of it.

        Args:
            call: the call.
            density: its density, asked for when somebody reads the report: a builder of a user's own makes its mask for it.
        """
        self._calls[call.name] = call
        if density is None:
            self._densities.pop(call.name, None)
        else:
            self._densities[call.name] = density

    def unused(self, name: str) -> str:
        """The name, numbered where a call of that name is known already."""
        if name not in self._calls:
            return name
        return next(n for i in itertools.count(2) if (n := f"{name} ({i})") not in self._calls)

    def numbered(self, name: str, sparse: bool) -> str:
        """The name of a module's row: its sparse and its dense calls have one each."""
        known = self._calls.get(name)
        return name if known is None or known.sparse == sparse else f"{name} (2)"

    def update(self, other: Report) -> None:
        """Take over every call of another report; what is dense in one graph and sparse in another has two rows."""
        for call in other.all():
            known = self._calls.get(call.name, call)
            name = call.name if known.sparse == call.sparse else f"{call.name} (other inputs)"
            self._calls[name] = replace(call, name=name)

    def annotate(
        self, *, fused: Iterable[str] = (), lowered: Mapping[str, str] | None = None, notes: Mapping[str, str]
    ) -> None:
        """Say what passes did with calls, ``lowered`` to which backend's code, and add notes to their reasons."""
        for name in fused:
            self._calls[name] = replace(self._calls[name], fused=True)
        for name, code in (lowered or {}).items():
            self._calls[name] = replace(self._calls[name], lowered=True, backend=code)
        for name, note in notes.items():
            call = self._calls[name]
            self._calls[name] = replace(call, reason=f"{call.reason}; {note}" if call.reason else note)

    def rename_backend(self, old: str, new: str, names: Iterable[str]) -> None:
        """Say that calls that were to run on one backend run on another."""
        for name in names:
            call = self._calls[name]
            self._calls[name] = replace(call, backend=new if call.backend == old else call.backend)

    def add_region(self, region: str, module: str) -> None:
        """Say that a module runs a region that is compiled once for several modules."""
        modules = self._regions.setdefault(region, [])
        if module not in modules:
            modules.append(module)

    def clear(self) -> None:
        """Forget every call."""
        self._calls.clear()
        self._densities.clear()
        self._regions.clear()

    def all(self) -> list[Call]:
        """Every call as it was recorded, regions not expanded."""
        for name in list(self._densities):
            density, call = self._densities.pop(name, None), self._calls.get(name)
            if density is not None and call is not None:  # another thread may read or clear it too
                self._calls[name] = replace(call, density=density())
        return list(self._calls.values())

    @property
    def calls(self) -> list[Call]:
        """Every attention call, in the order in which they were met; a region's once for each module that runs it."""
        return list(self._expand())

    def _expand(self) -> Iterator[Call]:
        shared: dict[str, list[tuple[str, Call]]] = {}
        for call in self.all():
            region, _, inner = call.name.partition("::")
            if inner:
                shared.setdefault(region, []).append((inner, call))
            else:
                yield call
        for region, calls in shared.items():
            for module in self._regions.get(region, [region]):
                for inner, call in calls:
                    yield replace(call, name=module if inner == "." else f"{module}.{inner}")

    @property
    def sparse_calls(self) -> int:
        """How many calls became sparse."""
        return sum(call.sparse for call in self._calls.values())

    def __str__(self) -> str:
        now = "the model runs dense for now (DenseSteps)"
        if not self._calls:
            return now if self.dense_now else "no attention call seen yet: run the model once"
        head = ("call", "state", "backend", "B,H,Sq,Skv,D", "density", "fused", "lowered", "why")
        rows = [
            (
                call.name,
                "sparse" if call.sparse else "dense",
                call.backend,
                ",".join("?" if size < 0 else str(size) for size in call.shape),
                "?" if math.isnan(call.density) else f"{call.density:.3f}",
                "yes" if call.fused else "no",
                "yes" if call.lowered else "no",
                call.reason,
            )
            for call in self.calls
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows]]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([f"{now}; sparse, it ran:", *lines] if self.dense_now else lines)

    __repr__ = __str__


def density_of(builder: Any, layout: TileLayout, kv_layout: TileLayout) -> float:
    """Share of token pairs that a builder says it asks for; NaN for one of a user's own that says nothing.

    Extra tokens are counted: they attend to everything and are attended to.
    """
    if not hasattr(builder, "nominal_density"):
        return math.nan
    try:
        density = float(builder.nominal_density(layout, kv_layout))
    except NotImplementedError:  # a MaskBuilder need not have it either
        return math.nan
    video, every = layout.num_tokens, layout.seq_len
    share = builder.query_share(layout) if hasattr(builder, "query_share") else 1.0
    pairs = density * video**2 + share * video * (every - video) + (every - video) * every
    return pairs / every**2
