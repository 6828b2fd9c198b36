"""How much neighbouring query tiles' lists have in common: what decides whether several may share the loads of keys.

On synthetic tokens, from independent to smooth: no trained model's are at hand, and theirs may be anything in between.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.suite import data
from bench.suite.cases import OURS, Case
from bench.suite.device import Device
from bench.suite.rows import Row

FIELDS = ((0, 0.0), (16, 0.2), (16, 0.5), (8, 0.5), (4, 0.5), (8, 0.8))
"""(tokens between two values of the smooth field, its share of the variance)."""


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


def rows(case: Case, device: Device) -> list[Row]:
    """A row for each kind of tokens."""
    found = []
    for cells, share in FIELDS:
        kind: Any = "smooth" if cells else "random"
        one = replace(case, data=kind)
        q, k, _, _ = data.tokens(one, device.torch, cells=cells or 8, share=share)
        keep = one.builder.select(q, k, one.layout).keep()
        numbers = {"rho": overlap(keep), "pairs": shared(keep, 2), "triples": shared(keep, 3)}
        fields: dict[str, Any] = {"overlap": numbers, "checked": True, "density": float(keep.double().mean())}
        fields["config"] = {"field_tokens": cells, "field_share": share}
        found.append(one.row("overlap", OURS, **fields))
    return found
