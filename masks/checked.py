"""What builders return, checked where it may be somebody else's. Shape letters as in `base`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexsparse.arguments import check_selection
from flexsparse.layout import TileLayout
from flexsparse.selection import TileSelection
from flexsparse.tables import is_tracing

if TYPE_CHECKING:
    from flexsparse.masks.base import MaskBuilder
    from flexsparse.masks.coarse import CoarseInputs
    from flexsparse.masks.static import StaticBuilder


def planned(builder: MaskBuilder, coarse: CoarseInputs, v: Tensor | None = None) -> tuple[TileSelection, Tensor | None]:
    """What a builder's `plan` returns.

    Raises:
        TypeError: not a pair of a selection and a coarse output.
        ValueError: a selection of other sizes than the call's; a coarse output that is missing, or has another shape.
    """
    found = builder.plan(coarse, v)
    if _is_traced(builder):
        return found
    name = type(builder).__name__
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], TileSelection)):
        raise TypeError(f"{name}.plan returned {type(found).__name__}: return (TileSelection, coarse output or None)")
    selection, out = found
    whose = f"the selection that {name}.plan returned"
    selection = check_selection(selection, coarse.q, coarse.layout, coarse.kv_layout, whose, trusted=_is_ours(builder))
    wanted = (*selection.counts.shape, coarse.q.shape[-1])
    if v is not None and builder.has_coarse and (out is None or tuple(out.shape) != wanted):
        shape = "none" if out is None else f"one of {tuple(out.shape)}"
        raise ValueError(
            f"{name}.plan returned no coarse output {wanted} but {shape}, though has_coarse is True and v is given: return "
            "[B, H, tiles, D], or set has_coarse = False"
        )
    return selection, out


def checked_mask(builder: StaticBuilder, layout: TileLayout, kv_layout: TileLayout, device: torch.device) -> Tensor:
    """What a builder's `tile_mask` returns.

    Raises:
        ValueError: no bool tensor ``[N, M]``.
    """
    mask = builder.tile_mask(layout, kv_layout, device)
    if _is_traced(builder):
        return mask
    sizes = (layout.num_tiles, kv_layout.num_tiles)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != sizes:
        what = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{type(builder).__name__}.tile_mask returned {what}: return a bool tensor {list(sizes)}, the KV tiles that each "
            "query tile keeps"
        )
    return mask


def _is_ours(builder: MaskBuilder) -> bool:
    return type(builder).__module__.partition(".")[0] == __name__.partition(".")[0]


def _is_traced(builder: MaskBuilder) -> bool:
    """Whether one of ours is traced: sizes may be symbolic, and only what others write is worth guards."""
    return is_tracing() and _is_ours(builder)
