"""Block-sparse attention in plain torch: gathers each query tile's KV tiles, and runs dense attention on them in chunks.

What the gather backend runs, and what `flexsparse::tile_attention` does where there is no template. Any device.
Shape letters: B batch, H query heads, G KV heads, N query tiles, M KV video tiles, U all KV tiles, R query rows
(video and extra), t rows of a query tile, s slots of a KV tile, D head dim, C query tiles of a chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexsparse.autocast import autocast_off
from flexsparse.tile_bits import ascending_lists, unpack_bits

CHUNK_ENTRIES = {"forward": 1 << 17, "backward": 1 << 19, "cuda": 1 << 26}
"""Elements of one chunk's logits: on CPU so that what a chunk touches stays in cache, on CUDA so that launches are few."""


@dataclass
class _Rows:
    """A chunk of query tiles and the KV tiles that they see.

    Attributes:
        tiles: which of the ``B * H * N`` query tiles.
        kv: int64 ``[C, k]``, KV tiles among ``B * G * U``.
        bias: ``[C, 1, k * s]`` 0 or -inf, or None where every slot is valid.
        blank: bool ``[C]`` query tiles that see no token, or None where all see one.
    """

    tiles: slice
    kv: Tensor
    bias: Tensor | None
    blank: Tensor | None = None


class Room:
    """Memory that chunks use in turn: fresh memory for each costs more in page faults than the work on it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory of a shape, the same memory at every call with this name."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, dtype=dtype, device=self.device)
        return self.buffers[name][:size].view(shape)


@dataclass
class _Problem:
    """The op's arguments as flat tiles, shared by forward and backward."""

    B: int
    H: int
    G: int
    N: int
    U: int
    t: int
    s: int
    D: int
    first_rows: int
    kv_first: int
    M: int
    counts: Tensor  # [B, H, N]
    lists: Tensor  # int64 [B * H * N, K]
    kv_counts: Tensor  # [B, U]
    dtype: torch.dtype

    def video(self, x: Tensor) -> Tensor:
        """Rows of query tiles: ``[B, H, R, ...]`` -> ``[B * H * N, t, ...]``."""
        part = x.narrow(2, self.first_rows, self.N * self.t)
        return part.reshape(self.B * self.H * self.N, self.t, *x.shape[3:])

    def extra(self) -> list[tuple[int, int]]:
        """(start, length) of the extra rows at both ends, for a query of R rows."""
        return [(0, self.first_rows), (self.first_rows + self.N * self.t, -1)]

    def chunk(self, direction: str) -> int:
        """Query tiles of a chunk."""
        width = (self.lists.shape[1] + self.U - self.M) * self.s
        budget = CHUNK_ENTRIES["cuda" if self.lists.is_cuda else direction]
        return max(1, budget // max(1, self.t * width))

    def chunks(self, direction: str) -> Iterator[_Rows]:
        """Query tiles in order, with the KV tiles they keep and the extra ones."""
        device = self.lists.device
        total = self.B * self.H * self.N
        step = self.chunk(direction)
        row = torch.arange(total, device=device)
        batch = row // (self.H * self.N)
        group = batch * self.G + row // self.N % self.H // (self.H // self.G)
        extras = torch.arange(self.U, device=device)
        extras = torch.cat([extras[: self.kv_first], extras[self.kv_first + self.M :]])
        width, count = self.lists.shape[1], self.counts.reshape(-1).long()
        kv = torch.cat([self.lists + self.kv_first, extras.expand(total, -1)], dim=1)
        flat = kv + group[:, None] * self.U
        starts = range(0, total, step)
        if bool((self.kv_counts == self.s).all()) and bool((count == width).all()):
            for start in starts:
                yield _Rows(slice(start, start + step), flat[start : start + step], None)
            return
        slot = torch.arange(self.s, device=device)
        for start in starts:
            tiles = slice(start, start + step)
            longest = int(count[tiles].max())  # a chunk of short rows does not pay for the longest row of all
            columns = torch.cat([torch.arange(longest, device=device), torch.arange(width, kv.shape[1], device=device)])
            on = (columns < count[tiles, None]) | (columns >= width)
            tokens = self.kv_counts[batch[tiles, None], kv[tiles][:, columns]]
            valid = (on[..., None] & (slot < tokens[..., None])).flatten(1)
            bias = torch.zeros(valid.shape, dtype=self.dtype, device=device).masked_fill_(~valid, -math.inf)
            blank = ~valid.any(-1)
            some = blank if bool(blank.any()) else None
            yield _Rows(tiles, flat[tiles][:, columns], bias[:, None], some)

    def tokens(self, x: Tensor, rows: _Rows, room: Room, name: str) -> Tensor:
        """KV tokens of a chunk: flat tiles ``[B * G * U, s * D]`` -> ``[C, k * s, D]`` in the compute dtype."""
        picked = room.take(f"{name} picked", (rows.kv.numel(), self.s * self.D), x.dtype)
        torch.index_select(x, 0, rows.kv.reshape(-1), out=picked)
        if x.dtype != self.dtype:
            picked = room.take(name, tuple(picked.shape), self.dtype).copy_(picked)
        return picked.view(rows.kv.shape[0], rows.kv.shape[1] * self.s, self.D)


def _problem(
    q: Tensor,
    k: Tensor,
    bits: Tensor,
    counts: Tensor,
    kv_counts: Tensor,
    query_rows: int,
    first_rows: int,
    kv_first: int,
    kv_video: int,
    slots: int,
) -> _Problem:
    B, H, _, D = q.shape
    width = int(counts.max()) if counts.numel() else 0
    lists = ascending_lists(unpack_bits(bits, kv_video), width).flatten(0, 2).long()
    U = k.shape[2] // slots
    return _Problem(
        B,
        H,
        k.shape[1],
        counts.shape[2],
        U,
        query_rows,
        slots,
        D,
        first_rows,
        kv_first,
        kv_video,
        counts,
        lists,
        kv_counts.expand(B, U),
        torch.promote_types(q.dtype, torch.float32),
    )


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Backward runs under whatever autocast holds where it is called; the op chooses its own precision."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        q = next(x for x in args if isinstance(x, Tensor))
        with autocast_off(q.device.type):
            return function(*args, **kwargs)

    return run


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, room: Room) -> Tensor:
    """Scaled logits ``[C, t, k]``. The scale applies to the fp32 product: a pre-scaled operand rounds differently."""
    logits = room.take("logits", (q.shape[0], q.shape[1], k.shape[1]), q.dtype)
    start = q.new_zeros(()) if bias is None else bias
    return torch.baddbmm(start, q, k.transpose(1, 2), beta=0 if bias is None else 1, alpha=scale, out=logits)


