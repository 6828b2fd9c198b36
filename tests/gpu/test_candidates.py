"""Every configuration that tuning may choose, on a GPU: the same results as the oracle, from run to run the same bits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import torch
from tolerance import assert_as_good, assert_lse
from torch import Tensor

import flexsparse as fs
from flexsparse.ops import has_triton

from .fine_inputs import inputs, on_gpu, selection_of, to

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.guards("fine_forward", "fine_backward", "attention_forward", "attention_training", "model_step"),
]
LAYOUTS = {
    64: (
        fs.TileLayout(grid=(8, 8, 8), tile=(4, 4, 4)),
        fs.TileLayout(grid=(5, 6, 9), tile=(4, 4, 4), text_first=3, text_last=70),
        fs.TileLayout(grid=(7, 6, 9), tile=(3, 5, 4)),
        fs.TileLayout(grid=(20, 8, 12), tile=(4, 4, 4)),
    ),
    128: (
        fs.TileLayout(grid=(8, 8, 8), tile=(4, 8, 4)),
        fs.TileLayout(grid=(5, 9, 7), tile=(4, 8, 4), text_last=70),
        fs.TileLayout(grid=(5, 9, 7), tile=(5, 5, 5)),
    ),
}


def arch() -> str:
    """Of this GPU, as the table names it."""
    if not torch.cuda.is_available():
        return "none"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def candidates(
    ops: Sequence[str] = ("forward", "dq", "dkdv"),
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16),
    tiles: Sequence[int] = (64, 128),
    defaults: bool = True,
) -> list[object]:
    """Candidates as parameters: dtype, D, slots, choice. One that is no default guards itself alone: nothing takes it yet."""
    if not torch.cuda.is_available() or not has_triton():
        return []
    from flexsparse.compile_passes.templates import tuned

    return [
        pytest.param(
            dtype,
            D,
            slots,
            choice,
            id=f"{str(dtype)[6:]}-D{D}-{slots}-{op}-{number}-{choice.kernel}",
            marks=pytest.mark.guards() if number else (),
        )
        for dtype in dtypes
        for D in (128, 64)
        for slots in tiles
        for op in ops
        for number, choice in enumerate(tuned.candidates(arch(), dtype, D, slots, slots, op))
        if defaults or number
    ]


def truth(
    tensors: list[Tensor], layout: fs.TileLayout, selection: fs.TileSelection, grad: Tensor, precision: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Output and gradients, and log-sum-exp."""
    leaves = [x.to(precision).requires_grad_() for x in tensors]
    mask = oracle.token_mask(selection.keep(), layout)
    out, lse = oracle.attention(*leaves, mask, tensors[0].shape[-1] ** -0.5)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(precision))], lse.detach()


@dataclass(frozen=True)
class Problem:
    """Inputs and what must come of them."""

    selection: fs.TileSelection
    tensors: list[Tensor]
    grad: Tensor
    reference: list[Tensor]
    gold: list[Tensor]
    lse: Tensor


@functools.lru_cache(64)
def problem(layout: fs.TileLayout, dtype: torch.dtype, D: int, scale: float) -> Problem:
    """The same for all candidates: computed once a process, as it takes longer than they do."""
    selection, tensors = selection_of(layout), inputs(layout, dtype, D, scale)
    grad = (torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(5)) / scale).to(dtype)
    gold, lse = truth(tensors, layout, selection, grad, torch.float64)
    reference, _ = truth(tensors, layout, selection, grad, dtype)
    return Problem(selection, tensors, grad, reference, gold, lse)


