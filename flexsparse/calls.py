"""One attention call of a model: what computes it, whole and in the parts that graph passes look into.

Shape letters: B batch, H query heads, S tokens, D head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexsparse.arguments import softmax_scale
from flexsparse.attention import Tiles, fine, plan, reads_raster, tiles_of, video_tables, wants_gradients
from flexsparse.autocast import autocast_dtype, autocast_off
from flexsparse.grids import Geometry
from flexsparse.layout import TileLayout
from flexsparse.masks.base import MaskBuilder
from flexsparse.schedule import SparsitySchedule
from flexsparse.selection import KeptQueries, TileSelection
from flexsparse.tables import is_tracing
from flexsparse.text_masks import TextMask

Gates = tuple[Tensor | None, Tensor | None]
"""Of the coarse and of the fine output, ``[B, S, H * D]`` each."""


def gates_of_heads(gates: Gates, q: Tensor, layout: TileLayout) -> Gates:
    """Gates as ``[B, H, S, D]``; text has no coarse output, and its fine output no gate."""
    coarse, fine = gates
    return (
        None if coarse is None else gate_heads(coarse, q, layout, 0.0),
        None if fine is None else gate_heads(fine, q, layout, 1.0),
    )


def gate_heads(gate: Tensor, q: Tensor, layout: TileLayout, rest: float) -> Tensor:
    """A gate ``[B, S, H * D]`` as ``[B, H, S, D]``, in q's dtype; extra tokens that it does not have get ``rest``.

    It may be of the video's tokens only, or of those and the extra ones before them (history, which the video's own stream
    of a block with a separate one for text holds).

    Raises:
        ValueError: the gate has other sizes than the attention's queries.
    """
    B, H, S, D = q.shape
    if gate.dim() == 3 and gate.shape[1] != S:
        first = 0 if gate.shape[1] == layout.text_first + layout.num_tokens else layout.text_first
        if gate.shape[1] + first + layout.text_last == S:
            gate = torch.nn.functional.pad(gate, (0, 0, first, layout.text_last), value=rest)
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
    gates: Gates,
    layout: TileLayout,
    scale: float | None,
    backend: str,
    in_graph: bool,
    call: str = "",
    text: TextMask | None = None,
    kv_layout: TileLayout | None = None,
) -> Tensor:
    """What replaces a scaled_dot_product_attention call, in a graph or uncompiled; ``text`` is what a key mask leaves."""
    kv_layout = layout if kv_layout is None else kv_layout
    dtype = autocast_dtype(q.device.type)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    with autocast_off(q.device.type):
        gates = gates_of_heads(gates, q, layout)
        scale = softmax_scale(scale, q.shape[-1])
        if not isinstance(builder, MaskBuilder | TileSelection) and not is_tracing():  # it reads no tiles, but text
            shown = k if text is None else text.hide(k, v)[0]
            builder = plan(q, shown, (q, shown, v), layout, builder, kv_layout, scale, None, False)[0]
        raster = reads_raster(q, layout, kv_layout, builder, backend, wants_gradients(q, k, v, *gates))
        if text is not None and not raster:  # by tables, kernels read nothing past the lengths
            k, v = text.hide(k, v)
        tiles = (q, k, v) if raster else tiles_of(q, k, v, layout, kv_layout, None)
        selection, coarse_out = plan(q, k, tiles, layout, builder, kv_layout, scale, None, gates[0] is not None, raster)
        selection = with_text_counts(selection, text)
        how: dict[str, Any] = {"in_graph": in_graph, "call": call, "raster": raster}
        return fine(q, tiles, selection, coarse_out, gates, scale, backend, **how)[0]


def with_text_counts(selection: TileSelection, text: TextMask | None) -> TileSelection:
    """A selection whose text tiles hold what a key mask leaves; the video tiles, which it chose from, are the layout's."""
    if text is None:
        return selection
    counts = text.counts.expand(selection.counts.shape[0], -1)  # a mask may serve all samples
    return dataclasses.replace(selection, tile_counts=counts)