def _softmax(logits: Tensor, lse: Tensor | None, blank: Tensor | None) -> Tensor:
    """Weights, in place of the logits, and log-sum-exp into ``lse``.

    Entries of the chunk that see no token (``blank``, bool ``[C]``, or None where all see one) have weights 0 and
    log-sum-exp -inf. The log-sum-exp is read off the largest weight, ``max(logits) - log(max(weights))``: one pass less
    than computing it.
    """
    if logits.shape[-1] == 0:  # rows that see nothing at all
        if lse is not None:
            lse.fill_(-math.inf)
        return logits
    top = None if lse is None else logits.amax(-1)
    weights = torch.softmax(logits, -1, out=logits)
    if blank is not None:
        weights[blank] = 0
    if lse is not None and top is not None:
        torch.sub(top, weights.amax(-1).log_(), out=lse)
        if blank is not None:
            lse[blank] = -math.inf
    return weights


def _extra_rows(p: _Problem, R: int, start: int, length: int) -> Iterator[tuple[int, int, slice]]:
    """(batch, head, rows) of the extra queries, which attend to all KV tiles, in chunks."""
    length = R - start if length < 0 else length
    step = max(1, CHUNK_ENTRIES["backward"] // max(1, p.U * p.s))
    for b in range(p.B):
        for h in range(p.H):
            for row in range(start, start + length, step):
                yield b, h, slice(row, min(row + step, start + length))


def _extra_bias(p: _Problem, b: int, device: torch.device) -> Tensor:
    valid = (torch.arange(p.s, device=device) < p.kv_counts[b][:, None]).flatten()
    return torch.zeros(valid.shape, dtype=p.dtype, device=device).masked_fill_(~valid, -math.inf)[None, None]


@without_autocast
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    counts: Tensor,
    kv_counts: Tensor,
    query_rows: int,
    first_rows: int,
    kv_first: int,
    kv_video: int,
    slots: int,
    scale: float,
    wants_lse: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, R, D]`` (in q's dtype by default) and log-sum-exp; arguments as `flexsparse::gather_attention`."""
    p = _problem(q, k, bits, counts, kv_counts, query_rows, first_rows, kv_first, kv_video, slots)
    R = q.shape[2]
    out = torch.empty(q.shape, dtype=out_dtype or q.dtype, device=q.device)
    lse = torch.empty((*q.shape[:2], R if wants_lse else 0), dtype=p.dtype, device=q.device)
    k_flat, v_flat = (x.reshape(p.B * p.G * p.U, p.s * p.D) for x in (k, v))
    room = Room(q.device)
    q_video = p.video(q)
    whole = p.N * p.t == R  # without extra rows, results are written in place
    out_video = p.video(out) if whole else out.new_empty(q_video.shape)
    lse_video = lse.new_empty(q_video.shape[:2]) if wants_lse else None
    for rows in p.chunks("forward"):
        logits = _logits(q_video[rows.tiles].to(p.dtype), p.tokens(k_flat, rows, room, "k"), rows.bias, scale, room)
        weights = _softmax(logits, None if lse_video is None else lse_video[rows.tiles], rows.blank)
        v_c = p.tokens(v_flat, rows, room, "v")
        if p.dtype == out.dtype:
            torch.bmm(weights, v_c, out=out_video[rows.tiles])
        else:
            out_video[rows.tiles] = torch.bmm(weights, v_c)
    if not whole:
        out.narrow(2, first_rows, p.N * p.t).copy_(out_video.view(p.B, p.H, p.N * p.t, p.D))
    if lse_video is not None:
        lse.narrow(2, first_rows, p.N * p.t).copy_(lse_video.view(p.B, p.H, p.N * p.t))
    for start, length in p.extra():
        for b, h, at in _extra_rows(p, R, start, length):
            q_c, k_c, v_c = (x.to(p.dtype) for x in (q[b, h, at], k[b, h // (p.H // p.G)], v[b, h // (p.H // p.G)]))
            bias = _extra_bias(p, b, q.device)
            blank = (bias == -math.inf).all(-1)[0] if bool((bias == -math.inf).all()) else None
            logits = _logits(q_c[None], k_c[None], bias, scale, room)
            weights = _softmax(logits, lse[b, h, at][None] if wants_lse else None, blank)[0]
            out[b, h, at] = (weights @ v_c).to(out.dtype)
    return out, lse


@without_autocast
def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    bits: Tensor,
    counts: Tensor,
    kv_counts: Tensor,
    query_rows: int,
    first_rows: int,
    kv_first: int,
    kv_video: int,
    slots: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; logits are recomputed as the forward does.

    Without ``out`` (or where it was rounded) ``sum(weights * dP)`` is computed from its definition.
    """
    p = _problem(q, k, bits, counts, kv_counts, query_rows, first_rows, kv_first, kv_video, slots)
    R = q.shape[2]
    finite = lse.masked_fill(lse == -math.inf, 0)
    # sum(grad * out) is sum(weights * dP), unless out was rounded: where one weight is near 1 the difference to dP is
    # all that counts, and a rounding of out is larger than it
    rounded = out is None or out.dtype != p.dtype
    delta = finite.new_zeros(finite.shape) if out is None or rounded else (grad * out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=p.dtype, device=k.device)
    dv = torch.zeros(v.shape, dtype=p.dtype, device=v.device)
    k_flat, v_flat, dk_flat, dv_flat = (x.reshape(p.B * p.G * p.U, p.s * p.D) for x in (k, v, dk, dv))
    room = Room(q.device)
    q_video, g_video = p.video(q), p.video(grad)
    lse_video, delta_video = p.video(finite)[..., None], p.video(delta)[..., None]
    dq_video = q_video.new_empty(q_video.shape)
    for rows in p.chunks("backward"):
        q_c, g_c = q_video[rows.tiles].to(p.dtype), g_video[rows.tiles].to(p.dtype)
        k_c = p.tokens(k_flat, rows, room, "k")
        weights = _logits(q_c, k_c, rows.bias, scale, room).sub_(lse_video[rows.tiles]).exp_()
        index = rows.kv.reshape(-1)
        d_tokens = room.take("d", tuple(k_c.shape), p.dtype)
        torch.bmm(weights.transpose(1, 2), g_c, out=d_tokens)
        dv_flat.index_add_(0, index, d_tokens.view(len(index), p.s * p.D))
        v_c = p.tokens(v_flat, rows, room, "v")
        ds = torch.bmm(g_c, v_c.transpose(1, 2), out=room.take("ds", tuple(weights.shape), p.dtype))
        total = torch.linalg.vecdot(ds, weights)[..., None] if rounded else 0
        ds.sub_(delta_video[rows.tiles] + total).mul_(weights)
        dq_video[rows.tiles] = torch.bmm(ds, k_c).mul_(scale).to(q.dtype)
        torch.bmm(ds.transpose(1, 2), q_c, out=d_tokens).mul_(scale)
        dk_flat.index_add_(0, index, d_tokens.view(len(index), p.s * p.D))
    dq.narrow(2, first_rows, p.N * p.t).copy_(dq_video.view(p.B, p.H, p.N * p.t, p.D))
    for start, length in p.extra():
        for b, h, at in _extra_rows(p, R, start, length):
            g = h // (p.H // p.G)
            q_c, g_c, k_c, v_c = (x.to(p.dtype) for x in (q[b, h, at], grad[b, h, at], k[b, g], v[b, g]))
            logits = _logits(q_c[None], k_c[None], _extra_bias(p, b, q.device), scale, room)[0]
            weights = logits.sub_(finite[b, h, at, None]).exp_()
            ds = g_c @ v_c.T
            total = torch.linalg.vecdot(ds, weights)[:, None] if rounded else 0
            ds.sub_(delta[b, h, at, None] + total).mul_(weights).mul_(scale)
            dq[b, h, at] = (ds @ k_c).to(q.dtype)
            dk[b, g].addmm_(ds.T, q_c)
            dv[b, g].addmm_(weights.T, g_c)
    return dq, dk.to(k.dtype), dv.to(v.dtype)
