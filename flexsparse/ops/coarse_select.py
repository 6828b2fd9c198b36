"""`flexsparse::coarse_select`: pooling, scores between tiles, coarse output and the choice of tiles, as one op.

Never stores scores ``[B, H, N, M]``. Only the coarse output has a gradient.
Shape letters: B batch, H query heads, G KV heads, N query tiles, s slots of one, M KV tiles, t slots of one, D head dim,
W words of a bitmask row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexsparse import ops
from flexsparse.ops.choice import Rule, choose
from flexsparse.ops.gathered import without_autocast
from flexsparse.ops.select_tiles import fake_choice, tiles_to_keep
from flexsparse.ops.tile_tokens import rows_at
from flexsparse.tables import is_tracing
from flexsparse.tile_bits import unpack_bits

CHUNK_SCORES = 1 << 18
"""Scores of one chunk: they stay in the cache from the product to the choice."""
GPU_CHUNK_SCORES = 1 << 26
"""On a GPU, which comes here where the templates do not (more than `ops.MOST_TILES`): as many as fill it at each launch."""


def pool_tiles(x: Tensor, counts: Tensor) -> Tensor:
    """Mean over the valid tokens of each tile, at least float32.

    Args:
        x: ``[B, H, n, s, D]``; slots past the count are zero.
        counts: int32 ``[n]`` or ``[B, n]``; a tile with none pools to zero.
    """
    counts = counts if counts.dim() == 1 else counts[:, None]
    total = x.sum(3, dtype=torch.promote_types(x.dtype, torch.float32))
    return total / counts.clamp_min(1).to(total.dtype).unsqueeze(-1)


@torch.library.custom_op("flexsparse::coarse_select", mutates_args=())
def coarse_select(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_counts: Tensor,
    kv_counts: Tensor,
    allowed: Tensor | None,
    now: Tensor | None,
    rule: str,
    value: float,
    min_tiles: int,
    capacity: int,
    scale: float,
    count_bias: bool,
    q_tokens: Tensor | None = None,
    kv_tokens: Tensor | None = None,
    q_back: Tensor | None = None,
    kv_back: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The whole coarse stage.

    Args:
        q: ``[B, H, N, s, D]`` tile order; slots past the count are zero. Pooled vectors come as ``s = 1``.
        k: ``[B, G, M, t, D]``, H divisible by G.
        v: as k, where the coarse output is wanted, else None.
        q_counts: valid tokens of query tiles, int32 ``[N]`` or ``[B, N]``.
        kv_counts: valid tokens of KV tiles, int32 ``[M]`` or ``[B, M]``.
        allowed: int32 bitmask ``[1 or B, 1 or H, N, W]`` of tiles that may be chosen and take part in the coarse softmax;
            None where all may.
        now: the rule's number at run time, 0-d, or None.
        rule: name of a `choice.Rule`.
        value: its number where ``now`` is None.
        min_tiles: tiles that a row keeps at least.
        capacity: the most tiles that a row keeps.
        scale: factor of the scores.
        count_bias: add ``log(max(kv_counts, 1))`` to the scores.
        q_tokens: int32 ``[N, s]``, the token in each slot, -1 for none, where q comes in raster order, ``[B, H, S, D]``: it is
            pooled from where it lies, and its gradient comes in raster order too. None: q is as said above.
        kv_tokens: int32 ``[M, t]``, the same for k and v.
        q_back: int32 ``[S]``, the slot of each token, counted from the first video slot, given with ``q_tokens``; slots
            outside of the video are those of extra tokens, which have no gradient.
        kv_back: the same with ``kv_tokens``.

    Returns:
        Coarse output ``[B, H, N, D]`` and its natural log-sum-exp ``[B, H, N]`` (0 and -inf for a row that allows nothing;
        of size 0 without v); pooled q ``[B, H, N, D]``, k ``[B, G, M, D]`` and v (of size 0 without v), which the backward
        reads, all at least float32; bits int32 ``[B, H, N, W]``; counts and wanted int32 ``[B, H, N]``. The coarse output
        alone is differentiable.
    """
    how = Rule(name=rule, value=value, now=now, min_tiles=min_tiles)
    B, H, D = *q.shape[:2], q.shape[-1]
    N = q.shape[2] if q_tokens is None else q_tokens.shape[0]
    M = k.shape[2] if kv_tokens is None else kv_tokens.shape[0]
    if ops.templates_select(q, M, D):
        fields = (q_counts, kv_counts, allowed, how, capacity, scale, count_bias)
        return _on_gpu(q, k, v, *fields, q_tokens, kv_tokens)
    q, k = tiles_by(q, q_tokens), tiles_by(k, kv_tokens)
    v = None if v is None else tiles_by(v, kv_tokens)
    q_c, k_c = pool_tiles(q, q_counts), pool_tiles(k, kv_counts)
    v_c = k_c.new_empty(0) if v is None else pool_tiles(v, kv_counts)
    bits, counts, wanted = fake_choice(q_c, B, H, N, M)
    coarse = q_c.new_empty((B, H, N, D) if v is not None else 0)
    lse = q_c.new_empty((B, H, N) if v is not None else 0)
    for at, scores, mask in _score_chunks(q_c, k_c, kv_counts, allowed, scale, count_bias):
        packed = None if allowed is None else _of_chunk(allowed, at)
        part = how if now is None or now.dim() == 0 else Rule(name=rule, now=_of_chunk(now, at), min_tiles=min_tiles)
        for out, of_chunk in zip((bits, counts, wanted), choose(scores[None], packed, part, capacity)):
            out[at] = of_chunk[0]
        if v is not None:
            lse[at], weights = _log_softmax(scores, mask)
            torch.bmm(weights, _of_groups(v_c, at, H), out=coarse[at])
    return coarse, lse, q_c, k_c, v_c, bits, counts, wanted