Tables = Sequence[Tensor] | None


class CallParts:
    """The calls of one graph, for `compile_passes.RewriteSDPA` and `compile_passes.UnfoldAttention`.

    Args:
        builders: mask builders; a call says by number which is its own.
        schedules: the schedules that they read.
        layouts_of: the layouts of queries and keys (one object where they are the same) of a geometry (T, H, W, text_first,
            text_last), ``grid`` in what follows.

    Attributes:
        tables: index tensors of a grid known in numbers, for a device.
        index: the same, made in a graph.
        whole: whether tokens can stay in tile order: every tile is full, and queries and keys have the same.
        reorder: a tensor with the tokens of one dimension in tile order, or back in raster order.
        attend: the whole call, ``attend(q, k, v, gate, grid, ratios, mask, fine_gate, *, scale, backend, name, builder,
            order)``; ``mask`` is a key mask ``[B, 1, 1, S]`` or None, ``order`` that of the tokens (`TileLayout`), here and
            in the parts.
        hide: k and v without the text that a key mask hides.
        tiles: q, k and v in tile order.
        video_tables: the tables by which the coarse stage finds tokens in raster order (`ops.coarse_select`).
        video_starts: the first video slots of queries and keys.
        plan: the coarse stage.
        fine: the fine stage and the combination.
    """

    def __init__(
        self,
        builders: Sequence[Any],
        schedules: Sequence[SparsitySchedule],
        layouts_of: Callable[[Geometry], tuple[TileLayout, TileLayout]],
    ) -> None:
        def bound(ratios: Sequence[Tensor], number: int) -> Any:
            tensors = {id(schedule): ratio for schedule, ratio in zip(schedules, ratios)}
            builder = builders[number]
            return builder.bind(tensors) if schedules and isinstance(builder, MaskBuilder) else builder

        def ordered(grid: Geometry, tables: Tables, order: str) -> tuple[TileLayout, TileLayout]:
            layout, kv_layout = layouts_of(grid)
            own = dataclasses.replace(layout, order=order).with_tables(None if tables is None else tables[:3])
            if kv_layout is layout:
                return own, own
            return own, dataclasses.replace(kv_layout, order=order).with_tables(None if tables is None else tables[3:])

        # plain functions, because a graph calls them by name

        def flexsparse_attend(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            gate: Tensor | None,
            grid: Geometry,
            ratios: Sequence[Tensor],
            mask: Tensor | None,
            fine_gate: Tensor | None,
            *,
            scale: float | None,
            backend: str,
            name: str,
            builder: int,
            order: str = "raster",
        ) -> Tensor:
            layout, kv_layout = ordered(grid, None, order)
            text = None if mask is None else TextMask.of(mask, kv_layout)
            choice = (scale, backend, True, name, text, kv_layout)
            return sparse_call(bound(ratios, builder), q, k, v, (gate, fine_gate), layout, *choice)

        def flexsparse_reorder(x: Tensor, dim: int, grid: Geometry, tables: Tables, back: bool) -> Tensor:
            layout, _ = ordered(grid, tables, "raster")
            move = layout.to_raster if back else layout.to_tiles
            if x.dim() == 1:
                return move(x[:, None])[:, 0].contiguous()
            return move(x.movedim(dim, -2)).movedim(-2, dim).contiguous()

        def flexsparse_hide(k: Tensor, v: Tensor, mask: Tensor, grid: Geometry) -> tuple[Tensor, Tensor]:
            return TextMask.of(mask, layouts_of(grid)[1]).hide(k, v)

        def flexsparse_tiles(q: Tensor, k: Tensor, v: Tensor, grid: Geometry, tables: Tables, order: str) -> Tiles:
            layout, kv_layout = ordered(grid, tables, order)
            return tiles_of(q, k, v, layout, kv_layout, None)

        def flexsparse_video_tables(q: Tensor, k: Tensor, grid: Geometry, tables: Tables) -> tuple[Tensor, ...]:
            layout, kv_layout = ordered(grid, tables, "raster")
            return video_tables(layout, kv_layout, q.device)

        def flexsparse_plan(
            q: Tensor,
            k: Tensor,
            tiles: Tiles,
            grid: Geometry,
            tables: Tables,
            order: str,
            ratios: Sequence[Tensor],
            mask: Tensor | None,
            gated: bool,
            scale: float | None,
            builder: int,
        ) -> list[Any]:
            with autocast_off(q.device.type):
                softmax = softmax_scale(scale, q.shape[-1])
                layout, kv_layout = ordered(grid, tables, order)
                chooser = bound(ratios, builder)
                selection, coarse_out = plan(q, k, tiles, layout, chooser, kv_layout, softmax, None, gated)
                text = None if mask is None else TextMask.of(mask, selection.kv_layout)
                return flat(with_text_counts(selection, text), coarse_out)

        def flexsparse_fine(
            q: Tensor,
            tiles: Tiles,
            planned: Sequence[Any],
            gates: Gates,
            grid: Geometry,
            tables: Tables,
            *,
            scale: float | None,
            backend: str,
            name: str,
            builder: int,
            order: str,
        ) -> Tensor:
            with autocast_off(q.device.type):
                layout, kv_layout = ordered(grid, tables, order)
                selection, coarse_out = unflat(planned, layout, kv_layout)
                own = gates_of_heads(gates, q, layout)
                softmax = softmax_scale(scale, q.shape[-1])
                return fine(q, tiles, selection, coarse_out, own, softmax, backend, in_graph=True, call=name)[0]

        def tables(grid: Geometry, device: torch.device, order: str) -> tuple[Tensor, ...]:
            layout, kv_layout = ordered(grid, None, order)
            return (*layout.tables(device), *(() if kv_layout is layout else kv_layout.tables(device)))

        def flexsparse_index(grid: Geometry, device: torch.device, order: str) -> tuple[Tensor, ...]:
            layout, kv_layout = ordered(grid, None, order)
            return (*layout.index(device), *(() if kv_layout is layout else kv_layout.index(device)))

        def video_starts(grid: Geometry) -> tuple[int, ...]:
            return tuple(one.tiles_first * one.slots for one in layouts_of(grid))

        def whole(grid: Geometry) -> bool:
            layout, kv_layout = layouts_of(grid)
            return kv_layout is layout and layout.whole

        self.attend, self.whole, self.reorder = flexsparse_attend, whole, flexsparse_reorder
        self.tables, self.index = tables, flexsparse_index
        self.hide, self.tiles, self.plan, self.fine = (
            flexsparse_hide,
            flexsparse_tiles,
            flexsparse_plan,
            flexsparse_fine,
        )
        self.video_tables, self.video_starts = flexsparse_video_tables, video_starts


def flat(selection: TileSelection, coarse_out: Tensor | None) -> list[Any]:
    """What a coarse stage found, as tensors and sizes."""
    kept = selection.queries
    queries = [None] * 4 if kept is None else [kept.kept, kept.counts, kept.source, kept.position]
    return [selection.bits, selection.counts, selection.capacity, selection.tile_counts, coarse_out, *queries]


def unflat(planned: Sequence[Any], layout: TileLayout, kv_layout: TileLayout) -> tuple[TileSelection, Tensor | None]:
    """Inverse of `flat`."""
    bits, counts, capacity, tile_counts, coarse_out, *kept = planned
    queries = None if kept[0] is None else KeptQueries(*kept)
    selection = TileSelection(
        bits=bits,
        counts=counts,
        layout=layout,
        kv_layout=kv_layout,
        capacity=capacity,
        queries=queries,
        tile_counts=tile_counts,
    )
    return selection, coarse_out
