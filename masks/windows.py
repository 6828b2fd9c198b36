"""Windows of BSA as the builder sees them: their sizes, and their tokens in a layout.

Shape letters: N query tiles, A windows of a tile, n tokens of a whole window.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from flexsparse.layout import TileLayout
from flexsparse.ops.windows import Axes, window_table


def window_sizes(tile: Sequence[int], window: Sequence[int]) -> list[int]:
    """Tokens of every window of a full tile; a window is cut where the tile ends."""
    cuts = [[min(w, side - start) for start in range(0, side, w)] for side, w in zip(tile, window)]
    return [math.prod(cut) for cut in itertools.product(*cuts)]


def window_in(layout: TileLayout, window: Axes | None) -> Axes:
    """Sides of a whole window in a layout's tiles; None is the whole tile."""
    return layout.sides if window is None else cast(Axes, tuple(map(min, window, layout.sides)))


def windows_of(layout: TileLayout, window: Axes | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Windows of every query tile of a layout (`ops.windows.window_table`); None for the whole tile. Not while tracing."""
    return window_table(layout.grid, layout.sides, window_in(layout, window), device)


@functools.lru_cache(128)
@torch.inference_mode(False)
def window_counts(layout: TileLayout, window: Axes | None) -> Tensor:
    """How many tokens each window has, ``[N, A]`` on the CPU: what a report asks for at every call. Not while tracing."""
    return (windows_of(layout, window, torch.device("cpu"))[0] >= 0).sum(-1)
