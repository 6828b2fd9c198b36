"""Rows that keep nothing, KV tiles that hold nothing: output 0, log-sum-exp -inf, gradient 0, and never a NaN."""

import math

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, cases
from tolerance import assert_lse

import flexsparse as fs

pytestmark = pytest.mark.usefixtures("poisoned")
BACKENDS = ("reference", "gather")


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    case=cases(dtypes=(torch.float32, torch.bfloat16), text=False, cross=True),
    share=st.sampled_from((0.0, 0.2)),
)
def test_a_row_without_tiles_is_zero(backend: str, case: Case, share: float) -> None:
    keep = case.keep(share, empty=True)
    selection = fs.TileSelection.from_mask(keep, case.layout, case.kv_layout)
    q, k, v = (x.requires_grad_() for x in case.qkv())
    out, aux = fs.sparse_attention(
        q, k, v, case.layout, selection, kv_layout=case.kv_layout, backend=backend, return_aux=True
    )
    seen = oracle.token_mask(keep, case.layout, case.kv_layout).any(-1)
    assert bool((out[~seen] == 0).all()) and bool((aux.lse[~seen] == -math.inf).all())
    assert bool(aux.lse[seen].isfinite().all())
    dq, dk, dv = torch.autograd.grad(out.sum() + aux.lse[seen].sum(), (q, k, v))
    assert bool((dq[~seen] == 0).all())
    assert all(bool(x.isfinite().all()) for x in (dq, dk, dv))


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(dtypes=(torch.float64,)), seed=st.integers(0, 99))
def test_tokens_past_a_count_are_never_read(backend: str, case: Case, seed: int) -> None:
    layout = case.layout
    generator = torch.Generator().manual_seed(seed)
    most = torch.tensor(oracle.counts(layout))
    counts = (torch.rand(case.B, len(most), generator=generator) * 1.5 - 0.2).clamp(0, 1) * most
    counts = counts.round().to(torch.int32)
    keep = case.keep()
    mask = oracle.token_mask(keep, layout, tile_counts=counts)
    dead = (
        torch.tensor([place.slot for place in oracle.places(layout)])
        >= counts[:, torch.tensor([place.tile for place in oracle.places(layout)])]
    )
    q, k, v = case.qkv()
    k, v = (x.masked_fill(dead[:, None, :, None], math.nan) for x in (k, v))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    g = case.randn(case.H, layout, 8)
    expected, lse = oracle.attention(q, k, v, mask, case.D**-0.5)
    wanted = torch.autograd.grad(expected, (q, k, v), g)
    selection = fs.TileSelection.from_mask(keep, layout)
    out, aux = fs.sparse_attention(q, k, v, layout, selection, tile_counts=counts, backend=backend, return_aux=True)
    torch.testing.assert_close(out, expected)
    assert_lse(aux.lse, lse, 100)
    for name, actual, exact in zip("qkv", torch.autograd.grad(out, (q, k, v), g), wanted):
        torch.testing.assert_close(actual, exact.nan_to_num(0), msg=lambda text, name=name: f"d{name}: {text}")
    computed = (mask & ~dead[:, None, :, None]).double().sum()
    valid = case.H * (~dead).sum(-1).double().square().sum()
    assert valid == 0 or aux.density == pytest.approx(float(computed / valid), rel=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("VSA", "TopP", "BSA", "BSA, pruned", "SlidingTile", "own"))
def test_every_builder_leaves_out_what_the_counts_leave_out(name: str, backend: str) -> None:
    """Two samples with texts and videos of different lengths equal each alone, cut to its length."""

    class Own:
        def select(self, q, k, layout, kv_layout=None, scale=None):  # type: ignore[no-untyped-def]
            return fs.Dense().select(q, k, layout, kv_layout=kv_layout)

    builder = {
        "VSA": fs.VSA(top_k=2),
        "TopP": fs.TopP(mass=0.6),
        "BSA": fs.BSA(keep_queries=1, kv_density=0.5),
        "BSA, pruned": fs.BSA(keep_queries=0.5, kv_density=0.5),
        "SlidingTile": fs.SlidingTile(window=(1, 1, 3)),
        "own": Own(),
    }[name]
    layout = fs.TileLayout(grid=(1, 4, 16), tile=(1, 4, 4), text_last=20)
    q, k, v = torch.randn(3, 2, 2, 84, 8, dtype=torch.float64).unbind()
    counts = torch.tensor([[16, 16, 16, 16, 16, 4], [16, 16, 16, 0, 3, 0]], dtype=torch.int32)
    dirty_k, dirty_v = k.clone(), v.clone()
    short = [token for token, (tile, slot) in enumerate(oracle.places(layout)) if slot >= counts[1, tile]]
    dirty_k[1, :, short] = dirty_v[1, :, short] = math.nan
    out = fs.sparse_attention(q, dirty_k, dirty_v, layout, builder, tile_counts=counts, backend=backend)
    whole = fs.sparse_attention(q[:1], k[:1], v[:1], layout, builder, backend=backend)
    torch.testing.assert_close(out[:1], whole)
    if name == "own":
        mask = (torch.arange(84)[:, None] >= 0) & ~torch.isin(torch.arange(84), torch.tensor(short))
        expected, _ = oracle.attention(q[1:], k[1:], v[1:], mask.expand(1, 2, 84, 84), 8**-0.5)
    else:
        cut = fs.TileLayout(grid=(1, 4, 12), tile=(1, 4, 4), text_last=3)
        rows = [*(h * 16 + w for h in range(4) for w in range(12)), 64, 65, 66]
        expected = fs.sparse_attention(*(x[1:, :, rows] for x in (q, k, v)), cut, builder, backend=backend)
        out = out[:, :, rows]
        if name == "SlidingTile":  # near the end of the longer video windows differ
            near = [row for row, token in enumerate(rows) if token >= 64 or token % 16 < 8]
            out, expected = out[:, :, near], expected[:, :, near]
    torch.testing.assert_close(out[1:], expected)


def test_counts_given_to_a_selection_that_has_others_are_the_ones_used() -> None:
    layout = fs.TileLayout(grid=(1, 4, 8), tile=(1, 4, 4))
    q, k, v = torch.randn(3, 1, 1, 32, 8).unbind()
    first, second = (torch.tensor(x, dtype=torch.int32) for x in ([16, 9], [16, 2]))
    selection = fs.Dense().select(q, k, layout, tile_counts=first)
    out = fs.sparse_attention(q, k, v, layout, selection, tile_counts=second)
    torch.testing.assert_close(out, fs.sparse_attention(q, k, v, layout, fs.Dense(), tile_counts=second))
    kept = fs.sparse_attention(q, k, v, layout, selection)
    torch.testing.assert_close(kept, fs.sparse_attention(q, k, v, layout, fs.Dense(), tile_counts=first))
