"""The Triton templates, uncompiled: `flexsparse::tile_attention`. CUDA; in Triton's interpreter on CPU, for tests.

Shape letters: B batch, H query heads, G KV heads, N query tiles, R query rows as computed, U all KV tiles, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexsparse.layout import TileLayout
from flexsparse.ops import has_triton
from flexsparse.ops.tile_attention import run_backward, run_forward, templates_refuse
from flexsparse.packing import pack_queries, unpack_lse, unpack_rows
from flexsparse.selection import TileSelection


def refusal(device: str, dtype: torch.dtype, head_dim: int, rows: int) -> str | None:
    """Why the templates cannot do a case, with the remedy; None where they can."""
    if not has_triton():
        return "triton is not installed; pip install 'flexsparse[triton]', or use 'flex' or 'gather'"
    if device != "cuda" and not _interpreting():
        return "the Triton templates run on CUDA; use 'gather', or 'auto'"
    return templates_refuse(dtype, head_dim, rows, rows)


def _interpreting() -> bool:
    from flexsparse.compile_passes.templates.launch import interpreting

    return interpreting()


def adds_coarse(q: Tensor, gate: Tensor | None, coarse_out: Tensor | None, layout: TileLayout, raster: bool) -> bool:
    """Whether the kernel adds ``gate * coarse`` itself: where it reads the gate as it lies.

    Not in float32 training, where its backward would have to correct delta (`compile_passes.epilogue`).
    """
    if gate is None or coarse_out is None or gate.dtype != q.dtype or not (raster or layout.order == "tiles"):
        return False
    return q.dtype in (torch.bfloat16, torch.float16) or not torch.is_grad_enabled()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: TileSelection,
    scale: float,
    q_tiles: Tensor | None = None,
    wants_lse: bool = False,
    raster: bool = False,
    coarse: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Fine-stage attention; arguments and results as `gather.attend`.

    ``raster``: k and v are in raster order, as q is; kernels find their rows by the layouts' tables, but for packed queries.
    ``coarse [B, H, N, D]``, ``gate [B, H, S, D]``: what is added to it (`adds_coarse`), or None.
    """
    gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, coarse, gate))
    by_table = raster and selection.queries is None
    rows = q if by_table else pack_queries(q, None if raster else q_tiles, selection)
    q_tokens = selection.layout.index(q.device)[0] if by_table else None
    kv_tokens = selection.kv_layout.index(q.device)[0] if raster else None
    # a projection reads the output next, but for packed rows
    last = (scale, wants_lse or gradients, q_tokens, kv_tokens, selection.queries is None)
    operands = (*selection.operands(), *last)
    if q.is_cuda:
        out, lse = torch.ops.flexsparse.tile_attention(rows, k, v, coarse, gate, *operands)
    else:
        out, lse = _Interpreted.apply(rows, k, v, coarse, gate, *operands)
    out = out if by_table else unpack_rows(out, selection, like=q)
    return out, unpack_lse(lse, selection) if wants_lse else None


class _Interpreted(torch.autograd.Function):
    """The templates on CPU tensors, in Triton's interpreter."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
        (coarse, gate), ctx.operands = operands[:2], operands[2:]
        out, lse = run_forward(q, k, v, *operands)
        ctx.save_for_backward(q, k, v, out, lse, coarse, gate)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        numbers, tables = ctx.operands[:13], ctx.operands[14:16]  # between them whether the log-sum-exp is wanted
        dq, dk, dv, d_coarse, d_gate = run_backward(*grads, *ctx.saved_tensors, *numbers, *tables)
        gated = ctx.saved_tensors[-1] is not None
        return dq, dk, dv, d_coarse if gated else None, d_gate if gated else None, *(None,) * len(ctx.operands)
