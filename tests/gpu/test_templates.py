"""The Triton templates on a GPU: what the interpreter cannot show (bfloat16, barriers, races, real launches).

Everything here needs a CUDA device and is skipped without one.
"""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from tolerance import assert_as_good, assert_lse
from torch import Tensor

import flexsparse as fs
from flexsparse.compile_passes.templates import tuned
from flexsparse.compile_passes.templates.columns import most_pieces
from flexsparse.ops.choice import Rule, choose

from .fine_inputs import LYING, inputs, lying, on_gpu, selection_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FINE = ("fine_forward", "fine_backward", "attention_forward", "attention_training", "model_step")
COARSE = ("select", "attention_forward", "attention_training", "model_step")
LAYOUTS = {
    "whole tiles": fs.TileLayout(grid=(4, 8, 8), tile=(4, 4, 4)),
    "partial tiles and text": fs.TileLayout(grid=(5, 6, 9), tile=(4, 4, 4), text_first=3, text_last=70),
    "16 slots": fs.TileLayout(grid=(3, 7, 6), tile=(1, 4, 4)),
    "128 slots": fs.TileLayout(grid=(4, 9, 8), tile=(4, 8, 4)),
    "256 slots": fs.TileLayout(grid=(5, 9, 8), tile=(4, 8, 8)),
}


@pytest.mark.guards(*FINE)
@pytest.mark.parametrize("scale", [1.0, 4.0, 8.0, 16.0])
@pytest.mark.parametrize("D", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_output_and_gradients(name: str, dtype: torch.dtype, D: int, scale: float) -> None:
    layout, selection = LAYOUTS[name], selection_of(LAYOUTS[name])
    tensors = inputs(layout, dtype, D, scale)
    grad = (torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(5)) / scale).to(dtype)
    mask = oracle.token_mask(selection.keep(), layout)
    found = on_gpu(layout, tensors, selection, grad)

    def defined(precision: torch.dtype) -> tuple[list[Tensor], Tensor]:
        leaves = [x.to(precision).requires_grad_() for x in tensors]
        out, lse = oracle.attention(*leaves, mask, D**-0.5)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(precision))], lse.detach()

    (gold, lse), (reference, _) = defined(torch.float64), defined(dtype)
    noise = torch.finfo(torch.float32).eps * 4 * (1 + scale**2) * D**0.5
    for what, actual, same, exact in zip(("out", "dq", "dk", "dv"), found, reference, gold):
        assert_as_good(actual.cpu(), same, exact, f"{name} {dtype} D={D} {what}", noise)
    largest = float(tensors[0].double().norm(dim=-1).max() * tensors[1].double().norm(dim=-1).max() * D**-0.5)
    assert_lse(found[-1].cpu(), lse, largest)


@pytest.mark.guards(*FINE)
@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("D", [64, 128])
def test_lists_from_empty_to_all(D: int, share: float) -> None:
    """The last tile is kept by every row; and rows that keep nothing give 0 and take no gradient."""
    layout = fs.TileLayout(grid=(5, 9, 9), tile=(4, 4, 4))
    keep = selection_of(layout, share).keep()
    keep[..., -1] = share > 0  # a tile of one valid token, in every column's longest list
    selection = fs.TileSelection.from_mask(keep, layout)
    tensors = inputs(layout, torch.bfloat16, D, 4.0)
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    found = on_gpu(layout, tensors, selection, grad)
    mask = oracle.token_mask(keep, layout)

    def defined(precision: torch.dtype) -> list[Tensor]:
        leaves = [x.to(precision).requires_grad_() for x in tensors]
        out, _ = oracle.attention(*leaves, mask, D**-0.5)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(precision))]

    noise = torch.finfo(torch.float32).eps * 4 * 17 * D**0.5
    for what, actual, same, exact in zip(
        ("out", "dq", "dk", "dv"), found, defined(torch.bfloat16), defined(torch.float64)
    ):
        assert_as_good(actual.cpu(), same, exact, f"share {share} D={D} {what}", noise)
    if share == 0:
        assert not any(bool(x.any()) for x in found[:4]) and bool((found[4] == -math.inf).all())


@pytest.mark.guards(*FINE)
@pytest.mark.parametrize("slots", [64, 128])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_runs_agree_bit_for_bit(dtype: torch.dtype, D: int, slots: int) -> None:
    layout = fs.TileLayout(grid=(8, 32, 32), tile=(4, slots // 16, 4))
    tensors, selection = inputs(layout, dtype, D, 4.0, G=2), selection_of(layout, 0.15)
    grad = torch.randn(tensors[0].shape).to(dtype)
    first = on_gpu(layout, tensors, selection, grad)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, on_gpu(layout, tensors, selection, grad)))


