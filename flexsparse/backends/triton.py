"""The Triton templates, uncompiled: `flexsparse::tile_attention`. CUDA; in Triton's interpreter on CPU, for tests.

Shape letters: B batch, H query heads, G KV heads, N query tiles, R query rows as computed, U all KV tiles, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: TileSelection,
    scale: float,
    q_tiles: Tensor | None = None,
    wants_lse: bool = False,
    raster: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Fine-stage attention; arguments and results as `gather.attend`.

    ``raster``: k and v are in raster order, as q is; kernels find their rows by the layouts' tables. Not for packed queries.
    """
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    rows = q if raster else pack_queries(q, q_tiles, selection)
    operands = (*selection.operands(), scale, wants_lse or gradients)
    if raster:
        operands = (*operands, *(one.index(q.device)[0] for one in (selection.layout, selection.kv_layout)))
    if q.is_cuda:
        out, lse = torch.ops.flexsparse.tile_attention(rows, k, v, None, None, *operands)
    else:
        out, lse = _Interpreted.apply(rows, k, v, *operands)
    out = out if raster else unpack_rows(out, selection, like=q)
    return out, unpack_lse(lse, selection) if wants_lse else None


class _Interpreted(torch.autograd.Function):
    """The templates on CPU tensors, in Triton's interpreter."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
        ctx.operands = operands
        out, lse = run_forward(q, k, v, None, None, *operands)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        numbers, tables = ctx.operands[:13], ctx.operands[14:]  # between them whether the log-sum-exp is wanted
        dq, dk, dv, _, _ = run_backward(*grads, *ctx.saved_tensors, None, None, *numbers, *tables)
        return dq, dk, dv, *(None,) * len(ctx.operands)
