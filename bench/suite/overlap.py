"""How much neighbouring query tiles' lists have in common: what decides whether several may share the loads of keys.

On synthetic tokens, from independent to smooth; the last kind is made to be like the models of `bench.study`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import flexsparse as fs
from bench.suite import data
from bench.suite.cases import OURS, Case
from bench.suite.device import Device
from bench.suite.rows import Row

FIELDS = (
    *((None, 0.0), ((16, 16, 16), 0.2), ((16, 16, 16), 0.5), ((8, 8, 8), 0.5), ((4, 4, 4), 0.5), ((8, 8, 8), 0.8)),
    (data.CELLS["video"], 0.5),
)
"""(tokens along each axis between two values of the smooth field, its share of the variance)."""


def shared(keep: Tensor, group: int) -> float:
    """Tiles of ``group`` neighbouring lists over the tiles of their union: 1 where all differ, ``group`` where all agree.

    Args:
        keep: bool ``[B, H, N, M]``.
        group: neighbours in tile order.
    """
    N = keep.shape[2] // group * group
    groups = keep[:, :, :N].unflatten(2, (-1, group))
    return float(groups.sum(dtype=torch.float64) / groups.any(3).sum(dtype=torch.float64))


def overlap(keep: Tensor) -> float:
    """Mean share of a list that the next query tile in tile order keeps too."""
    both = (keep[:, :, :-1] & keep[:, :, 1:]).sum(dtype=torch.float64)
    return float(both / keep[:, :, :-1].sum(dtype=torch.float64))


def along(keep: Tensor, layout: fs.TileLayout) -> dict[str, float]:
    """Mean share of a list that the next tile along each axis keeps too, of axes with more than one tile."""
    tiles = keep.unflatten(2, layout.tiles)
    found = {}
    for axis, name in enumerate("thw", start=2):
        if tiles.shape[axis] > 1:
            one, other = tiles.narrow(axis, 0, tiles.shape[axis] - 1), tiles.narrow(axis, 1, tiles.shape[axis] - 1)
            found[name] = float((one & other).sum(dtype=torch.float64) / one.sum(dtype=torch.float64))
    return found


def rows(case: Case, device: Device) -> list[Row]:
    """A row for each kind of tokens."""
    found = []
    for cells, share in FIELDS:
        kind: Any = "smooth" if cells else "random"
        one = replace(case, data=kind)
        q, k, _, _ = data.tokens(one, device.torch, cells=cells, share=share)
        keep = one.builder.select(q, k, one.layout).keep()
        numbers = {"rho": overlap(keep), "pairs": shared(keep, 2), "triples": shared(keep, 3)}
        numbers |= along(keep, one.layout)
        fields: dict[str, Any] = {"overlap": numbers, "checked": True, "density": float(keep.double().mean())}
        fields["config"] = {"field_tokens": cells and list(cells), "field_share": share}
        found.append(one.row("overlap", OURS, **fields))
    return found
