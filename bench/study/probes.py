"""What sparse attention does to a model that was trained dense: output error, attention mass kept, held-out loss.

Shape letters: H heads, S tokens in raster order, D head dim, N query tiles, M KV tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import flexsparse as fs
from bench.study.batch import Batch
from bench.study.bsa_rules import rule_rows
from bench.study.capture import TILE, Attention, Progress, Row, Tile, by_level, measured
from bench.study.overlaps import overlap_rows
from bench.study.settings import ANCHOR, Size
from flexsparse.analysis import SparseCall, watch
from flexsparse.analysis.measures import recall, tile_mass
from flexsparse.layout import TileLayout
from flexsparse.masks import keep_top
from flexsparse.selection import TileSelection
from flexsparse.training.flow import velocity_loss

DENSITIES = (0.5, 0.25, 0.125, 0.0625)
MASSES = (0.5, 0.7, 0.9)
SIDES = (0.5, 0.75)
"""Of a sliding window, as shares of the tile grid's: an eighth, and 42 % of the tiles."""
KEEP_QUERIES = 0.5
WINDOWS = 2
LOSSES = frozenset(
    {("vsa", density) for density in DENSITIES}
    | {("bsa", density) for density in (0.25, 0.125, 0.0625)}
    | {("bsa_kv", 0.125), ("random", 0.125), ("best", 0.125), ("top_p", 0.7), ("top_p", 0.9)}
)
"""(method, option) whose held-out loss is measured, and every sliding window."""


def tiles_at(density: float, M: int) -> int:
    """Tiles that a row keeps of M: as `VSA`."""
    return min(M, max(1, math.ceil(density * M)))


class Random:
    """Tiles drawn at random, the same number in every row: the floor. Each call draws anew; equal seeds, equal draws."""

    def __init__(self, density: float, seed: int = 0) -> None:
        self.density, self.draws = density, torch.Generator().manual_seed(seed)

    def select(self, q: Tensor, k: Tensor, layout: TileLayout, **_: Any) -> TileSelection:
        """A selection for queries and keys on one layout."""
        M = layout.num_tiles
        scores = torch.rand(*q.shape[:2], M, M, generator=self.draws).to(q.device)
        return TileSelection.from_mask(keep_top(scores, tiles_at(self.density, M)), layout)


class Best:
    """The tiles with the highest true attention mass, mean over a tile's queries: the ceiling; costs what dense costs."""

    def __init__(self, density: float) -> None:
        self.density = density

    def select(self, q: Tensor, k: Tensor, layout: TileLayout, scale: float | None = None, **_: Any) -> TileSelection:
        """A selection for queries and keys on one layout."""
        whole = torch.ones(*q.shape[:2], *[layout.num_tiles] * 2, dtype=torch.bool, device=q.device)
        all_tiles = TileSelection.from_mask(whole, layout)
        mass = tile_mass(q, k, all_tiles, range(layout.num_tiles), q.shape[-1] ** -0.5 if scale is None else scale)
        return self.of(mass, layout)

    def of(self, mass: Tensor, layout: TileLayout) -> TileSelection:
        """The same from the mass ``[1, H, N, M]``."""
        return TileSelection.from_mask(keep_top(mass, tiles_at(self.density, layout.num_tiles)), layout)


def sliding_windows(layout: TileLayout) -> dict[float, fs.SlidingTile]:
    """Windows of the `SIDES` of the tile grid, by their density."""
    windows = [fs.SlidingTile(window=tuple(max(1, round(side * n)) for n in layout.tiles)) for side in SIDES]
    return {round(window.nominal_density(layout, layout), 4): window for window in windows}


def methods(layout: TileLayout, seed: int = 0) -> dict[tuple[str, float], Any]:
    """Builders by (method, option): the density aimed at, for "top_p" the mass. BSA's density is that of queries times KV."""
    found: dict[tuple[str, float], Any] = {}
    for density in DENSITIES:
        found["vsa", density] = fs.VSA(sparsity=1 - density)
        found["bsa", density] = fs.BSA(keep_queries=KEEP_QUERIES, kv_density=min(1.0, density / KEEP_QUERIES))
        found["bsa_kv", density] = fs.BSA(keep_queries=1, kv_density=density)
        found["random", density] = Random(density, seed)
        found["best", density] = Best(density)
    found |= {("top_p", mass): fs.TopP(mass=mass) for mass in MASSES}
    return found | {("sliding_tile", density): window for density, window in sliding_windows(layout).items()}


