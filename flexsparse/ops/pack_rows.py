"""`flexsparse::pack_rows` and `flexsparse::unpack_rows`: queries to the order in which BSA computes them, and back to tokens.

Each is a gather, forward and backward; a computed row's gradient is the sum over the tokens that took it, all of one tile, in
the order of its slots. Nothing is added atomically: the same bits every time. Triton templates on CUDA, plain torch elsewhere.
Shape letters: B batch, H query heads, S tokens, P padded tokens, L rows of an argument (S or P), N query tiles, Q packed
queries of a tile, R computed rows (first extra tokens, padded to tiles, N x Q packed queries, last extra tokens), D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexsparse import ops


def _templates(x: Tensor) -> Any:
    if not ops.on_gpu(x) or not ops.has_triton():
        return None
    from flexsparse.compile_passes.templates import pack

    return pack


def new_rows(x: Tensor, length: int, inside: bool) -> Tensor:
    """Uninitialised ``[B, H, length, D]``; with ``inside`` heads lie inside of tokens in memory."""
    B, H, _, D = x.shape
    return ops.rows_of_tokens(x, length) if inside else x.new_empty((B, H, length, D))


@torch.library.custom_op("flexsparse::pack_rows", mutates_args=())
def pack_rows(
    x: Tensor,
    kept: Tensor,
    counts: Tensor,
    position: Tensor,
    tokens: Tensor,
    slots: Tensor | None,
    first_rows: int,
    last_rows: int,
    inside: bool,
) -> Tensor:
    """The rows that are computed.

    Args:
        x: ``[B, H, L, D]``, tokens in raster order, or in tile order where ``slots`` are given; any strides.
        kept: int32 ``[B, H, N, Q]`` tokens (`KeptQueries`).
        counts: int32 ``[N]``; rows past it are zero.
        position: int32 ``[B, H, S]``, which the backward reads.
        tokens: int32 ``[P]``: the token in a slot, -1 for padding, which is zero.
        slots: int32 ``[S]``: the slot of a token, or None.
        first_rows: slots of the first extra tiles.
        last_rows: slots of the last extra tiles.
        inside: whether x's gradient has heads inside of tokens in memory, as most models' queries do.

    Returns:
        ``[B, H, R, D]``, contiguous.
    """
    templates = _templates(x)
    if templates is not None:
        return templates.pack_rows(x, kept, counts, tokens, slots, first_rows, last_rows)
    Q = kept.shape[3]
    past = torch.arange(Q, device=x.device) >= counts[:, None]
    rows = kept.masked_fill(past, -1).flatten(2)
    ends = [part.expand(*kept.shape[:2], -1) for part in (tokens[:first_rows], tokens[tokens.shape[0] - last_rows :])]
    index = torch.cat([ends[0], rows, ends[1]], -1) if first_rows or last_rows else rows
    if slots is not None:
        index = torch.where(index < 0, -1, slots[index.clamp_min(0).long()])
    return take_rows(x, index)


@pack_rows.register_fake
def _(x: Tensor, kept: Tensor, *args: Any) -> Tensor:
    first_rows, last_rows = args[4:6]
    return new_rows(x, first_rows + kept.shape[2] * kept.shape[3] + last_rows, False)


@torch.library.custom_op("flexsparse::pack_rows_backward", mutates_args=())
def pack_rows_backward(
    grad: Tensor, kept: Tensor, position: Tensor, tokens: Tensor, first_rows: int, tiled: bool, inside: bool
) -> Tensor:
    """Gradient of `pack_rows`, ``[B, H, S, D]`` or, ``tiled``, ``[B, H, P, D]``: a computed token has that of its row."""
    templates = _templates(grad)
    if templates is not None:
        return templates.pack_rows_backward(grad, kept, position, tokens, first_rows, tiled, inside)
    packed = kept.flatten(2)
    at, token = position, torch.arange(position.shape[2], dtype=torch.int32, device=grad.device)
    if tiled:
        at, token = position[..., tokens.clamp_min(0).long()].masked_fill(tokens < 0, -1), tokens
    of_tile = at - first_rows
    video = (of_tile >= 0) & (of_tile < packed.shape[2])
    owner = packed.gather(-1, of_tile.clamp(0, packed.shape[2] - 1).long())
    return take_rows(grad, torch.where(video & (owner != token), -1, at), inside=inside)


@pack_rows_backward.register_fake
def _(
    grad: Tensor, kept: Tensor, position: Tensor, tokens: Tensor, first_rows: int, tiled: bool, inside: bool
) -> Tensor:
    return new_rows(grad, tokens.shape[0] if tiled else position.shape[2], inside)


def _setup_pack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, kept, _, position, tokens, slots, first_rows, _, inside = inputs
    ctx.save_for_backward(kept, position, tokens)
    ctx.how = (first_rows, slots is not None, inside)


def _backward_pack(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.flexsparse.pack_rows_backward(grad, *ctx.saved_tensors, *ctx.how), *(None,) * 8


pack_rows.register_autograd(_backward_pack, setup_context=_setup_pack)


@torch.library.custom_op("flexsparse::unpack_rows", mutates_args=())
def unpack_rows(
    rows: Tensor,
    position: Tensor,
    tokens: Tensor,
    first_rows: int,
    last_rows: int,
    query_rows: int,
    fill: float,
    inside: bool,
) -> Tensor:
    """Computed rows to tokens: each takes the row at its position.

    Args:
        rows: ``[B, H, R, D]``.
        position: int32 ``[B, H, S]``; -1 for a token of ``fill``. A row of a tile is taken by tokens of that tile only.
        tokens: int32 ``[P]``: the token in a slot, which the backward reads; and the sizes as for `pack_rows`.
        first_rows: slots of the first extra tiles.
        last_rows: slots of the last extra tiles.
        query_rows: Q.
        fill: value of tokens that take none.
        inside: whether heads lie inside of tokens in the result's memory.

    Returns:
        ``[B, H, S, D]``.
    """
    templates = _templates(rows)
    if templates is not None:
        return templates.unpack_rows(rows, position, fill, inside)
    return take_rows(rows, position, fill, inside)


@unpack_rows.register_fake
def _(rows: Tensor, position: Tensor, *args: Any) -> Tensor:
    return new_rows(rows, position.shape[2], args[-1])


@torch.library.custom_op("flexsparse::unpack_rows_backward", mutates_args=())
def unpack_rows_backward(
    grad: Tensor, position: Tensor, tokens: Tensor, length: int, first_rows: int, last_rows: int, query_rows: int
) -> Tensor:
    """Gradient of `unpack_rows`, ``[B, H, length, D]``: sums in at least float32, in the order of slots."""
    templates = _templates(grad)
    if templates is not None:
        return templates.unpack_rows_backward(grad, position, tokens, length, first_rows, last_rows, query_rows)
    B, H, _, D = grad.shape
    heads = torch.arange(B * H, device=grad.device).view(B, H, 1)
    target = torch.where(
        position < 0, B * H * length, heads * length + position
    )  # the last row takes what goes nowhere
    if not grad.is_contiguous() and grad.transpose(1, 2).is_contiguous():
        grad, target = grad.transpose(1, 2), target.transpose(1, 2)
    sums = grad.new_zeros((B * H * length + 1, D), dtype=torch.promote_types(grad.dtype, torch.float32))
    values = grad.reshape(-1, D).to(sums.dtype)
    # on CUDA `index_add_` is atomic, `index_put_` sorts
    if sums.is_cuda:
        sums.index_put_((target.flatten(),), values, accumulate=True)
    else:
        sums.index_add_(0, target.flatten(), values)
    return sums[:-1].view(B, H, length, D).to(grad.dtype)


@unpack_rows_backward.register_fake
def _(grad: Tensor, position: Tensor, tokens: Tensor, length: int, *args: int) -> Tensor:
    return new_rows(grad, length, False)


def _setup_unpack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, position, tokens, *sizes, _, _ = inputs
    ctx.save_for_backward(position, tokens)
    ctx.sizes = (rows.shape[2], *sizes)


def _backward_unpack(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.flexsparse.unpack_rows_backward(grad, *ctx.saved_tensors, *ctx.sizes), *(None,) * 7


unpack_rows.register_autograd(_backward_unpack, setup_context=_setup_unpack)


def take_rows(x: Tensor, index: Tensor, fill: float = 0.0, inside: bool = False) -> Tensor:
    """Rows ``[B, H, I, D]`` of ``x [B, H, L, D]`` by an index ``[B, H, I]`` of each head; ``fill`` where it is -1."""
    B, H, L, D = x.shape
    found = new_rows(x, index.shape[2], inside)
    b, h = (torch.arange(size, device=x.device) for size in (B, H))
    row = index.clamp_min(0)
    if not x.is_contiguous() and x.transpose(1, 2).is_contiguous():  # rows are copied from where they lie
        x, row = x.transpose(1, 2), (b[:, None, None] * L + row) * H + h[:, None]
    else:
        row = (b[:, None] * H + h)[..., None] * L + row
    row, index = (row.transpose(1, 2), index.transpose(1, 2)) if inside else (row, index)
    out = (found.transpose(1, 2) if inside else found).view(-1, D)
    torch.index_select(x.reshape(-1, D), 0, row.flatten(), out=out)
    missing = index.flatten() < 0
    if x.is_cuda:
        out.masked_fill_(missing[:, None], fill)
    else:  # faster, but asks how many
        out.index_fill_(0, missing.nonzero()[:, 0], fill)
    return found
