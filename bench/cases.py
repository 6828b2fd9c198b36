"""What is measured: problems, and for each the implementations that run on it in turn.

Shape letters: B batch, H query heads, G KV heads, S tokens, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

import flexsparse as fs

Kind = Literal["forward", "training", "memory"]
Tile = tuple[int, int, int] | Literal["auto"]

OPS = ("attention_forward", "attention_training", "layout", "select", "peak_memory")
DENSE = "dense_sdpa"
IMPLS = ("flexsparse_gather", "flexsparse_flex", "flexsparse_compiled", DENSE)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of a case.

    Attributes:
        op: one of `OPS`.
        impl: one of `IMPLS`; of layout and select there is one implementation, what the gather path runs.
        part: which part of layout or select, None elsewhere.
        target: speed-up over dense to reach (attention), share of the dense forward to stay under (layout), MiB over
            dense to stay under (peak memory); None where there is no target.
    """

    op: str
    impl: str
    part: str | None = None
    target: float | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """A problem, and the rows measured on it against dense attention in the same loop.

    Attributes:
        name: unique; what `--only` matches.
        kind: forward, forward and backward, or peak memory of forward and backward.
        entries: rows besides the dense one.
        threads: None for the command line's.
        extra: whether `--quick` leaves the case out.
    """

    name: str
    kind: Kind
    entries: tuple[Entry, ...]
    grid: tuple[int, int, int] = (8, 32, 32)
    tile: Tile = (4, 4, 4)
    B: int = 1
    H: int = 4
    G: int = 4
    D: int = 64
    dtype: str = "float32"
    method: Literal["vsa", "bsa"] = "vsa"
    threads: int | None = None
    extra: bool = False

    @property
    def S(self) -> int:
        return math.prod(self.grid)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def layout(self) -> fs.TileLayout:
        return fs.TileLayout(grid=self.grid, tile=self.tile)

    @property
    def builder(self) -> fs.VSA | fs.BSA:
        return fs.VSA(sparsity=0.875) if self.method == "vsa" else fs.BSA(keep_queries=0.5, kv_density=0.125)

    @property
    def small_grid(self) -> tuple[int, int, int]:
        """A grid of two or three tiles a side with the same remainders, for a check that sees every pair."""
        sides = self.layout.sides
        return tuple(min(n, side * m + n % side) for n, side, m in zip(self.grid, sides, (2, 3, 3)))  # type: ignore[return-value]


def attention(kind: Kind, *impls: str, target: float | None = None) -> tuple[Entry, ...]:
    """Rows of a case that measures attention."""
    return tuple(Entry(op=f"attention_{kind}", impl=f"flexsparse_{impl}", target=target) for impl in impls)


# the share of each reordering alone, and of the four that one call of attention makes: q, k, v and the output
PARTS = (
    *(Entry(op="layout", impl="flexsparse_gather", part=part, target=0.03) for part in ("to_tiles", "to_raster")),
    Entry(op="layout", impl="flexsparse_gather", part="q_k_v_out", target=0.03),
    Entry(op="select", impl="flexsparse_gather", part="select"),
    Entry(op="select", impl="flexsparse_gather", part="select_without_tiling"),
)


def standard() -> list[Case]:
    """The cases that `--quick` runs too: 8192 tokens, float32, density 1/8."""
    cases = [
        Case(
            name=f"memory-d{D}",
            kind="memory",
            D=D,
            entries=(Entry(op="peak_memory", impl="flexsparse_gather", target=1024.0),),
        )
        for D in (64, 128)
    ]
    for D in (64, 128):
        forward = attention("forward", "gather", "flex", "compiled", target=5.0)
        training = attention("training", "gather", target=4.0)
        cases.append(Case(name=f"forward-d{D}", kind="forward", D=D, entries=(*forward, *PARTS)))
        cases.append(Case(name=f"training-d{D}", kind="training", D=D, entries=training))
    return cases


def further() -> list[Case]:
    """Cases without targets: grids that tiles do not divide, BSA, bfloat16, two threads."""
    wan = (9, 30, 26)
    both, gather = attention("forward", "gather", "flex"), attention("training", "gather")
    return [
        Case(name="wan-auto-forward", kind="forward", grid=wan, tile="auto", D=128, entries=both, extra=True),
        Case(name="wan-auto-training", kind="training", grid=wan, tile="auto", D=128, entries=gather, extra=True),
        Case(name="wan-4x4x4-forward", kind="forward", grid=wan, D=128, entries=both, extra=True),
        Case(name="bsa-training", kind="training", method="bsa", entries=gather, extra=True),
        Case(name="bfloat16-forward", kind="forward", dtype="bfloat16", entries=both, extra=True),
        Case(name="2-threads-forward", kind="forward", threads=2, entries=both, extra=True),
        Case(name="2-threads-training", kind="training", threads=2, entries=gather, extra=True),
    ]


def choose(quick: bool, only: list[str]) -> list[Case]:
    """Cases to run: those whose name holds one of ``only``, all of them by default.

    Raises:
        ValueError: nothing is left.
    """
    cases = [case for case in standard() + further() if not (quick and case.extra)]
    chosen = [case for case in cases if not only or any(word in case.name for word in only)]
    if not chosen:
        raise ValueError(f"--only {' '.join(only)} matches no case: give parts of {', '.join(c.name for c in cases)}")
    return chosen
