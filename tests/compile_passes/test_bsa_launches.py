"""How many GPU kernels one BSA call launches, counted without a GPU; none is a sort, none adds atomically.

The forward is traced for fake CUDA tensors, with the graph's custom ops counted in Triton's interpreter. A CPU build of torch
has no autograd for fake CUDA tensors: the backward's ops are those of a compiled model's joint graph on the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import flexsparse as fs
from flexsparse.attention import fine, plan, tiles_of
from flexsparse.compile_passes import FuseSelection
from flexsparse.compile_passes.templates import pack, prune, tiling
from flexsparse.compile_passes.templates.forward import forward
from flexsparse.compile_passes.templates.launch import count_launches
from flexsparse.compile_passes.unfold import _drop_dead
from flexsparse.ops.choice import Rule
from flexsparse.ops.coarse_select import _on_gpu
from flexsparse.ops.windows import window_table

from .capture import joint_graphs
from .lowering_cases import GRID, TILE, Case, Tiny, run

D, HEADS = 32, 2
aten = torch.ops.aten
VIEWS = {
    *(aten.view.default, aten.unsqueeze.default, aten.transpose.int, aten.expand.default, aten.slice.Tensor),
    *(aten.permute.default, aten.alias.default, aten.detach.default, aten.narrow.default, aten.unflatten.int),
    *(aten.flatten.using_ints, aten.select.int, aten._unsafe_view.default),
}
SORTS = ("sort", "argsort", "topk", "searchsorted", "unique")
SCATTERS = ("scatter", "scatter_add", "scatter_reduce", "index_put", "index_add", "index_copy", "_unsafe_index_put")
BSA = fs.BSA(keep_queries=0.5, kv_density=0.3)
LAYOUTS: dict[str, tuple[fs.TileLayout, fs.TileLayout]] = {
    "raster": (fs.TileLayout(grid=(4, 8, 9)),) * 2,
    "tiles": (fs.TileLayout(grid=(4, 8, 8), order="tiles"),) * 2,
    "128 queries, 64 keys": (fs.TileLayout(grid=(4, 8, 16), tile=(4, 4, 8)), fs.TileLayout(grid=(4, 8, 16))),
    "text": (fs.TileLayout(grid=(4, 8, 9), text_first=3, text_last=70),) * 2,
}


def named(node: Any) -> str:
    """An op's name without namespace and overload."""
    return str(node.target._schema.name.partition("::")[2])


