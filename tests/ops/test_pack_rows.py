"""Packing and unpacking against plain gathers and their autograd, with gradients checked by finite differences."""

from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.ops.pack_rows import pack_rows, pack_rows_backward, unpack_rows, unpack_rows_backward
from flexsparse.packing import pack_queries, unpack_lse
from flexsparse.packing import unpack_rows as unpack

pytestmark = pytest.mark.usefixtures("poisoned")
ops = torch.ops.flexsparse
SCHEMAS = {
    "pack_rows": "(Tensor x, Tensor kept, Tensor counts, Tensor position, Tensor tokens, Tensor? slots, SymInt first_rows, "
    "SymInt last_rows, bool inside) -> Tensor",
    "pack_rows_backward": "(Tensor grad, Tensor kept, Tensor position, Tensor tokens, SymInt first_rows, bool tiled, "
    "bool inside) -> Tensor",
    "unpack_rows": "(Tensor rows, Tensor position, Tensor tokens, SymInt first_rows, SymInt last_rows, SymInt query_rows, "
    "float fill, bool inside) -> Tensor",
    "unpack_rows_backward": "(Tensor grad, Tensor position, Tensor tokens, SymInt length, SymInt first_rows, "
    "SymInt last_rows, SymInt query_rows) -> Tensor",
}
LAYOUTS = {
    "partial tiles and text": fs.TileLayout(grid=(3, 4, 5), tile=(2, 3, 3), text_first=5, text_last=34),
    "full tiles": fs.TileLayout(grid=(2, 4, 8), tile=(2, 2, 4)),
    "tile order": fs.TileLayout(grid=(2, 4, 8), tile=(2, 2, 4), order="tiles"),
    "one token": fs.TileLayout(grid=(1, 1, 1)),
}
FILLS = ("representative", "nearest", "zero")


def chosen(layout: fs.TileLayout, fill: Any = "representative") -> fs.TileSelection:
    q = torch.randn(2, 2, layout.seq_len, 4, dtype=torch.float64)
    return fs.BSA(keep_queries=0.4, fill=fill, kv_density=0.5).select(q, q, layout)


def tables(selection: fs.TileSelection, tiled: bool = False) -> dict[str, Any]:
    """Arguments of both ops by name."""
    layout, queries = selection.layout, selection.queries
    assert queries is not None
    tokens, slots, _ = layout.index()
    found = {"kept": queries.kept, "counts": queries.counts, "position": queries.position, "tokens": tokens}
    found |= {"slots": slots if tiled else None, "query_rows": queries.packed}
    return found | {"first_rows": layout.tiles_first * layout.slots, "last_rows": layout.tiles_last * layout.slots}


def pack(x: Tensor, given: dict[str, Any], inside: bool = False) -> Tensor:
    names = ("kept", "counts", "position", "tokens", "slots", "first_rows", "last_rows")
    return ops.pack_rows(x, *(given[name] for name in names), inside)


def back(rows: Tensor, given: dict[str, Any], fill: float = 0.0, inside: bool = False) -> Tensor:
    names = ("position", "tokens", "first_rows", "last_rows", "query_rows")
    return ops.unpack_rows(rows, *(given[name] for name in names), fill, inside)


def rows_of(selection: fs.TileSelection) -> int:
    layout = selection.layout
    return layout.padded_len - layout.num_tiles * (layout.slots - selection.query_rows)


def gathered(x: Tensor, index: Tensor, fill: float = 0.0) -> Tensor:
    """The definition: `torch.gather`, with torch's own gradient."""
    where = index.long()[..., None].expand(*index.shape, x.shape[-1])
    return x.gather(2, where.clamp_min(0)).masked_fill(where < 0, fill)


