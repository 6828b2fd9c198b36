"""What the report says of a call's density: the pairs that are computed, text and pruned queries included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse.reporting import density_of

TEXT = fs.TileLayout(grid=(4, 16, 16), text_last=256)


@pytest.mark.parametrize(
    "layout", [TEXT, fs.TileLayout(grid=(4, 16, 16)), fs.TileLayout(grid=(4, 16, 8), text_first=70)]
)
@pytest.mark.parametrize("builder", [fs.VSA(top_k=2), fs.SlidingTile(window=(1, 1, 3)), fs.BSA(keep_queries=0.5)])
def test_density_is_that_of_a_selection(layout: fs.TileLayout, builder: Any) -> None:
    """Tiles are full; BSA hits what it aims at on average. Without pruning's share, text alone would make 0.39 of 0.32."""
    x = torch.randn(4, 4, layout.seq_len, 16)
    selection = builder.select(x, x.roll(1, 0), layout)
    assert density_of(builder, layout, layout) == pytest.approx(selection.density, rel=0.12)


def test_density_of_a_builder_that_does_not_say_it() -> None:
    class Own:
        select = fs.Dense().select

    assert density_of(Own(), TEXT, TEXT) != density_of(Own(), TEXT, TEXT)  # NaN


@pytest.mark.parametrize("gates", [1, [1], 2.5])
def test_gates_that_are_no_patterns(gates: Any) -> None:
    with pytest.raises(TypeError, match=r"gates is .*: give True, or name patterns of attention modules"):
        fs.wrap(torch.nn.Sequential(torch.nn.Linear(4, 4)), fs.VSA(top_k=1), grid=(4, 8, 8), gates=gates)