def training_free_rows(one: Attention) -> Iterator[Row]:
    """Rows "training_free" of one attention. Recall is over the queries that are computed: BSA's over half of them."""
    pruned: Tensor | None = None  # the mass of the kept queries: they do not depend on the KV density
    for (method, option), builder in methods(one.layout, 1000 * one.window + one.layer).items():
        if isinstance(builder, Best):
            selection = builder.of(one.mass, one.layout)
        else:
            selection = builder.select(one.q, one.k, one.layout)
        mass = one.mass
        if selection.queries is not None:
            mass = pruned = one.mass_of(selection) if pruned is None else pruned
        yield {
            "kind": "training_free",
            "method": method,
            "option": option,
            "density": selection.density,
            "error": one.error(one.attend(selection)),
            "recall": float(recall(mass, selection, range(one.layout.num_tiles)).double().mean()),
        }


def _loss(model: nn.Module, held_out: dict[float, list[Batch]]) -> dict[float, float]:
    """Mean velocity loss of each level."""
    found = {}
    for level, batches in held_out.items():
        losses = [float(velocity_loss(model(b.noisy, b.t), b.clean, b.noise)) for b in batches]
        found[level] = sum(losses) / len(losses)
    return found


def training_free_losses(
    model: nn.Module,
    held_out: Sequence[Batch],
    size: Size,
    name: str,
    *,
    windows: int | None = None,
    tile: Tile = TILE,
    progress: Progress | None = None,
) -> Iterator[Row]:
    """Held-out loss of a dense model with its attention swapped, no gates: rows "training_free_loss".

    Over all windows by default, as trained models are evaluated; "dense" is on the same windows. The model is left as it
    was.

    Args:
        model: a dense `VideoDiT`, neither compiled nor wrapped.
        held_out: batches of one window at one level, on the model's device.
        size: of the model.
        name: the model's run.
        windows: of each level, evenly spread; None for all.
        tile: tokens along (t, h, w).
        progress: told what was done.
    """
    levels = by_level(held_out, windows)
    layout = TileLayout(grid=size.grid, tile=tile)
    chosen = {key: b for key, b in methods(layout).items() if key in LOSSES or key[0] == "sliding_tile"}
    for (method, option), builder in {(ANCHOR, 1.0): None, **chosen}.items():
        densities: list[float] = []

        def note(call: SparseCall, found: list[float] = densities) -> None:
            found.append(call.selection.density)

        with torch.no_grad():
            if builder is None:
                losses = _loss(model, levels)
            else:
                fs.wrap(model, builder, tile=tile, grid=size.grid, compile=False)
                try:
                    with watch(model, note):
                        losses = _loss(model, levels)
                finally:
                    fs.unwrap(model)
        if progress is not None:
            progress(f"{name}: loss with {method} {option:g}")
        yield {
            "kind": "training_free_loss",
            "size": size.name,
            "model": name,
            "method": method,
            "option": option,
            "density": 1.0 if builder is None else sum(densities) / len(densities),
            "loss": sum(losses.values()) / len(losses),
            "levels": {str(level): loss for level, loss in losses.items()},
        }


def probes(
    model: nn.Module,
    held_out: Sequence[Batch],
    size: Size,
    name: str,
    *,
    windows: int | None = WINDOWS,
    loss_windows: int | None = None,
    tile: Tile = TILE,
    progress: Progress | None = None,
) -> Iterator[Row]:
    """Rows "training_free", "bsa_rule" and "overlap", of some windows, and "training_free_loss"; arguments as
    `training_free_losses`. q, k and v are captured, and dense attention computed, once for all of them."""
    how: dict[str, Any] = {"tile": tile, "progress": progress}
    parts = [training_free_rows, rule_rows, overlap_rows]
    yield from measured(parts, model, held_out, size, name, windows=windows, **how)
    yield from training_free_losses(model, held_out, size, name, windows=loss_windows, **how)
