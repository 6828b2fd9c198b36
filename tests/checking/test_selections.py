"""`flexsparse.checking.selections`: right selections pass whatever the grid, and each part that is wrong is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import layouts
from torch import Tensor

import flexsparse as fs
from flexsparse.checking.problems import Problem
from flexsparse.checking.selections import wrong_selection
from flexsparse.selection import KeptQueries, TileSelection

LAYOUT = fs.TileLayout(grid=(4, 6, 6), tile=(2, 4, 4))
SPARSE = Problem(name="BSA", layout=LAYOUT, builder=fs.BSA(kv_density=0.3), D=16)
MASS = Problem(name="TopP", layout=LAYOUT, builder=fs.TopP(mass=0.5), D=16, scale=4.0)
TOP = Problem(name="VSA", layout=LAYOUT, builder=fs.VSA(top_k=3), D=16)


def selected(problem: Problem) -> tuple[dict[str, Tensor], TileSelection]:
    inputs = problem.inputs(torch.float32, "cpu")
    return inputs, problem.builder.select(inputs["q"], inputs["k"], problem.layout)


@given(layout=layouts(), kind=st.sampled_from(["vsa", "top_p", "bsa"]), share=st.sampled_from([0.1, 0.3, 0.5, 1.0]))
@settings(max_examples=25)
def test_what_is_right_passes(layout: fs.TileLayout, kind: str, share: float) -> None:
    if kind == "bsa":
        layout = dataclasses.replace(layout, text_first=0, text_last=0)
    builders = {
        "vsa": fs.VSA(sparsity=1 - share),
        "top_p": fs.TopP(mass=share),
        "bsa": fs.BSA(keep_queries=min(share, 0.9), kv_density=share),
    }
    problem = Problem(name=kind, layout=layout, builder=builders[kind], D=8, H=4, G=2)
    assert wrong_selection(problem, *selected(problem)) is None


def of_queries(**fields: Tensor) -> Callable[[TileSelection], TileSelection]:
    def change(selection: TileSelection) -> TileSelection:
        assert selection.queries is not None
        old = {name: getattr(selection.queries, name) for name in ("kept", "counts", "source", "position")}
        return dataclasses.replace(selection, queries=KeptQueries(**(old | fields)))

    return change


def source(selection: TileSelection) -> Tensor:
    assert selection.queries is not None
    return selection.queries.source.clone()


def prunes_another(selection: TileSelection) -> TileSelection:
    """Of the first window of 2x2x2, a pruned token changes places with a computed one that is not the representative."""
    found, window = source(selection), torch.tensor([0, 1, 6, 7, 36, 37, 42, 43])
    row = found[0, 0]
    centre = int(row[window][row[window] != window][0])
    computed = next(int(t) for t in window if row[t] == t and t != centre)
    pruned = next(int(t) for t in window if row[t] != t)
    row[computed], row[pruned] = centre, pruned
    return of_queries(source=found)(selection)


def computes_more(selection: TileSelection) -> TileSelection:
    found = source(selection)
    found[0, 0] = torch.arange(found.shape[-1])
    return of_queries(source=found)(selection)


def takes_from_another(selection: TileSelection) -> TileSelection:
    found = source(selection)
    row = found[0, 1]
    pruned = int((row != torch.arange(len(row))).nonzero()[0])
    row[pruned] = int(row[pruned]) - 1
    return of_queries(source=found)(selection)


def lists_another(selection: TileSelection) -> TileSelection:
    assert selection.queries is not None
    kept = selection.queries.kept.clone()
    kept[0, 0, 1, 0] = kept[0, 0, 1, 1]
    return of_queries(kept=kept)(selection)


def counts_another(selection: TileSelection) -> TileSelection:
    assert selection.queries is not None
    return of_queries(counts=selection.queries.counts - 1)(selection)


def drops_a_tile(selection: TileSelection) -> TileSelection:
    keep = selection.keep().clone()
    row = int((keep[0, 0].sum(-1) > 1).nonzero()[0])
    keep[0, 0, row, int(keep[0, 0, row].nonzero()[0])] = False
    return TileSelection.from_mask(keep, LAYOUT, queries=selection.queries)


def takes_another_tile(selection: TileSelection) -> TileSelection:
    keep = selection.keep().clone()
    row = int((~keep[0, 0]).any(-1).nonzero()[0])
    own, other = keep[0, 0, row].nonzero()[0], (~keep[0, 0, row]).nonzero()[0]
    keep[0, 0, row, own], keep[0, 0, row, other] = False, True
    return TileSelection.from_mask(keep, LAYOUT, queries=selection.queries)


@pytest.mark.parametrize(
    "problem, change, said",
    [
        (TOP, drops_a_tile, "keeps 2 tiles in a row where 3 belong"),
        (TOP, takes_another_tile, "keeps a tile whose score is"),
        (MASS, drops_a_tile, "tiles in a row where"),
        (MASS, takes_another_tile, "keeps a tile whose score is"),
        (SPARSE, drops_a_tile, "tiles in a row where"),
        (SPARSE, takes_another_tile, "keeps a tile whose score is"),
        (SPARSE, prunes_another, "computes a query that is"),
        (SPARSE, computes_more, "queries of a window, not"),
        (SPARSE, takes_from_another, "gives a token another output than that of token"),
        (SPARSE, lists_another, "lists other queries in tile 1 than it computes"),
        (SPARSE, counts_another, "queries in tile 0 and computes"),
    ],
)
def test_what_is_wrong_is_named(problem: Problem, change: Callable[[TileSelection], TileSelection], said: str) -> None:
    inputs, selection = selected(problem)
    assert wrong_selection(problem, inputs, selection) is None
    assert said in str(wrong_selection(problem, inputs, change(selection)))


def test_what_nothing_checks_is_no_pass() -> None:
    for builder in (fs.SlidingTile(window=(1, 1, 1)), fs.BSA(fill="nearest"), fs.BSA(statistics="head")):
        problem = dataclasses.replace(SPARSE, builder=builder)
        with pytest.raises(NotImplementedError, match="nothing checks what"):
            wrong_selection(problem, *selected(problem))
