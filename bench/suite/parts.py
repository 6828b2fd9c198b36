"""The pieces of one attention call, each timed alone: tiling, pooling, selection, lists, fine stage, the way back.

Where kernels read and write raster order by tables, nothing is brought to tile order and back, and the fine stage adds the
gated coarse output: these pieces have rows that say so (`NOT_RUN`).

Shape letters: B batch, H heads, S tokens, P padded tokens, N query tiles, M KV tiles, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flexsparse as fs
from bench.suite.cases import OURS, Case
from bench.suite.contender import Contender, Found, Missing
from bench.suite.device import Device
from bench.suite.rows import NOT_RUN
from flexsparse.attention import plan, reads_raster, tiles_of, video_tables
from flexsparse.masks.coarse import CoarseInputs
from flexsparse.ops.coarse_select import pool_tiles

PARTS = ("tiling", "pooling", "selection", "lists", "fine", "untile", "combine")
"""``selection`` holds the pooling and the coarse output, ``fine`` the lists, ``combine`` the way back to raster order."""


def lists_of(selection: fs.TileSelection, device: Device) -> Callable[[], Any]:
    """Ascending lists from the bitmask, as the fine stage makes them."""
    arguments = (selection.bits, selection.counts, selection.kv_layout.num_tiles, selection.capacity)
    if device.torch.type != "cuda":
        return lambda: selection.kv_indices
    from flexsparse.compile_passes.templates.lists import ascending

    return lambda: ascending(*arguments)


def columns_of(selection: fs.TileSelection, device: Device) -> Callable[[], Any]:
    """Transposed lists, as the backward makes them."""
    arguments = (selection.bits, selection.counts, selection.kv_layout.num_tiles, selection.capacity)
    if device.torch.type != "cuda":
        return lambda: selection.transpose()
    from flexsparse.compile_passes.templates.lists import transpose

    return lambda: transpose(*arguments)


def contenders(
    case: Case,
    device: Device,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    layout: fs.TileLayout,
    selection: fs.TileSelection,
) -> Found:
    """One for each of `PARTS`; the whole's check covers them."""
    q, k, v, gate = inputs
    if q.is_cuda and reads_raster(q, layout, layout, case.builder, "triton", gradients=False):
        yield from in_raster(case, device, inputs, layout, selection)
        return
    tiles = tiles_of(q, k, v, layout, None, None)
    video = [layout.video(x) for x in tiles]
    counts = layout.index(q.device)[2]
    scale = case.D**-0.5
    operands = (*selection.operands(), scale, False)
    builder = case.builder

    def coarse() -> Any:
        return builder.plan(CoarseInputs(video[0], video[1], layout, layout, scale), video[2])

    def pooling() -> Any:
        if not q.is_cuda:
            return [pool_tiles(x, counts) for x in video]
        from flexsparse.compile_passes.templates.pool import pool

        return pool([(x, counts, False) for x in video])

    with torch.no_grad():
        coarse_out = coarse()[1]
    out = torch.randn_like(tiles[0])
    back, slots = layout.index(q.device)[1], layout.slots
    heads = None if gate is None else gate.unflatten(-1, (case.H, case.D)).transpose(1, 2)

    def untile(out: Tensor, back: Tensor) -> Tensor:
        return out.index_select(2, back)

    def combine(out: Tensor, back: Tensor, gate: Tensor, coarse: Tensor) -> Tensor:
        rows = coarse.index_select(2, back // slots).to(out.dtype)
        return out.index_select(2, back) + gate * rows

    ways: dict[str, Callable[..., Any]] = {"untile": untile, "combine": combine}
    if "compiled" in device.modes:  # in a compiled model Inductor makes one kernel of it
        ways = {name: torch.compile(way, dynamic=False) for name, way in ways.items()}
    functions: dict[str, Callable[[], Any]] = {
        "tiling": lambda: tiles_of(q, k, v, layout, None, None),
        "pooling": pooling,
        "selection": coarse,
        "lists": lists_of(selection, device),
        "fine": lambda: torch.ops.flexsparse.tile_attention(*tiles, None, None, *operands),
        "untile": lambda: ways["untile"](out, back),
    }
    if heads is not None and coarse_out is not None:
        functions["combine"] = lambda: ways["combine"](out, back, heads, coarse_out)
    yield from _timed(case, functions, layout, selection)


def _timed(
    case: Case, functions: dict[str, Callable[[], Any]], layout: fs.TileLayout, selection: fs.TileSelection
) -> Found:
    for name in PARTS:
        if name not in functions:
            continue

        def run(turn: int, function: Callable[[], Any] = functions[name]) -> Any:
            with torch.no_grad():
                return function()

        op = "select" if name in ("pooling", "selection") else case.kind
        part = None if name == "selection" else name
        yield Contender(impl=OURS, op=op, run=run, part=part, tile=layout.sides, density=selection.density)


def in_raster(
    case: Case,
    device: Device,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    layout: fs.TileLayout,
    selection: fs.TileSelection,
) -> Found:
    """The same where tokens stay in raster order; ``fine`` holds the gated coarse output, as in a compiled model."""
    q, k, v, gate = inputs
    scale, builder = case.D**-0.5, case.builder
    tokens, _, counts = layout.index(q.device)
    tables = video_tables(layout, layout, q.device)[:2]
    operands = (*selection.operands(), scale, False, tokens, tokens)
    heads = None if gate is None else gate.unflatten(-1, (case.H, case.D)).transpose(1, 2)

    def coarse() -> Any:
        return plan(q, k, (q, k, v), layout, builder, None, scale, None, True, raster=True)

    def pooling() -> Any:
        from flexsparse.compile_passes.templates.pool import pool

        return pool([(x, counts, False) for x in (q, k, v)], (tables[0], tables[1], tables[1]))

    with torch.no_grad():
        coarse_out = coarse()[1]
    gated = (None, None) if heads is None else (coarse_out, heads)
    functions: dict[str, Callable[[], Any]] = {
        "pooling": pooling,
        "selection": coarse,
        "lists": lists_of(selection, device),
        "fine": lambda: torch.ops.flexsparse.tile_attention(q, k, v, *gated, *operands),
    }
    for name in PARTS:
        if name not in functions:
            yield Missing(impl=OURS, op=case.kind, reason=NOT_RUN, part=name)
    yield from _timed(case, functions, layout, selection)