def tiles_by(x: Tensor, tokens: Tensor | None) -> Tensor:
    """Tokens in raster order ``[B, H, S, D]`` as tiles ``[B, H, n, s, D]``, where there is a table ``[n, s]``."""
    return x if tokens is None else rows_at(x, tokens.flatten()).unflatten(2, tokens.shape)


def _on_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_counts: Tensor,
    kv_counts: Tensor,
    allowed: Tensor | None,
    rule: Rule,
    capacity: int,
    scale: float,
    count_bias: bool,
    q_tokens: Tensor | None = None,
    kv_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from flexsparse.compile_passes.templates.pool import pool
    from flexsparse.compile_passes.templates.select import select

    parts = [(q, q_counts, False), (k, kv_counts, False)] + ([] if v is None else [(v, kv_counts, False)])
    pooled = pool(parts, (q_tokens, kv_tokens, kv_tokens))
    v_c = None if v is None else pooled[2]
    sparsity = rule.name == "sparsity"
    bits, counts, wanted, coarse, lse = select(
        pooled[0],
        pooled[1],
        v_c,
        allowed=allowed,
        kv_counts=kv_counts,
        count_bias=count_bias,
        alive=False,
        scale=scale,
        rule="top_k" if sparsity else rule.name,
        value=tiles_to_keep(rule, pooled[1].shape[2]) if sparsity else rule.number(),
        min_tiles=rule.min_tiles,
        capacity=capacity,
    )
    q_c, k_c, *_ = pooled
    if v_c is None or coarse is None or lse is None:
        coarse, lse, v_c = (q_c.new_empty(0) for _ in range(3))
    return coarse, lse, q_c, k_c, v_c, bits, counts, wanted


Place = tuple[int, slice, slice]
"""Batch, query heads and rows of a chunk."""


def _of_chunk(x: Tensor, at: Place) -> Tensor:
    """Rows of a chunk of something that broadcasts to ``[B, H, N, ...]``, as ``[1, 1 or heads, 1 or rows, ...]``."""
    b, heads, rows = at
    x = x[min(b, x.shape[0] - 1)]
    x = x[heads] if x.shape[0] > 1 else x
    return (x[:, rows] if x.shape[1] > 1 else x)[None]


