"""A trained dense model's attention on held-out windows: q, k and v of every layer, its output and its attention mass.

Shape letters: B batch (1), H heads, S tokens in raster order, D head dim, N query tiles, L KV tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.study.batch import Batch
from bench.study.settings import Size
from flexsparse.analysis.measures import sample_rows, tile_mass
from flexsparse.attention import sparse_attention
from flexsparse.layout import TileLayout
from flexsparse.selection import TileSelection

Tile = tuple[int, int, int]
Row = dict[str, Any]
Progress = Callable[[str], None]

TILE: Tile = (4, 4, 4)
MEASURED = ("density", "error", "pruned_error", "recall", "overlap", "random")
"""Fields of a row that are means over windows; the others say what it is a row of."""


def captured(model: nn.Module, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of every block as attention sees them, after QK-norm and RoPE; no gradient.

    Args:
        model: a `VideoDiT`, not compiled; it is left as it was.
        batch: its input.

    Returns:
        One triple of ``[B, H, S, D]`` a block.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def telling(project: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
            found.append(project(*args, **kwargs))
            return found[-1]

        return call

    blocks = list(model.blocks)
    try:
        for block in blocks:
            block.attn.project = telling(block.attn.project)  # hides the class's
        with torch.no_grad():
            model(batch.noisy, batch.t)
    finally:
        for block in blocks:
            vars(block.attn).pop("project", None)
    return found


def by_level(held_out: Sequence[Batch], windows: int | None) -> dict[float, list[Batch]]:
    """Held-out batches of each noise level, in order of appearance: at most some windows, evenly spread, None for all.

    Raises:
        ValueError: a batch of several windows, which may be at several levels.
    """
    found: dict[float, list[Batch]] = {}
    for batch in held_out:
        if batch.t.numel() != 1:
            raise ValueError(f"a held-out batch has {batch.t.numel()} windows: give one window and one time a batch")
        found.setdefault(round(float(batch.t), 4), []).append(batch)
    return {
        level: [batches[i] for i in sample_rows(len(batches), windows or len(batches))]
        for level, batches in found.items()
    }


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One layer's attention on one window. What is costly is computed once, when it is asked for.

    Attributes:
        layer: number of the block.
        level: diffusion time.
        window: number of the window among those looked at.
        layout: tiles.
        q: ``[1, H, S, D]``, as `k` and `v`.
    """

    layer: int
    level: float
    window: int
    layout: TileLayout
    q: Tensor
    k: Tensor
    v: Tensor

    @cached_property
    def dense(self) -> Tensor:
        """Dense attention's output ``[1, H, S, D]``."""
        return F.scaled_dot_product_attention(self.q, self.k, self.v)

    @cached_property
    def _energy(self) -> Tensor:
        return self.dense.double().square().sum(-1)

    @cached_property
    def mass(self) -> Tensor:
        """Dense attention's mass on every KV tile, mean over all queries of a tile, ``[1, H, N, L]``."""
        whole = torch.ones(1, self.q.shape[1], *[self.layout.num_tiles] * 2, dtype=torch.bool, device=self.q.device)
        return self.mass_of(TileSelection.from_mask(whole, self.layout))

    def mass_of(self, selection: TileSelection) -> Tensor:
        """The same over the queries that a selection computes."""
        return tile_mass(self.q, self.k, selection, range(self.layout.num_tiles), self.q.shape[-1] ** -0.5)

    def attend(self, selection: TileSelection) -> Tensor:
        """Sparse attention without a gate, ``[1, H, S, D]``."""
        return sparse_attention(self.q, self.k, self.v, self.layout, selection)

    def error(self, out: Tensor, where: Tensor | None = None) -> float:
        """RMS(out - dense) / RMS(dense), mean over heads.

        Args:
            out: ``[1, H, S, D]``.
            where: bool ``[1, H, S]``, tokens to count, some in every head; None for all.
        """
        off, all_of_it = (out.double() - self.dense.double()).square().sum(-1), self._energy
        if where is not None:
            off, all_of_it = off * where, all_of_it * where
        return float((off.sum(-1) / all_of_it.sum(-1)).sqrt().mean())


def attentions(
    model: nn.Module, batch: Batch, size: Size, tile: Tile, level: float, window: int
) -> Iterator[Attention]:
    """Every layer's attention on one window, from one forward."""
    layout = TileLayout(grid=size.grid, tile=tile)
    layers = captured(model, batch)
    for layer in range(len(layers)):
        q, k, v = layers[layer]
        layers[layer] = ()  # type: ignore[call-overload]  # freed as soon as it was measured
        yield Attention(layer=layer, level=level, window=window, layout=layout, q=q, k=k, v=v)


def means(rows: Iterable[Row]) -> list[Row]:
    """Rows with their `MEASURED` fields averaged over all rows that agree in the others; a mean of None is None.

    Raises:
        ValueError: a field that is None in some of the rows only.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(value for key, value in row.items() if key not in MEASURED), []).append(row)
    found = []
    for same in groups.values():
        row = dict(same[0])
        for key in MEASURED:
            values = [one[key] for one in same if key in one]
            if values and any(value is None for value in values):
                if any(value is not None for value in values):
                    raise ValueError(f"{key} is None in some rows of {same[0]} and a number in others")
            elif values:
                row[key] = sum(values) / len(values)
        found.append(row)
    return found


Part = Callable[[Attention], Iterable[Row]]
"""A measure: rows of one attention, without the fields "size", "model", "layer" and "level"."""


def measured(
    parts: Sequence[Part],
    model: nn.Module,
    held_out: Sequence[Batch],
    size: Size,
    name: str,
    *,
    windows: int | None,
    tile: Tile,
    progress: Progress | None,
) -> Iterator[Row]:
    """Rows of several measures, means over windows, a noise level at a time; q, k and v are captured once for all of them.

    Args:
        parts: the measures.
        model: a dense `VideoDiT`, not compiled.
        held_out: batches of one window at one level, on the model's device.
        size: of the model.
        name: the model's run.
        windows: of each level, evenly spread; None for all.
        tile: tokens along (t, h, w).
        progress: told what was done.
    """
    levels = by_level(held_out, windows)
    for level, batches in levels.items():
        rows: list[Row] = []
        with torch.no_grad():
            for window, batch in enumerate(batches):
                for one in attentions(model, batch, size, tile, level, window):
                    whose = {"size": size.name, "model": name, "layer": one.layer, "level": level}
                    rows.extend({**row, **whose} for part in parts for row in part(one))
        if progress is not None:
            progress(f"{name}: attention at level {level} ({len(batches)} windows)")
        yield from means(rows)