@pytest.mark.parametrize("dtype, D, slots, choice", candidates())
def test_a_candidate_computes_the_same(dtype: torch.dtype, D: int, slots: int, choice: Any) -> None:
    from flexsparse.compile_passes.templates import tuned

    for layout in LAYOUTS[slots]:
        for scale in (1.0, 8.0, 16.0):
            one = problem(layout, dtype, D, scale)
            with tuned.using(choice):
                found = on_gpu(layout, one.tensors, one.selection, one.grad)
                again = on_gpu(layout, one.tensors, one.selection, one.grad)
            assert all(torch.equal(a, b) for a, b in zip(found, again)), f"{layout.grid}: two runs differ"
            noise = torch.finfo(torch.float32).eps * 4 * (1 + scale**2) * D**0.5
            for what, actual, same, exact in zip(("out", "dq", "dk", "dv"), found, one.reference, one.gold):
                assert_as_good(actual.cpu(), same, exact, f"{choice} {layout.grid} scale {scale} {what}", noise)
            norms = [float(x.double().norm(dim=-1).max()) for x in one.tensors[:2]]
            assert_lse(found[-1].cpu(), one.lse, norms[0] * norms[1] * D**-0.5)


@pytest.mark.parametrize("heads", [12, 3])
@pytest.mark.parametrize("dtype, D, slots, choice", candidates(("dq", "dkdv"), (torch.bfloat16,), defaults=False))
def test_many_tiles_agree_in_backward(dtype: torch.dtype, D: int, slots: int, choice: Any, heads: int) -> None:
    """As below, for dq and dkdv; with shared KV heads, and with a tile that every row keeps: its column is split."""
    from flexsparse.compile_passes.templates import tuned

    layout = fs.TileLayout(grid=(8, 32, 32), tile=(4, 4, 4) if slots == 64 else (4, 8, 4), text_last=70)
    q, k, v = (
        torch.randn(1, n, layout.seq_len, D, device="cuda", dtype=dtype).requires_grad_() for n in (12, heads, heads)
    )
    keep = torch.rand(1, 12, layout.num_tiles, layout.num_tiles) < 0.1
    keep[..., 5] = True
    selection = to(fs.TileSelection.from_mask(keep, layout), "cuda")
    grad = torch.randn_like(q)
    out = fs.sparse_attention(q, k, v, layout, selection, backend="triton")
    plain = tuned.candidates(arch(), dtype, D, slots, slots, choice.op)[0]
    with tuned.using(plain):
        expected = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
    with tuned.using(choice):
        found = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
        for _ in range(3):
            again = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(found, again)), f"{choice}: two runs differ"
    for what, one, other in zip(("dq", "dk", "dv"), found, expected):
        error = (one.float() - other.float()).square().mean().sqrt() / other.float().square().mean().sqrt()
        assert error < 0.01, f"{what} of {choice} differs by {error:.3f} from {plain}"


@pytest.mark.parametrize("dtype, D, slots, choice", candidates(("forward",), (torch.bfloat16,), (64,), defaults=False))
def test_many_tiles_agree_between_candidates(dtype: torch.dtype, D: int, slots: int, choice: Any) -> None:
    """Long lists, every SM busy: what a pipeline gets wrong only when it is full."""
    from flexsparse.compile_passes.templates import tuned

    layout = fs.TileLayout(grid=(8, 32, 32), tile=(4, 4, 4))
    q, k, v = (torch.randn(1, 12, layout.seq_len, D, device="cuda", dtype=dtype) for _ in range(3))
    selection = to(fs.VSA(sparsity=0.6).select(q.cpu(), k.cpu(), layout), "cuda")
    plain = tuned.candidates(arch(), dtype, D, slots, slots)[0]
    with torch.no_grad():
        with tuned.using(plain):
            expected = fs.sparse_attention(q, k, v, layout, selection, backend="triton").float()
        for _ in range(3):
            with tuned.using(choice):
                found = fs.sparse_attention(q, k, v, layout, selection, backend="triton").float()
            error = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
            assert error < 0.01, f"{choice} differs by {error:.3f} from {plain}"


def test_there_are_candidates_where_triton_is() -> None:
    assert not has_triton() or candidates(), "no candidate was made: nothing of them is tested"
