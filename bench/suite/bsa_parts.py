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
from bench.suite.contender import Contender, Found
from bench.suite.device import Device
from bench.suite.parts import columns_of, lists_of
from flexsparse.attention import tiles_of
from flexsparse.masks.bsa import prune_queries
from flexsparse.masks.coarse import CoarseInputs
from flexsparse.packing import pack_queries, unpack_rows

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
    tiles = tiles_of(q, k, v, layout, kv_layout, None)
    video = [one.video(x) for one, x in zip((layout, kv_layout), tiles)]
    rows = pack_queries(q, tiles[0], selection)
    operands = (*tiles[1:], None, None, *selection.operands(), scale, False)
    functions: dict[str, Callable[[], Any]] = {
        "tiling": lambda: tiles_of(q, k, v, layout, kv_layout, None),
        "prune": lambda: prune_queries(builder, video[0], layout),
        "selection": lambda: builder.plan(CoarseInputs(*video, layout, kv_layout, scale, None, False)),
        "pack": lambda: pack_queries(q, tiles[0], selection),
        "lists": lists_of(selection, device),
        "fine": lambda: torch.ops.flexsparse.tile_attention(rows, *operands),
        "unpack": lambda: unpack_rows(rows, selection, like=q),
    }
    names = FORWARD
    if case.kind == "attention_training":
        names = BACKWARD
        queries = selection.queries
        assert queries is not None
        tokens = layout.index(q.device)[0]  # no tile holds extra tokens here
        sizes = (rows.shape[2], 0, 0, selection.query_rows)
        grad = torch.randn_like(q)
        of_rows = (rows, queries.kept, queries.position, tokens, 0, True, False)
        functions = {
            "unpack_backward": lambda: torch.ops.flexsparse.unpack_rows_backward(
                grad, queries.position, tokens, *sizes
            ),
            "columns": columns_of(selection, device),
            "pack_backward": lambda: torch.ops.flexsparse.pack_rows_backward(*of_rows),
        }
    for name in names:

        def run(turn: int, function: Callable[[], Any] = functions[name]) -> Any:
            with torch.no_grad():
                return function()

        fields = {"part": name, "tile": layout.sides, "density": selection.density}
        yield Contender(impl=OURS, op=case.kind, run=run, **fields)
