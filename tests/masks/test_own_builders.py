"""Builders of somebody's own, derived from ours: what they return is held to the call, wherever it is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.masks import MaskBuilder, StaticBuilder

LAYOUT = fs.TileLayout(grid=(2, 4, 8), tile=(2, 2, 2))
OTHER = fs.TileLayout(grid=(1, 8, 8), tile=(1, 2, 4))
"""As many tokens and tiles."""
N, D = 8, 16


@dataclass(frozen=True)
class Static(StaticBuilder):
    """Returns a mask whatever it is asked for; cached, as it never changes."""

    rows: int = N
    columns: int = N
    kind: str = "bool"

    def tile_mask(self, layout: fs.TileLayout, kv_layout: fs.TileLayout, device: torch.device) -> Tensor:
        return torch.eye(self.rows, self.columns, dtype=getattr(torch, self.kind), device=device)


class Listed(StaticBuilder):
    """Not cached: of no class that never changes."""

    def tile_mask(self, layout: fs.TileLayout, kv_layout: fs.TileLayout, device: torch.device) -> Tensor:
        return [[True]]  # type: ignore[return-value]


class Plans(MaskBuilder):
    has_coarse = True

    def __init__(self, answer: Callable[[Any, Tensor | None], Any]) -> None:
        self.answer = answer

    def plan(self, coarse: Any, v: Tensor | None = None) -> Any:
        return self.answer(coarse, v)


def other_grid(coarse: Any, v: Tensor | None) -> Any:
    keep = torch.eye(N, dtype=torch.bool).expand(*coarse.q.shape[:2], N, N)
    return fs.TileSelection.from_mask(keep, OTHER), v if v is None else coarse.pooled_v(v)


def one_head(coarse: Any, v: Tensor | None) -> Any:
    return fs.TileSelection.from_mask(torch.ones(1, 1, N, N, dtype=torch.bool), LAYOUT), None


def too_many(coarse: Any, v: Tensor | None) -> Any:
    keep = torch.ones(*coarse.q.shape[:2], N, N, dtype=torch.bool)
    return fs.TileSelection.from_mask(keep, LAYOUT, capacity=3), v if v is None else coarse.pooled_v(v)


class Crowded(StaticBuilder):
    """Keeps more than it says."""

    def tile_mask(self, layout: fs.TileLayout, kv_layout: fs.TileLayout, device: torch.device) -> Tensor:
        return torch.ones(N, N, dtype=torch.bool, device=device)

    def most(self, layout: fs.TileLayout, kv_layout: fs.TileLayout) -> int:
        return 3


VSA = fs.VSA(top_k=2)
MASK = r"tile_mask returned {}: return a bool tensor \[8, 8\], the KV tiles that each query tile keeps"
WRONG: dict[str, tuple[MaskBuilder, str]] = {
    "too few rows": (Static(rows=3), "Static." + MASK.format(r"torch\.bool \(3, 8\)")),
    "too few columns": (Static(columns=5), "Static." + MASK.format(r"torch\.bool \(8, 5\)")),
    "numbers": (Static(kind="int64"), "Static." + MASK.format(r"torch\.int64 \(8, 8\)")),
    "a list": (Listed(), "Listed." + MASK.format("list")),
    "another grid": (Plans(other_grid), r"the selection that Plans\.plan returned is for grid \(1, 8, 8\)"),
    "one head": (Plans(one_head), r"Plans\.plan returned has rows for .* \[1, 1, 8\], and the call has \[1, 2, 8\]"),
    "no pair": (
        Plans(lambda coarse, v: VSA.plan(coarse, v)[0]),
        r"Plans\.plan returned TileSelection: return \(TileSelection, coarse output or None\)",
    ),
    "nothing": (Plans(lambda coarse, v: None), r"Plans\.plan returned NoneType: return"),
}
PLACES: dict[str, Callable[[MaskBuilder], MaskBuilder]] = {
    "alone": lambda builder: builder,
    "in a union": lambda builder: fs.Union(fs.VSA(top_k=2), builder),
    "in an intersection of static ones": lambda builder: fs.Intersection(fs.SlidingTile(window=(3, 3, 3)), builder),
    "for a head": lambda builder: fs.PerHead(builders=(VSA, builder), heads=(0, 1)),
    "within": lambda builder: fs.VSA(top_k=2, within=builder),  # type: ignore[arg-type]
}


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 1, 2, LAYOUT.seq_len, D).unbind()
    return q, k, v


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", WRONG)
def test_what_it_returns_is_of_the_call(name: str, place: str) -> None:
    """It was computed with as far as sizes allowed: rows that a mask lacked were dense, columns were never seen."""
    builder, message = WRONG[name]
    if place == "within" and not isinstance(builder, StaticBuilder):
        pytest.skip("only static builders stand there")
    if (name, place) == ("one head", "for a head"):
        pytest.skip("that is what it is asked for")
    builder = PLACES[place](builder)
    q, k, v = qkv()
    with pytest.raises((TypeError, ValueError), match=message):
        fs.sparse_attention(q, k, v, LAYOUT, builder)
    with pytest.raises((TypeError, ValueError), match=message):
        builder.select(q, k, LAYOUT)


@pytest.mark.parametrize("out", [None, torch.zeros(1, 2, N, D + 1)])
def test_a_gate_gets_the_coarse_output_that_was_promised(out: Tensor | None) -> None:
    """Without one the gate was left out, and learned nothing."""
    builder = Plans(lambda coarse, v: (VSA.plan(coarse, None)[0], out))
    q, k, v = qkv()
    assert torch.equal(fs.sparse_attention(q, k, v, LAYOUT, builder), fs.sparse_attention(q, k, v, LAYOUT, VSA))
    wanted = (
        r"Plans\.plan returned no coarse output \(1, 2, 8, 16\) but (none|one of \(1, 2, 8, 17\)), though has_coarse"
    )
    with pytest.raises(ValueError, match=wanted):
        fs.sparse_attention(q, k, v, LAYOUT, builder, gate=torch.ones_like(q))


class Chooses:
    """An object with `select`."""

    def select(self, q: Tensor, k: Tensor, layout: Any, kv_layout: Any = None, scale: Any = None) -> fs.TileSelection:
        return fs.TileSelection.from_mask(torch.ones(*q.shape[:2], N, N, dtype=torch.bool), layout, capacity=3)


@pytest.mark.parametrize("way", ["uncompiled", "aot_eager", "inductor"])
@pytest.mark.parametrize("who", ["plan", "most", "select", "given"])
def test_rows_keep_no_more_than_the_capacity(who: str, way: str, fresh_dynamo: None) -> None:
    """Kernels took the next row's list for the rest, and wrote columns past their memory."""
    selection = fs.TileSelection.from_mask(torch.ones(1, 2, N, N, dtype=torch.bool), LAYOUT, capacity=3)
    builder = {"plan": Plans(too_many), "most": Crowded(), "select": Chooses(), "given": selection}[who]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fs.sparse_attention(q, k, v, LAYOUT, builder)

    if way != "uncompiled":
        attend = torch.compile(attend, backend=way, fullgraph=True)
    with pytest.raises(
        ValueError, match=r"capacity=3 has rows that keep more tiles: give a larger .* \(the most is 8\)"
    ):
        attend(*qkv())


