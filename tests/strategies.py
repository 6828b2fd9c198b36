"""Hypothesis strategies: layouts, cases and random selections. Tensors come from seeds, never elementwise."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from flexsparse import TileLayout, TileSelection

TILES = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 3, 2), (1, 4, 4), (4, 4, 4), (3, 5, 4), (1, 8, 8))
LOW = (torch.bfloat16, torch.float16)


@st.composite
def layouts(draw: st.DrawFn, largest: tuple[int, int, int] = (6, 9, 9), text: bool = True) -> TileLayout:
    """Grids from one token up, tiles that fit and that do not, extra tokens on none, one or both sides."""
    grid = draw(st.tuples(*(st.integers(1, side) for side in largest)))
    tile = draw(st.sampled_from([*TILES, "auto"]))
    extra = st.one_of(st.just(0), st.integers(1, 20)) if text else st.just(0)
    return TileLayout(grid=grid, tile=tile, text_first=draw(extra), text_last=draw(extra))


@dataclass(frozen=True)
class Case:
    """Sizes and a seed; q, k, v follow from it."""

    layout: TileLayout
    kv_layout: TileLayout
    B: int
    H: int
    G: int
    D: int
    dtype: torch.dtype
    scale: float
    seed: int

    def generator(self, salt: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 10 + salt)

    def randn(self, heads: int, layout: TileLayout, salt: int, scale: float = 1.0) -> Tensor:
        shape = (self.B, heads, layout.seq_len, self.D)
        return (torch.randn(shape, generator=self.generator(salt)) * scale).to(self.dtype)

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k, v of the case's dtype and input scale."""
        return (
            self.randn(self.H, self.layout, 1, self.scale),
            self.randn(self.G, self.kv_layout, 2, self.scale),
            self.randn(self.G, self.kv_layout, 3, self.scale),
        )

    def keep(self, share: float = 0.4, empty: bool = False) -> Tensor:
        """Random kept tiles ``[B, H, N, M]``; without ``empty`` each row keeps at least one."""
        shape = (self.B, self.H, self.layout.num_tiles, self.kv_layout.num_tiles)
        noise = torch.rand(shape, generator=self.generator(4))
        return (noise < share) if empty else (noise < share) | (noise == noise.amin(-1, keepdim=True))

    def selection(self, share: float = 0.4, empty: bool = False) -> TileSelection:
        return TileSelection.from_mask(self.keep(share, empty), self.layout, self.kv_layout)


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    scales: tuple[float, ...] = (1.0,),
    largest: tuple[int, int, int] = (6, 9, 9),
    cross: bool = False,
    text: bool = True,
) -> Case:
    """Cases with MHA, GQA and MQA, batch 1 or 2; with ``cross`` keys may live on another grid and other tiles."""
    layout = draw(layouts(largest, text))
    kv_layout = draw(st.one_of(st.just(layout), layouts(largest, text))) if cross else layout
    G = draw(st.integers(1, 2))
    return Case(
        layout=layout,
        kv_layout=kv_layout,
        B=draw(st.integers(1, 2)),
        H=G * draw(st.integers(1, 2)),
        G=G,
        D=draw(st.sampled_from((4, 8, 16))),
        dtype=draw(st.sampled_from(dtypes)),
        scale=draw(st.sampled_from(scales)),
        seed=draw(st.integers(0, 10_000)),
    )
