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


class Own(fs.masks.StaticBuilder):
    """Of a class that may change: nothing of it is cached."""

    def __init__(self) -> None:
        self.keeps, self.made = 1, 0

    def tile_mask(self, layout: fs.TileLayout, kv_layout: fs.TileLayout, device: torch.device) -> torch.Tensor:
        self.made += 1
        return torch.ones(layout.num_tiles, 1, dtype=torch.bool) & (torch.arange(kv_layout.num_tiles) < self.keeps)


def test_a_density_is_asked_for_by_who_reads_it() -> None:
    """Made on the CPU for a report that nobody had asked for, a mask of 40x48x80 tokens cost each call milliseconds."""
    layout, builder = fs.TileLayout(grid=(4, 8, 8)), Own()
    model = fs.nn.VideoSelfAttention(32, 2, builder, gate=False)
    x = torch.randn(1, layout.seq_len, 32)
    model(x, layout)
    per_call, builder.made = builder.made, 0

    class Calls(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    wrapped = fs.wrap(Calls(), builder, grid=(4, 8, 8), compile=False, min_tokens=0)
    report = fs.report(wrapped)
    for keeps in (1, 2):
        builder.keeps, builder.made = keeps, 0
        for _ in range(3):
            wrapped(torch.randn(1, 2, layout.seq_len, 16))
        assert builder.made == 3 * per_call
        assert (
            [call.density for call in report.calls] == [keeps / layout.num_tiles] == [c.density for c in report.all()]
        )
        assert f" {keeps / layout.num_tiles:.3f} " in str(report) and builder.made == 3 * per_call + 1


@pytest.mark.parametrize("gates", [1, [1], 2.5])
def test_gates_that_are_no_patterns(gates: Any) -> None:
    with pytest.raises(TypeError, match=r"gates is .*: give True, or name patterns of attention modules"):
        fs.wrap(torch.nn.Sequential(torch.nn.Linear(4, 4)), fs.VSA(top_k=1), grid=(4, 8, 8), gates=gates)
