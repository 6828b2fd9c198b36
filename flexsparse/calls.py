"""One attention call of a model: what computes it, whole and in the parts that graph passes look into.

Shape letters: B batch, H query heads, S tokens, D head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexsparse.attention import Tiles, attend, fine, plan, tiles_of
from flexsparse.backends import softmax_scale
from flexsparse.grids import Grid
from flexsparse.layout import TileLayout
from flexsparse.schedule import SparsitySchedule
from flexsparse.selection import KeptQueries, TileSelection


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype to which autocast would cast attention's inputs; None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def gate_heads(gate: Tensor, q: Tensor) -> Tensor:
    """A gate ``[B, S, H * D]`` as ``[B, H, S, D]``, in q's dtype.

    Raises:
        ValueError: the gate has other sizes than the attention's queries.
    """
    B, H, S, D = q.shape
    if gate.dim() != 3 or gate.shape[0] != B or gate.shape[1] != S or gate.shape[2] != H * D:
        raise ValueError(
            f"the gate is {tuple(gate.shape)}, the attention's queries are {tuple(q.shape)}: a gate reads the hidden states "
            "of its attention, [B, S, channels], and writes H * D channels; give wrap(..., gates=[names]) to choose modules"
        )
    return gate.unflatten(-1, (H, D)).transpose(1, 2).to(q.dtype)


def sparse_call(
    builder: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    layout: TileLayout,
    scale: float | None,
    backend: str,
    in_graph: bool,
    call: str = "",
) -> Tensor:
    """What replaces a scaled_dot_product_attention call, in a graph or uncompiled."""
    dtype = autocast_dtype(q.device.type)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    with torch.autocast(q.device.type, enabled=False):
        if gate is not None:
            gate = gate_heads(gate, q)
        return attend(
            q,
            k,
            v,
            layout,
            builder,
            gate=gate,
            scale=softmax_scale(scale, q.shape[-1]),
            backend=backend,
            in_graph=in_graph,
            call=call,
        )[0]


Tables = Sequence[Tensor] | None


class CallParts:
    """The calls of one graph, for `compile_passes.RewriteSDPA` and `compile_passes.UnfoldAttention`.

    Args:
        builder: a mask builder.
        schedules: the schedules that it reads.
        layout_of: the layout of a grid.

    Attributes:
        tables: index tensors of a grid known in numbers, for a device.
        whole: whether every tile of a grid is full.
        reorder: a tensor with the tokens of one dimension in tile order, or back in raster order.
        attend: the whole call, ``attend(q, k, v, gate, grid, ratios, *, scale, backend, name, order)``; ``order`` is that
            of the tokens (`TileLayout`), here and in the parts.
        tiles: q, k and v in tile order.
        plan: the coarse stage.
        fine: the fine stage and the combination.
    """

    def __init__(
        self, builder: Any, schedules: Sequence[SparsitySchedule], layout_of: Callable[[Grid], TileLayout]
    ) -> None:
        def bound(ratios: Sequence[Tensor]) -> Any:
            tensors = {id(schedule): ratio for schedule, ratio in zip(schedules, ratios)}
            return builder.bind(tensors) if schedules else builder

        def ordered(grid: Grid, tables: Tables, order: str) -> TileLayout:
            return dataclasses.replace(layout_of(grid), order=order).with_tables(tables)

        # plain functions, because a graph calls them by name

        def flexsparse_attend(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            gate: Tensor | None,
            grid: Grid,
            ratios: Sequence[Tensor],
            *,
            scale: float | None,
            backend: str,
            name: str,
            order: str = "raster",
        ) -> Tensor:
            return sparse_call(bound(ratios), q, k, v, gate, ordered(grid, None, order), scale, backend, True, name)

        def flexsparse_reorder(x: Tensor, dim: int, grid: Grid, tables: Tables, back: bool) -> Tensor:
            layout = ordered(grid, tables, "raster")
            move = layout.to_raster if back else layout.to_tiles
            if x.dim() == 1:
                return move(x[:, None])[:, 0].contiguous()
            return move(x.movedim(dim, -2)).movedim(-2, dim).contiguous()

        def flexsparse_tiles(q: Tensor, k: Tensor, v: Tensor, grid: Grid, tables: Tables, order: str) -> Tiles:
            return tiles_of(q, k, v, ordered(grid, tables, order), None, None)

        def flexsparse_plan(
            q: Tensor,
            k: Tensor,
            tiles: Tiles,
            grid: Grid,
            tables: Tables,
            order: str,
            ratios: Sequence[Tensor],
            gated: bool,
            scale: float | None,
        ) -> list[Any]:
            with torch.autocast(q.device.type, enabled=False):
                softmax = softmax_scale(scale, q.shape[-1])
                layout = ordered(grid, tables, order)
                return flat(*plan(q, k, tiles, layout, bound(ratios), None, softmax, None, gated))

        def flexsparse_fine(
            q: Tensor,
            tiles: Tiles,
            planned: Sequence[Any],
            gate: Tensor | None,
            grid: Grid,
            tables: Tables,
            *,
            scale: float | None,
            backend: str,
            name: str,
            order: str,
        ) -> Tensor:
            with torch.autocast(q.device.type, enabled=False):
                selection, coarse_out = unflat(planned, ordered(grid, tables, order))
                gate = None if gate is None else gate_heads(gate, q)
                softmax = softmax_scale(scale, q.shape[-1])
                gates = (gate, None)
                return fine(q, tiles, selection, coarse_out, gates, softmax, backend, in_graph=True, call=name)[0]

        def tables(grid: Grid, device: torch.device, order: str) -> tuple[Tensor, Tensor, Tensor]:
            return ordered(grid, None, order).tables(device)

        def whole(grid: Grid) -> bool:
            return layout_of(grid).whole

        self.attend, self.tables, self.whole, self.reorder = flexsparse_attend, tables, whole, flexsparse_reorder
        self.tiles, self.plan, self.fine = flexsparse_tiles, flexsparse_plan, flexsparse_fine


def flat(selection: TileSelection, coarse_out: Tensor | None) -> list[Any]:
    """What a coarse stage found, as tensors and sizes."""
    kept = selection.queries
    queries = [None] * 4 if kept is None else [kept.kept, kept.counts, kept.source, kept.position]
    return [selection.bits, selection.counts, selection.capacity, selection.tile_counts, coarse_out, *queries]


def unflat(planned: Sequence[Any], layout: TileLayout) -> tuple[TileSelection, Tensor | None]:
    """Inverse of `flat`."""
    bits, counts, capacity, tile_counts, coarse_out, *kept = planned
    queries = None if kept[0] is None else KeptQueries(*kept)
    selection = TileSelection(
        bits=bits,
        counts=counts,
        layout=layout,
        kv_layout=layout,
        capacity=capacity,
        queries=queries,
        tile_counts=tile_counts,
    )
    return selection, coarse_out