def _of_groups(x: Tensor, at: Place, H: int) -> Tensor:
    """KV heads that a chunk's query heads read: ``[B, G, M, D]`` to ``[heads, M, D]``."""
    b, heads, _ = at
    if x.shape[1] == H:
        return x[b, heads]
    return x[b, torch.arange(heads.start, heads.stop, device=x.device) // (H // x.shape[1])]


def _score_chunks(
    q_c: Tensor, k_c: Tensor, kv_counts: Tensor, allowed: Tensor | None, scale: float, count_bias: bool
) -> Iterator[tuple[Place, Tensor, Tensor | None]]:
    """(place, scores ``[heads, rows, M]``, bool mask of allowed tiles or None): some heads, or some rows of one head."""
    B, H, N, _ = q_c.shape
    M = k_c.shape[2]
    most = CHUNK_SCORES if q_c.device.type == "cpu" else GPU_CHUNK_SCORES
    rows = min(N, max(1, most // M))
    heads = min(H, max(1, most // (N * M))) if rows == N else 1
    bias = kv_counts.clamp_min(1).to(q_c.dtype).log().expand(B, M) if count_bias else None
    for b in range(B):
        for h in range(0, H, heads):
            for start in range(0, N, rows):
                at = (b, slice(h, min(h + heads, H)), slice(start, min(start + rows, N)))
                scores = torch.bmm(q_c[at], _of_groups(k_c, at, H).transpose(1, 2)).mul_(scale)
                if bias is not None:
                    scores += bias[b]
                yield at, scores, None if allowed is None else unpack_bits(_of_chunk(allowed, at)[0], M)


def _log_softmax(scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-sum-exp ``[heads, rows]`` and weights over the allowed scores; -inf and 0 for a row without any.

    The log-sum-exp is read off the largest weight: a pass less than computing it.
    """
    if mask is None:
        weights = scores.softmax(-1)
        return scores.amax(-1) - weights.amax(-1).log(), weights
    some = mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask & some, -math.inf)
    weights = scores.softmax(-1)
    lse = (scores.amax(-1) - weights.amax(-1).log()).masked_fill(~some[..., 0], -math.inf)
    return lse, weights.masked_fill_(~mask, 0)


@coarse_select.register_fake
def _(q: Tensor, k: Tensor, v: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    q_tokens, kv_tokens = (*args, None, None)[10:12]
    B, H, D = *q.shape[:2], q.shape[-1]
    N = q.shape[2] if q_tokens is None else q_tokens.shape[0]
    G, M = k.shape[1], k.shape[2] if kv_tokens is None else kv_tokens.shape[0]

    def floats(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))

    coarse = (floats(B, H, N, D), floats(B, H, N)) if v is not None else (floats(0), floats(0))
    pooled = (floats(B, H, N, D), floats(B, G, M, D), floats(B, G, M, D) if v is not None else floats(0))
    return (*coarse, *pooled, *fake_choice(q, B, H, N, M))


@torch.library.custom_op("flexsparse::coarse_select_backward", mutates_args=())
def coarse_select_backward(
    d_coarse: Tensor,
    coarse: Tensor,
    lse: Tensor,
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor,
    q_counts: Tensor,
    kv_counts: Tensor,
    allowed: Tensor | None,
    q_slots: int,
    kv_slots: int,
    scale: float,
    count_bias: bool,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
    v_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the coarse output with respect to q, k and v of `coarse_select`; scores are recomputed.

    Args:
        d_coarse: gradient of the coarse output ``[B, H, N, D]``; the others as `coarse_select` returns and takes them.
        coarse: as returned.
        lse: as returned.
        q_c: pooled q.
        k_c: pooled k.
        v_c: pooled v.
        q_counts: as taken.
        kv_counts: as taken.
        allowed: as taken.
        q_slots: s.
        kv_slots: t.
        scale: as taken.
        count_bias: as taken.
        q_dtype: of q's gradient.
        k_dtype: of k's.
        v_dtype: of v's.
    """
    d_coarse = d_coarse.to(q_c.dtype).contiguous()
    if ops.templates_select(q_c, k_c.shape[2], q_c.shape[-1]):
        from flexsparse.compile_passes.templates.coarse_backward import coarse_backward

        dq_c, dk_c, dv_c = coarse_backward(
            d_coarse,
            q_c,
            k_c,
            v_c,
            coarse,
            lse,
            allowed=allowed,
            kv_counts=kv_counts,
            count_bias=count_bias,
            alive=False,
            scale=scale,
        )
    else:
        dq_c, dk_c, dv_c = _pooled_gradients(
            q_c, k_c, v_c, d_coarse, coarse, lse, kv_counts, allowed, scale, count_bias
        )
    return (
        _unpool(dq_c, q_counts, q_slots, q_dtype),
        _unpool(dk_c, kv_counts, kv_slots, k_dtype),
        _unpool(dv_c, kv_counts, kv_slots, v_dtype),
    )


@without_autocast
def _pooled_gradients(
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor,
    d_coarse: Tensor,
    coarse: Tensor,
    lse: Tensor,
    kv_counts: Tensor,
    allowed: Tensor | None,
    scale: float,
    count_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the pooled vectors, in plain torch."""
    H, G = q_c.shape[1], k_c.shape[1]
    dq_c, dk_c, dv_c = torch.empty_like(q_c), torch.zeros_like(k_c), torch.zeros_like(v_c)
    delta = (d_coarse * coarse).sum(-1, keepdim=True)
    finite = lse.masked_fill(lse == -math.inf, 0)
    for at, scores, mask in _score_chunks(q_c, k_c, kv_counts, allowed, scale, count_bias):
        weights = scores.sub_(finite[at][..., None]).exp_()
        if mask is not None:
            weights.masked_fill_(~mask, 0)
        d_weights = torch.bmm(d_coarse[at], _of_groups(v_c, at, H).transpose(1, 2))
        ds = d_weights.sub_(delta[at]).mul_(weights).mul_(scale)
        torch.bmm(ds, _of_groups(k_c, at, H), out=dq_c[at])
        dk, dv = torch.bmm(ds.transpose(1, 2), q_c[at]), torch.bmm(weights.transpose(1, 2), d_coarse[at])
        for i, h in enumerate(range(at[1].start, at[1].stop)):  # query heads of a group, one after the other
            dk_c[at[0], h // (H // G)] += dk[i]
            dv_c[at[0], h // (H // G)] += dv[i]
    return dq_c, dk_c, dv_c


def _unpool(d: Tensor, counts: Tensor, slots: int, dtype: torch.dtype) -> Tensor:
    """Gradient of `pool_tiles` ``[B, H, n, slots, D]``."""
    counts = counts if counts.dim() == 1 else counts[:, None]
    d = (d / counts.clamp_min(1).to(d.dtype)[..., None]).to(dtype)
    return d[..., None, :].expand(*d.shape[:-1], slots, d.shape[-1]).contiguous()


@coarse_select_backward.register_fake
def _(
    d_coarse: Tensor, coarse: Tensor, lse: Tensor, q_c: Tensor, k_c: Tensor, v_c: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q_slots, kv_slots, dtypes = args[3], args[4], args[7:]

    def grad(pooled: Tensor, slots: int, dtype: torch.dtype) -> Tensor:
        return pooled.new_empty((*pooled.shape[:3], slots, pooled.shape[3]), dtype=dtype)

    return grad(q_c, q_slots, dtypes[0]), grad(k_c, kv_slots, dtypes[1]), grad(v_c, kv_slots, dtypes[2])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, q_counts, kv_counts, allowed, *_, scale, count_bias, q_tokens, kv_tokens, q_back, kv_back = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[:5], q_counts, kv_counts, allowed, q_back, kv_back)
    # the op makes the gradient of tiles, which is spread over their tokens here: a compiler fuses that with its reader
    ctx.rest = (1, 1, scale, count_bias, q.dtype, k.dtype, q.dtype if v is None else v.dtype)
    ctx.slots = [x.shape[3] if table is None else table.shape[1] for x, table in ((q, q_tokens), (k, kv_tokens))]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    d_coarse = grads[0]
    if d_coarse is None or not d_coarse.numel():
        return (None,) * 17
    coarse, lse, q_c, k_c, v_c, q_counts, kv_counts, allowed, q_back, kv_back = ctx.saved_tensors
    dq, dk, dv = torch.ops.flexsparse.coarse_select_backward(
        d_coarse, coarse, lse, q_c, k_c, v_c, q_counts, kv_counts, allowed, *ctx.rest
    )
    (dq,) = _of_tokens((dq,), q_back, ctx.slots[0])
    dk, dv = _of_tokens((dk, dv), kv_back, ctx.slots[1])
    return (dq, dk, dv, *(None,) * 14)


def _of_tokens(grads: Sequence[Tensor], back: Tensor | None, slots: int) -> list[Tensor]:
    """``[B, H, n, 1, D]`` of tiles to their slots, ``[B, H, n, slots, D]``; by a table to their tokens, ``[B, H, S, D]``.

    Zero for tokens of no tile.
    """
    if back is None:
        return [d.expand(-1, -1, -1, slots, -1) for d in grads]
    n = grads[0].shape[2]
    tile = torch.div(back, slots, rounding_mode="floor")
    none = (tile < 0) | (tile >= n)
    if is_tracing():  # a compiler fuses what it sees
        tile = tile.clamp_min(0).clamp_max(n - 1)
        return [d[:, :, :, 0].index_select(2, tile).masked_fill(none[:, None], 0) for d in grads]
    tile = tile.masked_fill_(none, n)
    return [pad(d[:, :, :, 0], (0, 0, 0, 1)).index_select(2, tile) for d in grads]  # each written once


coarse_select.register_autograd(_backward, setup_context=_setup)
