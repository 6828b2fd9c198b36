"""The simulation of fetched tiles: what it counts, on selections small enough to count by hand."""

from __future__ import annotations

import json

import pytest
import torch

import flexsparse as fs
from bench import tile_traffic


def test_distinct_tiles_are_counted_once() -> None:
    """Two ranks of two tiles; the first keeps tiles 0 and 3 twice, the second its own ones."""
    keep = torch.zeros((1, 4, 4), dtype=torch.bool)
    for row, kept in enumerate([(0, 3), (0, 3), (2,), (3,)]):
        keep[0, row, list(kept)] = True
    kept, remote = tile_traffic.distinct(keep, torch.arange(4), 2)
    assert kept.tolist() == [[2, 2]]
    assert remote.tolist() == [[1, 0]]
    kept, remote = tile_traffic.distinct(keep, torch.tensor([0, 2, 1, 3]), 2)
    assert kept.tolist() == [[3, 2]]
    assert remote.tolist() == [[1, 1]]


def test_a_curve_of_cubes() -> None:
    """Eight consecutive tiles along the curve are a cube of two."""
    layout = fs.TileLayout(grid=(4, 4, 4), tile=(1, 1, 1))
    order = tile_traffic.morton(layout)
    assert sorted(order.tolist()) == list(range(64))
    first = order[:8]
    assert {(int(i) // 16, int(i) // 4 % 4, int(i) % 4) for i in first} == {
        (t, h, w) for t in (0, 1) for h in (0, 1) for w in (0, 1)
    }


def test_near_tiles_score_high() -> None:
    """Rotated by place alone, a tile keeps itself."""
    layout = fs.TileLayout(grid=(4, 8, 8), tile=(2, 4, 4))
    q, k = tile_traffic.queries_and_keys("positions", layout)
    keep = fs.VSA(top_k=1).select(q, k, layout).keep()[0]
    assert keep.diagonal(dim1=1, dim2=2).all()


def test_the_page_holds_the_committed_table() -> None:
    result = json.loads(tile_traffic.RESULTS.read_text())
    page = tile_traffic.PAGE.read_text()
    between = page.split(tile_traffic.BEGIN)[1].split(tile_traffic.END)[0]
    assert between.strip() == tile_traffic.table(result), "run python -m bench.tile_traffic --table"
    assert {row["scores"] for row in result["rows"]} == set(tile_traffic.KINDS)


def test_unknown_scores_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tile_traffic.main(["--kinds", "uniform"])
    assert "uniform" in capsys.readouterr().err
