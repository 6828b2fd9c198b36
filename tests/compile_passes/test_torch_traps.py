"""What torch does that the library works around. A test here that fails says which workaround may go.

Verified on torch 2.13; 2.11 and 2.12 have the same sources at these places.
"""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import flexsparse as fs
from flexsparse.backends import flex
from flexsparse.block_lists import block_lists
from flexsparse.selection import TileSelection

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.filterwarnings("ignore")]

LAYOUT = fs.TileLayout(grid=(2, 8, 8), tile=(2, 2, 4))
N = LAYOUT.num_tiles


def mended(trap: str, workaround: str) -> NoReturn:
    pytest.fail(f"torch {torch.__version__} no longer {trap}: {workaround}; then this test may go")


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def qkv(heads: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 1, heads, LAYOUT.seq_len, 16).unbind()  # type: ignore[return-value]


def dense(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Attention over the pairs of a mask ``[S, S]``."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


# a captured scatter


@pytest.mark.slow
def test_flex_attention_reads_a_captured_scatter_from_before_it_was_written() -> None:
    """Inductor inlines the zeros into score_mod or mask_mod: wrong numbers, no word."""
    q, k, v = qkv()
    index = torch.arange(0, LAYOUT.seq_len, 2)

    def captured(index: Tensor) -> Tensor:
        return torch.zeros(LAYOUT.seq_len).scatter(0, index, 1.0)

    def attend(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
        keep = captured(index)
        return flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score - 1e4 * (1 - keep[j]))

    with torch.no_grad():
        found = torch.compile(attend, fullgraph=True, dynamic=False)(q, k, v, index)
        right = dense(q, k, v, (captured(index) > 0).expand(LAYOUT.seq_len, -1))
    if error(found, right) < 1e-3:
        mended("miscompiles a captured scatter", "`flexsparse::block_lists` need not be opaque")


def test_lists_of_a_selection_scattered_in_the_same_graph_are_read_after_it() -> None:
    q, k, v = qkv(2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tiles = [LAYOUT.video(LAYOUT.to_tiles(x)).mean(3) for x in (q, k)]
        scores = tiles[0] @ tiles[1].mT
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(3).indices, True)
        return fs.sparse_attention(q, k, v, LAYOUT, TileSelection.from_mask(keep, LAYOUT), backend="flex")

    with torch.no_grad():
        found = torch.compile(attend, fullgraph=True, dynamic=False)(q, k, v)
        selection = fs.VSA(top_k=3).select(q, k, LAYOUT)
        right, _ = oracle.attention(q, k, v, oracle.token_mask(selection.keep(), LAYOUT), 16**-0.5)
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)


# lists, uncompiled


def some_selection(heads: int = 1) -> TileSelection:
    keep = (torch.rand(1, heads, N, N) < 0.4) | torch.eye(N, dtype=torch.bool)
    return TileSelection.from_mask(keep, LAYOUT)


