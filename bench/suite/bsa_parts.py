"""The pieces of one BSA call, each timed alone: tiling, the choice of queries, packing, lists, fine stage, the way back.

Shape letters: B batch, H heads, S tokens, N query tiles, R computed rows, D head dim.
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
from bench.suite.parts import columns_of, lists_of
from bench.suite.rows import NOT_RUN
from flexsparse.attention import reads_raster, tiles_of, video_tables
from flexsparse.masks.bsa import prune_queries
from flexsparse.masks.coarse import CoarseInputs
from flexsparse.packing import heads_inside, pack_queries, unpack_rows

FORWARD = ("tiling", "prune", "selection", "pack", "lists", "fine", "unpack")
"""``selection`` holds ``prune``, ``fine`` the lists."""
BACKWARD = ("unpack_backward", "columns", "pack_backward")


def contenders(
    case: Case,
    device: Device,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    layout: fs.TileLayout,
    selection: fs.TileSelection,
) -> Found:
    """One for each piece; the whole's check covers them."""
    q, k, v, _ = inputs
    kv_layout, builder, scale = case.kv_layout, case.builder, case.D**-0.5
    training = case.kind == "attention_training"
    raster = q.is_cuda and reads_raster(q, layout, kv_layout, builder, "triton", gradients=training)
    tiles = (q, k, v) if raster else tiles_of(q, k, v, layout, kv_layout, None)
    read = tiles[:2] if raster else tuple(one.video(x) for one, x in zip((layout, kv_layout), tiles))
    tables = video_tables(layout, kv_layout, q.device) if raster else None
    packed_from = None if raster else tiles[0]
    rows = pack_queries(q, packed_from, selection)
    kv_tokens = kv_layout.index(q.device)[0] if raster else None
    operands = (*tiles[1:], None, None, *selection.operands(), scale, False, None, kv_tokens)
    functions: dict[str, Callable[[], Any]] = {
        "tiling": lambda: tiles_of(q, k, v, layout, kv_layout, None),
        "prune": lambda: prune_queries(builder, read[0], layout),
        "selection": lambda: builder.plan(CoarseInputs(*read, layout, kv_layout, scale, None, False, tables)),
        "pack": lambda: pack_queries(q, packed_from, selection),
        "lists": lists_of(selection, device),
        "fine": lambda: torch.ops.flexsparse.tile_attention(rows, *operands),
        "unpack": lambda: unpack_rows(rows, selection, like=q),
    }
    names = FORWARD
    if training:
        names = BACKWARD
        queries = selection.queries
        assert queries is not None
        tokens = layout.index(q.device)[0]  # no tile holds extra tokens here
        sizes = (rows.shape[2], 0, 0, selection.query_rows)
        grad = torch.randn_like(q)
        of_rows = (rows, queries.kept, queries.position, tokens, 0, not raster, raster and heads_inside(q))
        functions = {
            "unpack_backward": lambda: torch.ops.flexsparse.unpack_rows_backward(
                grad, queries.position, tokens, *sizes
            ),
            "columns": columns_of(selection, device),
            "pack_backward": lambda: torch.ops.flexsparse.pack_rows_backward(*of_rows),
        }
    for name in names:
        if name == "tiling" and raster:
            yield Missing(impl=OURS, op=case.kind, reason=NOT_RUN, part=name)
            continue

        def run(turn: int, function: Callable[[], Any] = functions[name]) -> Any:
            with torch.no_grad():
                return function()

        fields = {"part": name, "tile": layout.sides, "density": selection.density}
        yield Contender(impl=OURS, op=case.kind, run=run, **fields)
