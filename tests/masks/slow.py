"""The methods as the design states them, in plain Python and float64, one query tile after the other.

Written from section 2 of the design and not from the code. A tile is the list of its tokens' raster indices.
"""

import itertools
import math
from statistics import NormalDist

import torch
from torch import Tensor

from flexsparse import TileLayout

Tile = list[int]


def tiles_of(layout: TileLayout) -> list[Tile]:
    """Raster indices of the tokens of every video tile."""
    return [[token for cell in boxes.values() for token in cell] for boxes in windows_of(layout, None)]


def windows_of(layout: TileLayout, window: tuple[int, int, int] | None) -> list[dict[tuple[int, int, int], Tile]]:
    """For every video tile, its windows by their origin; tokens of a window in raster order."""
    (T, H, W), tile = layout.grid, layout.tile
    size = tile if window is None else window
    out = []
    for origin in itertools.product(*(range(0, extent, side) for extent, side in zip((T, H, W), tile))):
        ends = [min(o + side, extent) for o, side, extent in zip(origin, tile, (T, H, W))]
        boxes: dict[tuple[int, int, int], Tile] = {}
        for t, h, w in itertools.product(*(range(o, end) for o, end in zip(origin, ends))):
            at = tuple((x - o) // s for x, o, s in zip((t, h, w), origin, size))
            boxes.setdefault(at, []).append(layout.text_first + (t * H + h) * W + w)  # type: ignore[arg-type]
        out.append(boxes)
    return out


def centre_of(layout: TileLayout, tokens: Tile) -> int:
    """The token at floor(n / 2) on each axis of the extent of a window."""
    _, H, W = layout.grid
    cells = [(x // (H * W), x // W % H, x % W) for x in (token - layout.text_first for token in tokens)]
    axes = [sorted({cell[axis] for cell in cells}) for axis in range(3)]
    t, h, w = (axis[len(axis) // 2] for axis in axes)
    return layout.text_first + (t * H + h) * W + w


def mean(x: Tensor, tokens: Tile) -> Tensor:
    return sum((x[token].double() for token in tokens), torch.zeros(x.shape[-1], dtype=torch.float64)) / len(tokens)


def scores(q: Tensor, k: Tensor, rows: list[Tile], columns: list[Tile], scale: float) -> list[list[float]]:
    """Pooled scores of one head: ``q`` and ``k`` are ``[S, D]``."""
    pooled = torch.stack([mean(k, column) for column in columns])
    return [[float(mean(q, row) @ key) * scale for key in pooled] for row in rows]


def best(row: list[float], n: int) -> set[int]:
    """The n highest, ties to the lowest index."""
    return set(sorted(range(len(row)), key=lambda m: (-row[m], m))[:n])


def cosine(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    norms = float(x.norm() * y.norm())
    return float(x @ y) / norms if norms else 0.0


def prune(
    q: Tensor, layout: TileLayout, window: tuple[int, int, int] | None, share: float
) -> tuple[list[Tile], list[int]]:
    """Kept tokens of each tile, and for every token of the sequence the token whose output it takes."""
    source = list(range(layout.seq_len))
    kept = []
    for boxes in windows_of(layout, window):
        here: Tile = []
        for tokens in boxes.values():
            centre = centre_of(layout, tokens)
            others = [token for token in tokens if token != centre]
            others.sort(key=lambda token: (cosine(q[token], q[centre]), tokens.index(token)))
            stay = {centre, *others[: math.ceil(share * len(tokens)) - 1]}
            for token in tokens:
                source[token] = token if token in stay else centre
            here += sorted(stay)
        kept.append(sorted(here))
    return kept, source


def above_threshold(row: list[float], density: float, min_tiles: int, capacity: int) -> tuple[set[int], bool]:
    """Tiles above mean + std * Phi^-1(1 - density), between the bounds; and whether the capacity cut some off."""
    average = sum(row) / len(row)
    std = math.sqrt(sum((x - average) ** 2 for x in row) / len(row))
    if density == 1:
        wanted = len(row)
    else:
        bar = average + std * NormalDist().inv_cdf(1 - density)
        wanted = sum(x > bar for x in row)
    wanted = max(wanted, min(min_tiles, len(row)))
    return best(row, min(wanted, capacity)), wanted > capacity


def smallest_set(row: list[float], mass: float) -> set[int]:
    """The fewest tiles whose softmax mass reaches ``mass``."""
    weights = torch.tensor(row, dtype=torch.float64).softmax(0).tolist()
    for n in range(1, len(row) + 1):
        found = best(row, n)
        if sum(weights[m] for m in found) >= mass:
            return found
    return set(range(len(row)))


def as_mask(kept: list[set[int]], M: int) -> Tensor:
    """Sets of columns as bool ``[N, M]``."""
    return torch.tensor([[m in row for m in range(M)] for row in kept])