def packed_tokens(selection: fs.TileSelection) -> Tensor:
    """The token of every computed row, -1 for zeros."""
    given, queries = tables(selection), selection.queries
    assert queries is not None
    past = torch.arange(queries.packed) >= queries.counts[:, None]
    video = queries.kept.masked_fill(past, -1).flatten(2)
    ends = [given["tokens"][: given["first_rows"]], given["tokens"][len(given["tokens"]) - given["last_rows"] :]]
    first, last = (end.expand(*video.shape[:2], -1) for end in ends)
    return torch.cat([first, video, last], -1)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_is_frozen(name: str) -> None:
    assert str(getattr(ops, name).default._schema) == f"flexsparse::{name}{SCHEMAS[name]}"


@pytest.mark.parametrize("tiled", (False, True), ids=("raster", "tiles"))
def test_the_ops_keep_their_promises_to_the_compiler(tiled: bool) -> None:
    layout = LAYOUTS["partial tiles and text"]
    selection = chosen(layout, "zero")
    given = tables(selection, tiled)
    x = torch.randn(2, 2, layout.padded_len if tiled else layout.seq_len, 4, requires_grad=True)
    rows = torch.randn(2, 2, rows_of(selection), 4, requires_grad=True)
    fields = (given["kept"], given["counts"], given["position"], given["tokens"], given["slots"])
    ends = (given["first_rows"], given["last_rows"])
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")

    def check(op: Any, *arguments: Any, tests: tuple[str, ...] = every) -> None:
        torch.library.opcheck(op, arguments, test_utils=tests)

    plain = tuple(test for test in every if "autograd" not in test)
    for inside in (False, True):
        check(pack_rows, x, *fields, *ends, inside)
        check(unpack_rows, rows, given["position"], given["tokens"], *ends, selection.query_rows, 0.0, inside)
        check(
            pack_rows_backward,
            *(rows.detach(), given["kept"], given["position"], given["tokens"], ends[0], tiled, inside),
            tests=plain,
        )
    grad = torch.randn(2, 2, layout.seq_len, 4)
    sizes = (rows.shape[2], *ends, selection.query_rows)
    check(unpack_rows_backward, grad, given["position"], given["tokens"], *sizes, tests=plain)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_they_are_the_gathers_that_they_say_and_so_are_their_gradients(name: str, fill: str) -> None:
    layout = LAYOUTS[name]
    selection = chosen(layout, fill)
    given = tables(selection)
    x = torch.randn(2, 2, layout.seq_len, 3, dtype=torch.float64, requires_grad=True)
    rows, expected = pack(x, given), gathered(x, packed_tokens(selection))
    assert torch.equal(rows, expected) and rows.is_contiguous()
    # rows that the way back reads: those past a count take no gradient
    weights = torch.randn_like(rows)
    read = torch.zeros_like(rows[..., 0], dtype=torch.bool)
    for b, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
        position = given["position"][b, h].long()
        read[b, h, position[position >= 0]] = True
    (mine,), (theirs,) = (torch.autograd.grad((y * weights)[read].sum(), x) for y in (rows, expected))
    assert torch.equal(mine, theirs)

    computed = rows.detach().requires_grad_()
    for value in (0.0, 3.0):
        out, wanted = back(computed, given, value), gathered(computed, given["position"], value)
        assert torch.equal(out, wanted)
        g = torch.randn_like(out)
        (mine,), (theirs,) = (torch.autograd.grad(y, computed, g) for y in (out, wanted))
        torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=1e-14)


def test_tile_order_gives_the_same_rows_and_the_gradient_in_tile_order() -> None:
    layout = LAYOUTS["partial tiles and text"]
    selection = chosen(layout)
    x = torch.randn(2, 2, layout.seq_len, 3, dtype=torch.float64, requires_grad=True)
    tiles = layout.to_tiles(x).detach().requires_grad_()
    raster, tiled = pack(x, tables(selection)), pack(tiles, tables(selection, tiled=True))
    assert torch.equal(raster, tiled)
    g = torch.randn_like(raster)
    (of_raster,), (of_tiles,) = torch.autograd.grad(raster, x, g), torch.autograd.grad(tiled, tiles, g)
    assert torch.equal(layout.to_tiles(of_raster), of_tiles)