def test_uncompiled_flex_attention_ignores_the_lists() -> None:
    selection, (q, k, v) = some_selection(), qkv()
    lists = block_lists(selection)
    size = LAYOUT.slots
    mask = BlockMask.from_kv_blocks(
        lists.partial_num, lists.partial_indices, lists.full_num, lists.full_indices, BLOCK_SIZE=(size, size)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = flex_attention(q, k, v, block_mask=mask)
    if error(found, dense(q, k, v, torch.ones(LAYOUT.seq_len, LAYOUT.seq_len).bool())) > 1e-4:
        mended("ignores the lists uncompiled", "`TileSelection.to_block_mask` needs no mask_mod for whole tiles")


def test_a_selections_block_mask_is_right_uncompiled() -> None:
    selection, (q, k, v) = some_selection(), qkv()
    tiles = [LAYOUT.to_tiles(x).contiguous() for x in (q, k, v)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = LAYOUT.to_raster(flex_attention(*tiles, block_mask=selection.to_block_mask()))
    right, _ = oracle.attention(q, k, v, oracle.token_mask(selection.keep(), LAYOUT), 16**-0.5)
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)


# strides of lists


@pytest.mark.parametrize(
    "layout",
    (
        LAYOUT,
        fs.TileLayout(grid=(3, 5, 4), tile=(2, 2, 4)),
        fs.TileLayout(grid=(2, 4, 4), tile=(2, 2, 4), text_last=40),
    ),
    ids=("whole tiles", "partial tiles", "text"),
)
def test_full_lists_have_the_shape_and_strides_of_partial_ones(layout: fs.TileLayout) -> None:
    """torch 2.11 walks the full lists with the strides of the partial ones; none may be an expanded view either."""
    n = layout.num_tiles
    for keep in (torch.rand(2, 2, n, n) < 0.5, torch.ones(1, 1, n, n, dtype=torch.bool).expand(2, 2, n, n)):
        lists = block_lists(TileSelection.from_mask(keep, layout))
        assert lists.full_indices.shape == lists.partial_indices.shape == (2, 2, layout.total_tiles, layout.total_tiles)
        assert lists.full_num.shape == lists.partial_num.shape
        assert lists.full_indices.stride() == lists.partial_indices.stride()
        tensors = [x for x in lists if isinstance(x, Tensor)]
        assert all(x.is_contiguous() for x in tensors)
        assert len({x.untyped_storage().data_ptr() for x in tensors}) == len(tensors), "lists share memory"


# views


def shuffled(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads split off after a gather of tokens: a view of the gather's rank-3 result."""
    order = torch.arange(x.shape[1]).flip(0)
    return tuple(y.index_select(1, order).view(1, -1, 2, 16).transpose(1, 2) for y in x.chunk(3, -1))  # type: ignore[return-value]


def copied(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A contiguous view of a rank-5 copy."""
    blocks = (y.reshape(1, 8, -1, 2, 16).permute(0, 3, 1, 2, 4).contiguous() for y in x.chunk(3, -1))
    return tuple(y.view(1, 2, -1, 16) for y in blocks)  # type: ignore[return-value]


def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads split off a fused projection: not contiguous."""
    return x.view(1, -1, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[return-value]


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 lowers them")
def test_flex_attention_does_not_lower_views_of_other_ranks_on_cpu() -> None:
    def attend(x: Tensor) -> Tensor:
        return flex_attention(*shuffled(x))

    x = torch.randn(1, LAYOUT.seq_len, 96)
    try:
        with torch.no_grad():
            found = torch.compile(attend, fullgraph=True, dynamic=False)(x)
    except Exception as refused:
        assert "to unpack" in str(refused), refused
        return
    right = error(found, F.scaled_dot_product_attention(*shuffled(x))) < 1e-4
    if right and not torch.__version__.startswith("2.12"):  # which does, between two that do not
        mended("fails on views of other ranks", "`backends.flex.attend` need not make k and v contiguous")


@pytest.mark.parametrize("made", (shuffled, copied, split))
def test_the_flex_backend_takes_views_of_any_rank_and_strides(made: Any) -> None:
    selection, x = some_selection(2), torch.randn(1, LAYOUT.seq_len, 96)
    right, _ = oracle.attention(*made(x), oracle.token_mask(selection.keep(), LAYOUT), 16**-0.5)

    def attend(x: Tensor) -> Tensor:
        return fs.sparse_attention(*made(x), LAYOUT, selection, backend="flex")

    with torch.no_grad():
        torch.testing.assert_close(attend(x), right, atol=1e-5, rtol=1e-4)
        compiled = torch.compile(attend, fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(x), right, atol=1e-5, rtol=1e-4)


def innermost(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads innermost, brought to their place by something that Inductor fuses."""
    return tuple(1.5 * y.unflatten(-1, (16, 2)).permute(0, 3, 1, 2) for y in x.chunk(3, -1))  # type: ignore[return-value]


def test_flex_attention_misreads_what_inductor_writes_heads_innermost() -> None:
    """Its kernel for the CPU takes channels one after another, and asks for that before it is settled how they lie."""

    def attend(x: Tensor) -> Tensor:
        return flex_attention(*innermost(x))

    x = torch.randn(1, LAYOUT.seq_len, 96)
    with torch.no_grad():
        found = torch.compile(attend, fullgraph=True, dynamic=False)(x)
    if error(found, F.scaled_dot_product_attention(*innermost(x))) < 1e-4:
        mended("misreads them", "`ShareOperands` need not settle how FlexAttention's operands lie")


@pytest.mark.parametrize("made", (innermost, lambda x: tuple(y.contiguous() for y in innermost(x))))
def test_heads_innermost_are_read_right(made: Any) -> None:
    """In low precision, where a graph of ours has stock FlexAttention on a CPU; tokens kept in tile order are not gathered."""
    x, linear = torch.randn(1, LAYOUT.seq_len, 32).bfloat16(), nn.Linear(32, 96).bfloat16()
    backend = fs.backend(fs.Dense(), grid=LAYOUT.grid, tile=LAYOUT.tile)

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*made(linear(x)))

    with torch.no_grad():
        found = torch.compile(attend, backend=backend, fullgraph=True, dynamic=False)(x)
        torch.testing.assert_close(found, attend(x), atol=2e-2, rtol=0)
    assert [call.backend for call in backend.report().calls] == ["flex"]


# a backward of one's own


def test_make_fx_loses_the_backward_of_a_function_that_it_traces_before_autograd() -> None:
    class Sevenfold(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return grad * 7

    x = torch.ones(3)
    traced = make_fx(lambda x: Sevenfold.apply(x), pre_dispatch=True)(x)
    (gradient,) = torch.autograd.grad(traced(x.requires_grad_()).sum(), x)
    if float(gradient[0]) == 7:
        mended("loses it", "`UnfoldAttention` may trace tiling together with the coarse stage")


# gradients on CPU


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("compiled", (False, True), ids=("uncompiled", "compiled"))
def test_flex_attention_refuses_gradients_on_cpu(compiled: bool) -> None:
    inputs = [x.requires_grad_() for x in qkv()]
    run: Any = torch.compile(flex_attention, backend="aot_eager") if compiled else flex_attention
    try:
        run(*inputs).sum().backward()
    except Exception as refused:
        assert "does not support backward on CPU" in str(refused), refused
        return
    mended("refuses gradients on CPU", "`backends.flex.refusal` may let FlexAttention train there")


def test_a_compiled_graph_trains_on_cpu_all_the_same() -> None:
    assert flex.refusal("cpu", torch.float32, gradients=True, lse=False, dynamic=False) is not None
    gradients = []
    x = torch.randn(1, LAYOUT.seq_len, 16)
    for compiled in (True, False):
        torch.manual_seed(0)
        model = Tiny()
        backend = fs.backend(fs.VSA(top_k=3), grid=LAYOUT.grid, tile=LAYOUT.tile)
        if compiled:
            out = torch.compile(model, backend=backend, fullgraph=True)(x)
            (call,) = backend.report().calls
            assert call.sparse and call.lowered, call
        else:
            options: dict[str, Any] = {"compile": False, "attention": "reference"}
            out = fs.wrap(nn.Sequential(model), fs.VSA(top_k=3), grid=LAYOUT.grid, tile=LAYOUT.tile, **options)(x)
        gradients.append(torch.autograd.grad(out.square().sum(), list(model.parameters())))
    for mine, other in zip(*gradients):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)