@pytest.mark.parametrize("name", ["too few columns", "another grid"])
def test_in_a_graph_too(name: str, fresh_dynamo: None) -> None:
    builder, message = WRONG[name]

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fs.sparse_attention(q, k, v, LAYOUT, builder)

    with pytest.raises(Exception, match="(?s)" + message):
        compiled(*qkv())


def test_right_ones_are_computed(fresh_dynamo: None) -> None:
    q, k, v = qkv()
    expected = fs.sparse_attention(q, k, v, LAYOUT, fs.SlidingTile(window=(1, 1, 1)))
    for builder in (Static(), Plans(lambda coarse, v: (Static().plan(coarse)[0], None))):
        torch.testing.assert_close(fs.sparse_attention(q, k, v, LAYOUT, builder), expected)
    compiled = torch.compile(fs.sparse_attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, LAYOUT, Static()), expected)


def test_combinations_print_as_they_are_written() -> None:
    for text in ("Union(VSA(...), Dense())", "Intersection(SlidingTile(...), Dense())"):
        name = text.partition("(")[0]
        first = fs.VSA(top_k=2) if name == "Union" else fs.SlidingTile(window=(1, 1, 1))
        builder = getattr(fs, name)(first, fs.Dense())
        assert repr(builder) == f"{name}({first!r}, {fs.Dense()!r})"
        assert eval(repr(builder), vars(fs)) == builder