@pytest.mark.parametrize("tiled", (False, True), ids=("raster", "tiles"))
@pytest.mark.parametrize("fill", FILLS)
def test_finite_differences_agree(fill: str, tiled: bool) -> None:
    layout = fs.TileLayout(grid=(2, 2, 5), tile=(2, 2, 2), text_first=2)
    q = torch.randn(1, 1, layout.seq_len, 2, dtype=torch.float64)
    given = tables(fs.BSA(keep_queries=0.4, fill=fill, kv_density=0.5).select(q, q, layout), tiled)  # type: ignore[arg-type]
    x = (layout.to_tiles(q) if tiled else q).detach().requires_grad_()

    def there_and_back(x: Tensor) -> Tensor:
        return back(pack(x, given).square(), given)

    assert torch.autograd.gradcheck(there_and_back, (x,), fast_mode=True)


@pytest.mark.parametrize("inside", (False, True))
def test_heads_lie_where_they_are_asked_for(inside: bool) -> None:
    selection = chosen(LAYOUTS["full tiles"])
    given = tables(selection)
    x = torch.randn(2, 64, 2, 3).transpose(1, 2).requires_grad_()
    rows = pack(x, given, inside)
    out = back(rows, given, inside=inside)
    assert rows.is_contiguous()
    lies = (64 * 2 * 3, 3, 2 * 3, 1) if inside else (64 * 2 * 3, 64 * 3, 3, 1)
    assert out.stride() == lies
    g = torch.randn(2, 2, rows.shape[2], 3)
    fields = (given["kept"], given["position"], given["tokens"], given["first_rows"], False, inside)
    assert ops.pack_rows_backward(g, *fields).stride() == lies
    plain = back(pack(x, given), given)
    assert torch.equal(out, plain)
    (mine,), (theirs,) = (torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True) for y in (out, plain))
    assert torch.equal(mine, theirs)


def test_sums_of_a_low_precision_gradient_are_float32() -> None:
    layout = fs.TileLayout(grid=(4, 4, 4))
    q = torch.ones(1, 1, 64, 2)
    given = tables(fs.BSA(keep_queries=0.01, window=None, kv_density=1).select(q, q, layout))
    g = torch.full((1, 1, 64, 2), 1 / 256).bfloat16()
    g[..., 0, :] = 1.0
    sizes = (16, 0, 0, 16)
    found = ops.unpack_rows_backward(g, given["position"], given["tokens"], *sizes)
    assert float(found[0, 0, 0, 0]) == float(torch.tensor(1 + 63 / 256).bfloat16())  # in bfloat16 it would stay 1
    assert bool((found[0, 0, 1:] == 0).all())


def test_a_nan_of_a_pruned_or_padding_row_stays_where_it_is() -> None:
    selection = chosen(LAYOUTS["partial tiles and text"])
    given, queries = tables(selection), selection.queries
    assert queries is not None
    x = torch.randn(2, 2, selection.layout.seq_len, 3)
    pruned = queries.source != torch.arange(selection.layout.seq_len)
    x[pruned] = float("nan")
    rows = pack(x, given)
    assert bool(rows.isfinite().all())
    unread = torch.ones(rows.shape[:3], dtype=torch.bool)
    for b, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
        unread[b, h, queries.position[b, h].long()] = False
    rows[unread] = float("nan")
    assert bool(back(rows, given).isfinite().all()) and bool(unread.any())


def test_the_log_sum_exp_of_a_token_without_a_source_is_minus_infinity() -> None:
    layout = LAYOUTS["full tiles"]
    selection = chosen(layout, "zero")
    assert selection.queries is not None
    lse = torch.randn(2, 2, rows_of(selection))
    found = unpack_lse(lse, selection)
    without = selection.queries.position < 0
    assert bool((found[without] == -torch.inf).all()) and torch.equal(
        found[~without], gathered(lse[..., None], selection.queries.position)[..., 0][~without]
    )
    q = torch.randn(2, 2, layout.seq_len, 4)
    assert unpack(pack_queries(q, None, selection), selection)[~without].equal(
        gathered(q, selection.queries.source)[~without]
    )