@pytest.mark.guards(*FINE)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["partial tiles and text", "128 slots"])
def test_raster_order_and_tile_order_agree_bit_for_bit(
    name: str, dtype: torch.dtype, D: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows found by tables; heads lie inside of tokens, as in a model, and results lie where the inputs do."""
    layout = LAYOUTS[name]
    q, k, v = (x.cuda().transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(layout, dtype, D, 4.0))
    gate, grad = torch.randn_like(q), torch.randn_like(q)
    results = []
    for by_table in (True, False):
        monkeypatch.setattr(tuned, "finds_rows", lambda *case, by_table=by_table: by_table)
        leaves = [x.detach().requires_grad_() for x in (q, k, v, gate)]
        how = {"gate": leaves[3], "backend": "triton", "return_aux": True}
        out, aux = fs.sparse_attention(*leaves[:3], layout, fs.VSA(top_k=3), **how)
        results.append([out.detach(), aux.lse.detach(), *torch.autograd.grad(out, leaves[:3], grad)])
        assert not by_table or out.stride() == q.stride()
    for what, found, expected in zip(("out", "lse", "dq", "dk", "dv"), *results):
        assert torch.equal(found, expected), what


@pytest.mark.guards(*FINE)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("how", LYING)
def test_tensors_may_lie_anywhere(how: str, dtype: torch.dtype, D: int) -> None:
    """Slices of a projection, rows and pointers not aligned to 16 bytes, expanded heads: the bits of contiguous ones."""
    layout, builder = LAYOUTS["partial tiles and text"], fs.VSA(top_k=3)
    given = [lying(x.cuda(), how) for x in inputs(layout, dtype, D, 4.0, G=2)]
    gate, grad = (lying(torch.randn(given[0].shape, device="cuda").to(dtype), how) for _ in range(2))
    counts = torch.stack([layout.tile_counts, layout.tile_counts], -1).cuda()[..., 0]  # of every second place
    results = []
    for contiguous in (False, True):
        leaves = [(x.contiguous() if contiguous else x).detach().requires_grad_() for x in (*given, gate)]
        there = counts.contiguous() if contiguous else counts
        out, aux = fs.sparse_attention(
            *leaves[:3], layout, builder, gate=leaves[3], tile_counts=there, backend="triton", return_aux=True
        )
        back = grad.contiguous() if contiguous else grad
        results.append([out.detach(), aux.lse.detach(), *torch.autograd.grad(out, leaves, back)])
    for what, found, expected in zip(("out", "lse", "dq", "dk", "dv", "dgate"), *results, strict=True):
        assert torch.equal(found, expected), what


@pytest.mark.guards(*FINE)
@pytest.mark.parametrize("G", [1, 2])
@pytest.mark.parametrize("D", [64, 128])
def test_a_popular_tile_of_few_heads_is_split_and_stays_exact(D: int, G: int) -> None:
    """Its column is walked in pieces, whose sums are added in a fixed order."""
    layout = fs.TileLayout(grid=(8, 32, 32), tile=(4, 4, 4))
    tensors = inputs(layout, torch.bfloat16, D, 4.0, G=G)
    keep = selection_of(layout, 0.05).keep()[:, : tensors[0].shape[1]]
    keep[..., 5] = True
    selection = fs.TileSelection.from_mask(keep, layout)
    heads, tiles = tensors[0].shape[0] * G, layout.num_tiles
    group = tensors[0].shape[1] // G
    assert most_pieces(heads, 1, tiles, group * tiles * selection.capacity, group * tiles) > 0
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    first, again = (on_gpu(layout, tensors, selection, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    exact = [x.double().requires_grad_() for x in tensors]
    out = fs.sparse_attention(*exact, layout, selection, backend="gather")
    for what, found, wanted in zip(("dq", "dk", "dv"), first[1:4], torch.autograd.grad(out, exact, grad.double())):
        error = (found.cpu().double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert error < 0.02, f"{what}: {error:.3f}"


@pytest.mark.guards(*COARSE)
@pytest.mark.parametrize("M", [37, 640, 1440, 5000])
@pytest.mark.parametrize("rule", ["top_k", "sparsity", "normal", "probability", "mass", "all"])
def test_choice_of_tiles(rule: str, M: int) -> None:
    value = {"top_k": 9.0, "sparsity": 0.9, "normal": 0.1, "probability": 0.1, "mass": 0.5, "all": 0.0}[rule]
    scores = torch.randn(1, 3, 33, M, generator=torch.Generator().manual_seed(6))
    if rule in ("top_k", "sparsity"):
        scores = (scores * 8).round() / 8  # ties
    expected = choose(scores, None, Rule(name=rule, value=value), M)
    bits, counts, _ = torch.ops.flexsparse.select_tiles(scores.cuda(), None, None, rule, value, 1, M)
    off = (counts.cpu() - expected.counts).abs()
    assert float((off > 0).double().mean()) < 0.02 and int(off.max()) <= 1  # a score at a threshold may fall either way
    if rule in ("top_k", "sparsity", "all"):
        assert torch.equal(bits.cpu(), expected.bits)


@pytest.mark.guards(*COARSE)
def test_the_coarse_stage_and_its_gradients() -> None:
    layout = LAYOUTS["partial tiles and text"]
    results = []
    for device in ("cpu", "cuda"):
        q, k, v = (x.to(device).requires_grad_() for x in inputs(layout, torch.float32, 64, 1.0))
        gate = torch.full_like(q, 0.5)
        _, aux = fs.sparse_attention(q, k, v, layout, fs.VSA(top_k=3), gate=gate, return_aux=True)
        assert aux.coarse_out is not None
        grads = torch.autograd.grad(aux.coarse_out.sum(), (q, k, v))
        results.append([x.detach().cpu() for x in (aux.coarse_out, *grads, aux.selection.bits)])
    assert torch.equal(results[0][-1], results[1][-1])
    for a, b in zip(results[0][:-1], results[1][:-1]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
