"""FlexAttention with the selection's `BlockMask`: compiled always, as uncompiled it ignores the block lists.

Shape letters: B batch, H query heads, G KV heads, R query rows as computed, P padded KV tokens, D head dim.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from flexsparse.block_lists import BlockLists, block_lists, block_mask, tile_mask_mod
from flexsparse.packing import pack_queries, unpack_lse, unpack_rows
from flexsparse.selection import TileSelection
from flexsparse.tables import is_compiling

LN2 = 0.6931471805599453


def refusal(device: str, dtype: torch.dtype, gradients: bool, lse: bool, dynamic: bool) -> str | None:
    """Why FlexAttention cannot do a case, with the remedy; None where it can (torch 2.11 to 2.15)."""
    if dtype == torch.float64:
        return "FlexAttention computes no float64; use 'gather' or 'reference'"
    if device == "meta":
        return "FlexAttention has no meta tensors; use 'gather'"
    if device == "cpu":
        if gradients:
            return "FlexAttention has no backward on CPU; use 'gather'"
        if lse:
            return "FlexAttention returns no log-sum-exp on CPU when compiled; use 'gather'"
        if dynamic:
            return "FlexAttention on CPU does not compile under dynamic shapes; use 'gather'"
    return None


def _identity(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return score


@functools.lru_cache(128)
def _compiled(case: tuple[Any, ...]) -> Any:
    """A compiled flex_attention for one case.

    Each has a code object of its own: Dynamo counts recompilations per code object, and after eight of them it
    would run uncompiled, which is dense.
    """

    def flex_case(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, gqa: bool, lse: bool) -> Any:
        aux = AuxRequest(lse=True) if lse else None
        options = _kernel_options(*mask.BLOCK_SIZE, q.device.type)
        return flex_attention(
            q, k, v, block_mask=mask, scale=scale, enable_gqa=gqa, return_aux=aux, kernel_options=options
        )

    fresh = types.FunctionType(
        flex_case.__code__.replace(co_name=f"flex_{len(case)}"),
        flex_case.__globals__,
        closure=flex_case.__closure__,
    )
    return torch.compile(fresh, fullgraph=True, dynamic=False)


def _kernel_options(rows: int, slots: int, device: str) -> Any:
    if device != "cuda" or (rows >= 128 and slots >= 128):
        return None
    # the default forward config on sm90 takes 128-row blocks, which tiles of fewer slots do not divide
    return {"fwd_BLOCK_M": min(rows, 128), "fwd_BLOCK_N": min(slots, 64), "num_warps": 4}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: TileSelection,
    scale: float,
    q_tiles: Tensor | None = None,
    wants_lse: bool = False,
    in_graph: bool = False,
    call: str = "",
) -> tuple[Tensor, Tensor | None]:
    """Fine-stage attention; arguments and results as `gather.attend`, log-sum-exp only where it is wanted.

    Args:
        in_graph: whether the call is traced as part of a rewritten graph, where FlexAttention's captured tensors
            must be explicit operands.
        call: name of the call, for passes to report.
    """
    rows = pack_queries(q, q_tiles, selection)
    if not rows.is_cuda:  # there, views of other ranks do not lower
        rows, k, v = rows.contiguous(), k.contiguous(), v.contiguous()
    lists = block_lists(selection, call)
    gqa = q.shape[1] != k.shape[1]
    out: Tensor
    lse: Tensor | None
    result: Any
    if in_graph:
        out, lse = _operator(rows, k, v, lists, scale, wants_lse)
    else:
        mask = block_mask(lists, columns=rows.is_cuda)  # the backward walks columns; compiled for the CPU there is none
        if is_compiling():
            aux = AuxRequest(lse=True) if wants_lse else None
            options = _kernel_options(*mask.BLOCK_SIZE, q.device.type)
            result = flex_attention(
                rows,
                k,
                v,
                block_mask=mask,
                scale=scale,
                enable_gqa=gqa,
                return_aux=aux,
                kernel_options=options,
            )
        else:
            case = (
                rows.shape,
                k.shape,
                mask.BLOCK_SIZE,
                q.dtype,
                str(q.device),
                scale,
                wants_lse,
                rows.requires_grad,
            )
            result = _compiled(case)(rows, k, v, mask, scale, gqa, wants_lse)
        out, lse = (result[0], result[1].lse) if wants_lse else (result, None)
    return unpack_rows(out, selection, like=q), None if lse is None else unpack_lse(lse, selection)


def _operator(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, wants_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The higher-order operator itself, with the mask's tensors as operands.

    In a graph that a backend rewrote, a closure over tensors of the graph does not trace (they are functional
    tensors by then); FlexAttention's public function takes closures only.
    """
    q_shift, kv_shift = lists.q_shift, lists.kv_shift

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor, table: Tensor, counts: Tensor) -> Tensor:
        return tile_mask_mod(b, h, q, kv, table, counts, q_shift, kv_shift)

    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    mask = block_mask(lists, columns=gradients)
    parts = (*mask.as_tuple()[:-1], mask_mod)
    options = {
        "BACKEND": "AUTO",
        "PRESCALE_QK": False,
        "ROWS_GUARANTEED_SAFE": False,
        "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True,
        "OUTPUT_LOGSUMEXP": wants_lse or gradients or q.device.type != "cpu",
        "OUTPUT_MAX": False,
        **(_kernel_options(1 << q_shift, 1 << kv_shift, q.device.type) or {}),
    }
    operator = torch.ops.higher_order.flex_attention
    buffers = (lists.table, lists.tile_counts)
    out, lse, *_ = operator(q, k, v, _identity, parts, scale, options, (), buffers)
    return out, lse * LN2 if wants_lse else None