def call_graph(layout: fs.TileLayout, kv_layout: fs.TileLayout, builder: fs.BSA = BSA) -> GraphModule:
    """One BSA call in inference after FuseSelection, on (fake) CUDA; heads lie inside of tokens, as in a model."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    shapes = [[table.shape for table in one.tables("cpu")] for one in (layout, kv_layout)]
    with mode:
        tokens = (layout.seq_len, kv_layout.seq_len, kv_layout.seq_len)
        q, k, v = (torch.empty(1, n, HEADS, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for n in tokens)
        tables = [[torch.empty(shape, dtype=torch.int32, device="cuda") for shape in each] for each in shapes]

    def attend(q: Any, k: Any, v: Any, of_queries: Any, of_keys: Any) -> Any:
        own = fs.TileLayout(**sizes(layout)).with_tables(of_queries)
        keys = own if kv_layout is layout else fs.TileLayout(**sizes(kv_layout)).with_tables(of_keys)
        tiles = tiles_of(q, k, v, own, keys, None)
        selection, _ = plan(q, k, tiles, own, builder, keys, D**-0.5, None, False)
        out, _ = fine(q, tiles, selection, None, (None, None), D**-0.5, "triton")
        return out.transpose(1, 2).flatten(2)

    with mode, torch.no_grad():
        traced = make_fx(attend, pre_dispatch=True, _allow_non_fake_inputs=True)(q, k, v, *tables)
    _drop_dead(traced.graph)
    fuse = FuseSelection()
    fuse(traced)
    assert fuse.matches == 1, fuse.refused
    with mode, torch.no_grad():
        lowered = make_fx(lambda *inputs: traced(*inputs), _allow_non_fake_inputs=True)(q, k, v, *tables)
    lowered.graph.eliminate_dead_code()
    return lowered


def sizes(layout: fs.TileLayout) -> dict[str, Any]:
    names = ("grid", "tile", "text_first", "text_last", "order")
    return {name: getattr(layout, name) for name in names}


def launches(layout: fs.TileLayout) -> dict[str, int]:
    """Kernels that each custom op launches, by running what it runs on CUDA in the interpreter."""
    tokens, _, counts = layout.tables("cpu")
    q, k, v = (torch.randn(1, 1, layout.seq_len, D) for _ in range(3))
    first, last = layout.tiles_first * layout.slots, layout.tiles_last * layout.slots
    found: dict[str, int] = {}

    def run_counted(name: str, call: Any) -> Any:
        with count_launches() as names:
            result = call()
        found[name] = len(names)
        return result

    tiles = run_counted("tile_tokens", lambda: tiling.tile_tokens([q, k, v], [tokens] * 3))
    windows = window_table(layout.grid, layout.sides, (2, 2, 2), q.device)
    sized = (first, layout.seq_len, 32, "representative", "center")
    total, *fields = run_counted(
        "prune_queries", lambda: prune.prune(layout.video(tiles[0]), *windows, tokens, 0.5, *sized)
    )
    kept, kept_counts, _, position = fields
    own = counts.narrow(0, layout.tiles_first, layout.num_tiles)
    rule = Rule(name="top_k", value=2.0)
    how = (total, layout.video(tiles[1]), None, kept_counts, own, None, rule, 2, 0.1, False)
    chosen = run_counted("coarse_select", lambda: _on_gpu(*how))
    rows = run_counted("pack_rows", lambda: pack.pack_rows(q, kept, kept_counts, tokens, None, first, last))
    more = {"query_rows": 32, "first_rows": first, "kv_first": layout.tiles_first, "slots": 64, "partial": True}
    more |= {"kv_video": layout.num_tiles, "capacity": 2, "scale": 0.1}
    each = (rows, *tiles[1:], *chosen[5:7], counts[None], None, None)
    out, _ = run_counted("tile_attention", lambda: forward(*each, **more))
    run_counted("unpack_rows", lambda: pack.unpack_rows(out, position, 0.0, True))
    grad = torch.randn(1, 1, layout.seq_len, D)
    rest = (position, tokens, rows.shape[2], first, last, 32)
    d_rows = run_counted("unpack_rows_backward", lambda: pack.unpack_rows_backward(grad, *rest))
    how = (kept, position, tokens, first, False, True)
    run_counted("pack_rows_backward", lambda: pack.pack_rows_backward(d_rows, *how))
    return found


CALL = ["prune_queries", "coarse_select", "pack_rows", "tile_attention", "unpack_rows"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_call_is_eight_kernels_in_raster_order_and_seven_in_tile_order_and_nothing_else(name: str) -> None:
    layout, kv_layout = LAYOUTS[name]
    graph = call_graph(layout, kv_layout)
    nodes = [n for n in graph.graph.nodes if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload)]
    names = [named(n) for n in nodes if n.target not in VIEWS]
    assert names == ([] if layout.order == "tiles" else ["tile_tokens"]) + CALL
    (unpacked,) = (n for n in nodes if named(n) == "unpack_rows")
    model = (layout.seq_len * HEADS * D, D, HEADS * D, 1)
    assert unpacked.meta["val"].stride() == model  # where the model reads it: no copy
    cost = launches(LAYOUTS["text" if name == "text" else "raster"][0])
    assert sum(cost[each] for each in names) == (7 if layout.order == "tiles" else 8)


def test_the_ops_that_prune_pack_and_unpack_launch_one_kernel_each_way() -> None:
    cost = launches(LAYOUTS["raster"][0])
    for name in ("prune_queries", "pack_rows", "unpack_rows", "unpack_rows_backward", "pack_rows_backward"):
        assert cost[name] == 1, name


@pytest.mark.parametrize("fill", ("representative", "nearest", "zero"))
def test_every_option_is_the_same_ops(fill: Any) -> None:
    layout = LAYOUTS["raster"][0]
    builder = fs.BSA(window=None, fill=fill, representative="medoid", threshold="mass")
    nodes = [n for n in call_graph(layout, layout, builder).graph.nodes if n.op == "call_function"]
    found = [n for n in nodes if isinstance(n.target, torch._ops.OpOverload) and n.target not in VIEWS]
    assert [named(n) for n in found] == ["tile_tokens", *CALL]


@pytest.mark.usefixtures("fresh_dynamo")
def test_training_neither_sorts_nor_scatters() -> None:
    x = torch.randn(1, GRID[0] * GRID[1] * GRID[2], Tiny().proj.in_features)
    with joint_graphs() as seen:
        _, call = run(Case(fs.BSA(kv_density=0.4), {"tile": TILE}), x)
    assert call.sparse and call.fused and call.lowered, call
    names = [str(getattr(target, "_schema", target)).split("(")[0] for target in seen.after[-1]]
    ops = [name.partition("::")[2].partition(".")[0] for name in names if "::" in name]
    for name in ("prune_queries", "pack_rows", "unpack_rows", "unpack_rows_backward", "pack_rows_backward"):
        assert ops.count(name) == 1, (name, ops)
    assert not [name for name in ops if name in SORTS or name.rstrip("_") in SCATTERS or name == "gather"]
