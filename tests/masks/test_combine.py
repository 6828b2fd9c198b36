"""Union, Intersection and PerHead are set operations on what their parts select."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, cases

import flexsparse as fs
from flexsparse.masks import MaskBuilder, StaticBuilder
from flexsparse.tile_bits import count_bits, pack_bits

VSA, TOP_P, WINDOW = fs.VSA(sparsity=0.7), fs.TopP(mass=0.4), fs.SlidingTile(window=(1, 2, 2))
BSA = fs.BSA(kv_density=0.3)


@given(cases(cross=True))
def test_unions_and_intersections_are_those_of_the_parts(case: Case) -> None:
    q, k, _ = case.qkv()

    def select(builder: MaskBuilder) -> fs.TileSelection:
        return builder.select(q, k, case.layout, kv_layout=case.kv_layout)

    for parts in ((VSA, WINDOW), (WINDOW, VSA, TOP_P), (WINDOW, fs.Dense()), (BSA, WINDOW), (VSA,)):
        masks = torch.stack([select(part).keep() for part in parts])
        for builder, expected in ((fs.Union(*parts), masks.any(0)), (fs.Intersection(*parts), masks.all(0))):
            selection = select(builder)
            assert torch.equal(selection.keep(), expected)
            assert torch.equal(selection.counts, expected.sum(-1, dtype=torch.int32))
            assert int(selection.counts.max()) <= selection.capacity <= case.kv_layout.num_tiles


@given(st.integers(1, 100), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_bits_are_counted_as_bools_are(tiles: int, seed: int, share: float) -> None:
    keep = torch.rand(3, tiles, generator=torch.Generator().manual_seed(seed)) < share
    assert torch.equal(count_bits(pack_bits(keep)), keep.sum(-1, dtype=torch.int32))


@given(cases())
def test_an_intersection_may_leave_rows_empty_and_its_lists_fit(case: Case) -> None:
    q, k, v = case.qkv()
    builder = fs.Intersection(VSA, WINDOW)
    selection = builder.select(q, k, case.layout)
    assert selection.kv_indices.shape[-1] == selection.capacity >= int(selection.counts.max())
    out = fs.sparse_attention(q, k, v, case.layout, builder, backend="gather")
    expected = fs.sparse_attention(q, k, v, case.layout, builder, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_a_combination_of_static_builders_is_static_and_may_restrict_a_dynamic_one() -> None:
    assert isinstance(fs.Union(WINDOW, fs.Radial()), StaticBuilder)
    assert isinstance(fs.VSA(top_k=1, within=fs.Intersection(WINDOW, fs.Dense())), fs.VSA)
    assert not isinstance(fs.Union(WINDOW, VSA), StaticBuilder)
    with pytest.raises(TypeError, match=r"VSA within is .*give a static builder"):
        fs.VSA(top_k=1, within=fs.Union(WINDOW, VSA))  # type: ignore[arg-type]


def test_query_pruning_and_the_coarse_output_come_from_the_part_that_has_them() -> None:
    layout = fs.TileLayout(grid=(2, 4, 8), tile=(2, 4, 4))
    q, k, v, gate = torch.randn(4, 1, 2, 64, 8).unbind()
    both = fs.Union(BSA, VSA)
    assert both.has_coarse
    _, aux = fs.sparse_attention(q, k, v, layout, both, gate=gate, return_aux=True)
    expected = BSA.select(q, k, layout).queries
    assert aux.selection.queries is not None and expected is not None
    assert torch.equal(aux.selection.queries.source, expected.source)
    _, alone = fs.sparse_attention(q, k, v, layout, VSA, return_aux=True)
    assert torch.equal(aux.coarse_out, alone.coarse_out)
    with pytest.raises(ValueError, match="2 builders that prune queries"):
        fs.Union(BSA, BSA).select(q, k, layout)


@given(cases())
def test_each_head_selects_with_its_own_builder(case: Case) -> None:
    q, k, v = case.qkv()
    parts = (WINDOW, VSA, TOP_P)
    heads = tuple(h % 3 for h in range(case.H))
    builder = fs.PerHead(builders=parts, heads=heads)
    out, aux = fs.sparse_attention(q, k, v, case.layout, builder, return_aux=True)
    for h, index in enumerate(heads):
        part, of_part = fs.sparse_attention(q, k, v, case.layout, parts[index], return_aux=True)
        assert torch.equal(aux.selection.keep()[:, h], of_part.selection.keep()[:, h])
        torch.testing.assert_close(out[:, h], part[:, h], rtol=1e-4, atol=1e-5)
        assert torch.equal(aux.selection.counts[:, h], of_part.selection.counts[:, h])
        assert aux.selection.capacity >= of_part.selection.capacity


def test_rows_of_a_builders_own_heads_alone_count_as_cut() -> None:
    layout = fs.TileLayout(grid=(4, 8, 8), tile=(2, 2, 4))
    q, k = torch.randn(2, 4, layout.seq_len, 8), torch.randn(2, 2, layout.seq_len, 8)  # grouped heads
    few = fs.TopP(mass=0.9, max_tiles=2)
    selection = fs.PerHead(builders=(VSA, few), heads=(0, 1, 0, 1)).select(q, k, layout)
    own = few.select(q[:, 1::2], k, layout)
    assert own.capped is not None and selection.capped is not None
    assert int(selection.capped) == int(own.capped) < int(few.select(q, k, layout).capped)  # type: ignore[arg-type]
    assert torch.equal(selection.keep()[:, 1::2], own.keep())


def test_a_builder_of_somebodys_own_plans_its_heads_alone() -> None:
    seen = []

    class Own(fs.VSA):
        def plan(self, coarse: Any, v: Any = None) -> Any:
            seen.append((coarse.q.shape[1], coarse.k.shape[1], None if v is None else v.shape[1]))
            return super().plan(coarse, v)

    layout = fs.TileLayout(grid=(4, 8, 8), tile=(2, 2, 4))
    q, k, v, gate = (torch.randn(1, heads, layout.seq_len, 8).requires_grad_() for heads in (4, 2, 2, 4))
    results = []
    for builder in (Own(sparsity=0.7), VSA):
        both = fs.PerHead(builders=(TOP_P, builder), heads=(1, 0, 1, 1))
        out = fs.sparse_attention(q, k, v, layout, both, gate=gate, backend="gather")
        results.append([out.detach(), *torch.autograd.grad(out.cos().sum(), (q, k, v, gate))])
    assert seen == [(3, 3, 3)]
    for own, ours in zip(*results, strict=True):
        torch.testing.assert_close(own, ours)


def test_heads_of_several_coarse_builders_share_one_coarse_output() -> None:
    layout = fs.TileLayout(grid=(2, 4, 8), tile=(2, 2, 2))
    q, k, v = torch.randn(3, 1, 2, 64, 8).unbind()
    builder = fs.PerHead(builders=(VSA, TOP_P), heads=(1, 0))
    assert builder.has_coarse and not fs.PerHead(builders=(VSA, WINDOW), heads=(1, 0)).has_coarse
    _, aux = fs.sparse_attention(q, k, v, layout, builder, return_aux=True)
    _, expected = fs.sparse_attention(q, k, v, layout, VSA, return_aux=True)
    torch.testing.assert_close(aux.coarse_out, expected.coarse_out)


def test_wrong_heads_are_refused() -> None:
    layout = fs.TileLayout(grid=(2, 4, 8), tile=(2, 2, 2))
    x = torch.randn(1, 2, 64, 8)
    with pytest.raises(ValueError, match=r"heads is \(0, 2\).*one of the 2 builders"):
        fs.PerHead(builders=(VSA, WINDOW), heads=(0, 2))
    with pytest.raises(ValueError, match="heads has 3 entries, but q has 2 heads"):
        fs.PerHead(builders=(VSA, WINDOW), heads=(0, 1, 0)).select(x, x, layout)
    with pytest.raises(ValueError, match="prunes queries"):
        fs.PerHead(builders=(BSA,), heads=(0, 0)).select(x, x, layout)
    with pytest.raises(TypeError, match="give mask builders"):
        fs.PerHead(builders=("vsa",), heads=(0,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Union has no builders"):
        fs.Union()
