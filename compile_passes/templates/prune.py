"""Which queries BSA computes: of each window its representative and those least similar to it, one program for a query tile.

Shape letters: B batch, H query heads, N query tiles, s slots of a tile, A windows of a tile, n tokens of a window, Q packed
queries of a tile, S tokens of the sequence, D head dim.

Scores and ranks live in registers, as ``[A, n]``; tokens pass by in pieces of the head dim. The first pass reads them from
memory, the others find them in the cache (a tile is at most 64 KiB): two passes in all, one more for a medoid, n more for
``fill="nearest"``.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.compile_passes.templates.choice import LOWEST, to_key
from flexsparse.compile_passes.templates.launch import Compilation, launch
from flexsparse.ops.prune_queries import UNLIKE, Pruned

MOST_TOKENS = 1024
"""Windows x tokens of a window, each rounded up to a power of two."""
PAST_KEYS = tl.constexpr(0x7F800000)  # the key of inf: after all cosines
NO_COSINE = tl.constexpr(UNLIKE)


@triton.jit
def load_piece(at, inside, start, D: tl.constexpr, PIECE: tl.constexpr):
    """float32 [WA, WN, PIECE]: a piece of the head dim of every token; 0 outside of the windows."""
    d = start + tl.arange(0, PIECE)[None, None, :]
    return tl.load(at[:, :, None] + d, mask=inside[:, :, None] & (d < D), other=0.0).to(tl.float32)


@triton.jit
def at_place(chosen, values):
    """Of each window the value at its chosen place: [WA, WN] to [WA, 1]; int32 or float32."""
    return tl.sum(tl.where(chosen, values, 0), 1)[:, None]


@triton.jit
def cosine_key(dot, norm2, other2, inside):
    """Order-preserving integers of cosines; 0 where a vector is zero, -2 where NaN, outside of the windows below all."""
    norms = tl.sqrt_rn(norm2) * tl.sqrt_rn(other2)
    some = norms != 0
    cosines = tl.where(some, tl.div_rn(dot, tl.where(some, norms, 1.0)), 0.0)
    return to_key(tl.where(cosines != cosines, NO_COSINE, cosines), inside)


@triton.jit
def dots(at, inside, chosen, D: tl.constexpr, PIECE: tl.constexpr):
    """Products of every token with its window's chosen one, and squared norms."""
    dot = tl.zeros(chosen.shape, tl.float32)
    norm2 = tl.zeros(chosen.shape, tl.float32)
    for start in range(0, D, PIECE):
        x = load_piece(at, inside, start, D, PIECE)
        other = tl.sum(tl.where(chosen[:, :, None], x, 0.0), 1)
        dot += tl.sum(x * other[:, None, :], 2)
        norm2 += tl.sum(x * x, 2)
    return dot, norm2


@triton.jit
def medoid(at, inside, listed, j, size, D: tl.constexpr, PIECE: tl.constexpr):
    """Place in each window of the token most like its mean, the lowest where several are."""
    dot = tl.zeros(listed.shape, tl.float32)
    norm2 = tl.zeros(listed.shape, tl.float32)
    mean2 = tl.zeros(size.shape, tl.float32)
    count = tl.maximum(size, 1).to(tl.float32)[:, None]
    for start in range(0, D, PIECE):
        x = load_piece(at, inside, start, D, PIECE)
        mean = tl.div_rn(tl.sum(x, 1), tl.broadcast_to(count, (x.shape[0], x.shape[2])))
        dot += tl.sum(x * mean[:, None, :], 2)
        norm2 += tl.sum(x * x, 2)
        mean2 += tl.sum(mean * mean, 1)
    key = cosine_key(dot, norm2, mean2[:, None], inside)
    best = listed & (key == tl.max(tl.where(listed, key, LOWEST), 1)[:, None])
    return tl.min(tl.where(best, j, listed.shape[1]), 1)


@triton.jit
def rank_of(key, j, n: tl.constexpr):
    """How many tokens of its window come before each: smaller keys, of equal ones those before it."""
    rank = tl.zeros(key.shape, tl.int32)
    for i in range(n):
        other = at_place(j == i, key)
        rank += ((other < key) | ((other == key) & (i < j))).to(tl.int32)
    return rank


@triton.jit
def nearest(at, inside, kept, norm2, j, slot, row, n: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr):
    """Slot and packed row of the kept token of its window that each token is most similar to, the lowest of several."""
    best = tl.full(j.shape, LOWEST, tl.int32)
    best_slot = tl.zeros(j.shape, tl.int32)
    best_row = tl.zeros(j.shape, tl.int32)
    for i in range(n):
        chosen = inside & (j == i)
        dot, _ = dots(at, inside, chosen, D, PIECE)
        stays = at_place(chosen, kept.to(tl.int32)) > 0
        key = tl.where(stays, cosine_key(dot, norm2, at_place(chosen, norm2), inside), LOWEST)
        better = key > best
        best = tl.where(better, key, best)
        best_slot = tl.where(better, at_place(chosen, slot), best_slot)
        best_row = tl.where(better, at_place(chosen, row), best_row)
    return best_slot, best_row


@triton.jit
def bits_set(word):
    """Number of bits set in int32 words."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def rows_before(kept, slot, WORDS: tl.constexpr):
    """Kept slots of the tile before each slot: kept slots as a bitmask, and bits counted."""
    w = tl.arange(0, WORDS)[None, None, :]
    of_slot = (slot >> 5)[:, :, None]
    bit = (kept.to(tl.int32) << (slot & 31))[:, :, None]
    words = tl.sum(tl.sum(tl.where(of_slot == w, bit, 0), 1), 0)[None, None, :]  # distinct bits: the sum is their union
    below = (~(-1 << (slot & 31)))[:, :, None]
    before = tl.where(w < of_slot, words, tl.where(w == of_slot, words & below, 0))
    return tl.sum(bits_set(before), 2)


# fmt: off
@triton.jit
def prune_tile(
    q, windows, centres, tokens, share, total, kept_out, counts, source, position, b, head, tile, heads, tiles,
    first_rows, length, stride_b, stride_h, stride_n, stride_s,
    A: tl.constexpr, n: tl.constexpr, WA: tl.constexpr, WN: tl.constexpr, SLOTS: tl.constexpr, WORDS: tl.constexpr,
    Q: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr, FILL: tl.constexpr, MEDOID: tl.constexpr,
    IN_MEMORY: tl.constexpr, RASTER: tl.constexpr,
):
    """One query tile of one head."""
    a = tl.arange(0, WA)
    j = tl.broadcast_to(tl.arange(0, WN)[None, :], (WA, WN))
    listed = (a < A)[:, None] & (j < n)
    slot = tl.load(windows + (tile * A + a[:, None]) * n + j, mask=listed, other=-1)
    inside = slot >= 0
    size = tl.sum(inside.to(tl.int32), 1)
    start = b.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + tile.to(tl.int64) * stride_n
    token = tl.load(tokens + first_rows + tile * SLOTS + slot, mask=inside, other=0)
    at = q + start + (token if RASTER else slot).to(tl.int64) * stride_s  # in raster order stride_n is 0
    if MEDOID:
        place = medoid(at, inside, listed, j, size, D, PIECE)
    else:
        place = tl.load(centres + tile * A + a, mask=a < A, other=0)
    chosen = inside & (j == place[:, None])
    dot, norm2 = dots(at, inside, chosen, D, PIECE)
    key = cosine_key(dot, norm2, at_place(chosen, norm2), inside)
    key = tl.where(inside, tl.where(chosen, LOWEST, key), PAST_KEYS)
    number = tl.load(share) if IN_MEMORY else share.to(tl.float64, bitcast=True)
    quota = tl.ceil(size.to(tl.float64) * number).to(tl.int32)
    kept = inside & (rank_of(key, j, n) < quota[:, None])

    row = rows_before(kept, slot, WORDS)
    if FILL == "nearest":
        taken, taken_row = nearest(at, inside, kept, norm2, j, slot, row, n, D, PIECE)
        taken_token = tl.load(tokens + first_rows + tile * SLOTS + taken, mask=inside, other=0)
    else:
        taken_token, taken_row = at_place(chosen, token), at_place(chosen, row)
    of_source = tl.where(kept, token, taken_token)
    of_row = first_rows + tile * Q + tl.where(kept, row, taken_row)
    if FILL == "zero":
        of_source, of_row = tl.where(kept, of_source, -1), tl.where(kept, of_row, -1)
    of_head = (b.to(tl.int64) * heads + head) * length
    tl.store(source + of_head + token, of_source, mask=inside)
    tl.store(position + of_head + token, of_row, mask=inside)

    of_tile = (b.to(tl.int64) * heads + head) * tiles + tile
    tl.store(kept_out + of_tile * Q + row, token, mask=kept & (row < Q))
    rest = tl.arange(0, Q)
    first = tl.load(tokens + first_rows + tile * SLOTS)
    stay = tl.sum(tl.sum(kept.to(tl.int32), 1), 0)
    tl.store(kept_out + of_tile * Q + rest, tl.broadcast_to(first, (Q,)), mask=rest >= stay)
    tl.store(counts + tile, tl.sum(quota, 0), mask=(b == 0) & (head == 0))
    weight = kept.to(tl.float32)[:, :, None]
    for piece in range(0, D, PIECE):
        d = piece + tl.arange(0, PIECE)
        x = load_piece(at, inside, piece, D, PIECE) * weight  # a product: a NaN stays visible, as in plain torch
        tl.store(total + of_tile * D + d, tl.sum(tl.sum(x, 1), 0), mask=d < D)


@triton.jit
def extra_tile(tokens, source, position, bh, tile, tiles, first_rows, length, SLOTS: tl.constexpr, Q: tl.constexpr):
    """One tile of extra tokens of one head: each is its own source; the last ones stand after the packed queries."""
    last = tile * SLOTS >= first_rows
    row = tile * SLOTS + tl.arange(0, SLOTS)
    at = tl.where(last, row + tiles * SLOTS, row)
    token = tl.load(tokens + at)
    where = bh.to(tl.int64) * length + token
    tl.store(source + where, token, mask=token >= 0)
    tl.store(position + where, tl.where(last, row + tiles * Q, row), mask=token >= 0)


@triton.jit(do_not_specialize=["share", "heads", "tiles", "extra", "first_rows", "length", "programs"])
def prune_kernel(
    q, windows, centres, tokens, share, total, kept, counts, source, position, heads, tiles, extra, first_rows, length,
    programs, stride_b, stride_h, stride_n, stride_s,
    A: tl.constexpr, n: tl.constexpr, WA: tl.constexpr, WN: tl.constexpr, SLOTS: tl.constexpr, WORDS: tl.constexpr,
    Q: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr, FILL: tl.constexpr, MEDOID: tl.constexpr,
    IN_MEMORY: tl.constexpr, RASTER: tl.constexpr,
):
    """The head runs fastest, then the tile, then the batch; the first `programs` are query tiles, the others extra tiles."""
    program = tl.program_id(0)
    if program < programs:
        prune_tile(
            q, windows, centres, tokens, share, total, kept, counts, source, position,
            program // heads // tiles, program % heads, program // heads % tiles, heads, tiles, first_rows, length,
            stride_b, stride_h, stride_n, stride_s, A, n, WA, WN, SLOTS, WORDS, Q, D, PIECE, FILL, MEDOID, IN_MEMORY,
            RASTER,
        )
    else:
        other = program - programs
        extra_tile(tokens, source, position, other // extra, other % extra, tiles, first_rows, length, SLOTS, Q)
# fmt: on


def refusal(dtype: torch.dtype, windows: Tensor) -> str | None:
    """Why plain torch must prune; None where the kernel can. ``windows`` is ``[N, A, n]``."""
    if dtype not in TYPES:
        return f"the kernel computes no {dtype}"
    A, n = windows.shape[1:]
    if triton.next_power_of_2(A) * triton.next_power_of_2(n) > MOST_TOKENS:
        return f"a tile has {A} windows of {n} tokens, more than the kernel holds"
    return None


TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def config(A: int, n: int, D: int) -> dict[str, int]:
    """Block sizes and warps: 16 numbers of the tokens for each thread; 32 spill."""
    WA, WN = triton.next_power_of_2(A), triton.next_power_of_2(n)
    warps = 8 if WA * WN >= 128 else 4
    piece = min(triton.next_power_of_2(D), max(8, 512 * warps // (WA * WN)), 128)
    return {"WA": WA, "WN": WN, "PIECE": piece, "num_warps": warps}


def prune(
    q: Tensor,
    windows: Tensor,
    centres: Tensor,
    tokens: Tensor,
    share: float | Tensor,
    first_rows: int,
    length: int,
    packed: int,
    fill: str,
    representative: str,
    slots: int = 0,
) -> Pruned:
    """`ops.prune_queries.prune_reference` in one launch; sums are float32, in a fixed order.

    Args:
        q: ``[B, H, N, s, D]``, or with ``slots`` ``[B, H, S, D]`` in raster order; float32, bfloat16 or float16, any strides.
        windows: int32 ``[N, A, n]``, -1 where a window has fewer tokens; every token of a tile is in one window.
        centres: int32 ``[N, A]``.
        tokens: int32 ``[P]``.
        share: a number, or a 0-d tensor; one on another device than q (the CPU) is read.
        first_rows, length, packed, fill, representative, slots: as for the op.
    """
    q = q if q.stride(-1) == 1 else q.contiguous()
    B, H, D = *q.shape[:2], q.shape[-1]
    (N, A, n), s = windows.shape, slots or q.shape[3]
    strides = (*q.stride()[:2], 0, q.stride(2)) if slots else q.stride()[:4]
    if isinstance(share, Tensor):
        share = share.to(torch.float64).contiguous() if share.device == q.device else float(share)
    in_memory = isinstance(share, Tensor)
    bits = share if in_memory else struct.unpack("<q", struct.pack("<d", share))[0]  # Triton would make it float32
    device = q.device
    ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
    total = torch.empty((B, H, N, 1, D), dtype=torch.float32, device=device)
    kept, counts = torch.empty((B, H, N, packed), **ints), torch.zeros(N, **ints)  # written by the first head, if any
    source, position = torch.empty((B, H, length), **ints), torch.empty((B, H, length), **ints)
    extra = tokens.shape[0] // s - N
    tensors = (q, windows, centres, tokens.contiguous(), bits, total, kept, counts, source, position)
    sizes = (H, N, extra, first_rows, length, B * H * N)
    meta: dict[str, Any] = {"A": A, "n": n, "SLOTS": s, "WORDS": max(1, s // 32), "Q": packed, "D": D}
    meta |= {"FILL": fill, "MEDOID": representative == "medoid", "IN_MEMORY": in_memory, "RASTER": slots > 0}
    launch(prune_kernel, (B * H * (N + extra),), *tensors, *sizes, *strides, **meta, **config(A, n, D))
    return total, kept, counts, source, position


def compilations(long_tail: bool) -> list[Compilation]:
    """Configurations of `prune_kernel` to compile offline; ptxas spills a little in some of the last, all rare."""
    eight, whole = (2, 2, 2), None
    cases: list[tuple[Any, ...]] = [
        ("bf16", D, tile, eight, "representative", False) for D in (64, 128) for tile in ((4, 4, 4), (4, 4, 8))
    ]
    cases += [("fp16", 128, (4, 4, 8), eight, "representative", False)]
    few = auto = len(cases)
    if long_tail:
        cases += [("bf16", 128, (4, 4, 8), eight, "zero", medoid) for medoid in (False, True)]
        cases += [("bf16", 128, tile, whole, "representative", True) for tile in ((4, 4, 4), (4, 4, 8))]
        cases += [("fp32", 128, (4, 4, 8), eight, "representative", False)]
        cases += [("bf16", 128, (4, 4, 8), eight, "representative", False, True)]
        auto = len(cases)
        cases += [("bf16", 128, (3, 5, 4), eight, "representative", False)]
        cases += [("bf16", 128, (4, 4, 8), window, "nearest", False) for window in (eight, whole)]
        cases += [("bf16", 128, (4, 8, 8), whole, "nearest", True)]
    found = [_compilation(i < auto, *case) for i, case in enumerate(cases if long_tail else cases[:few])]
    in_raster = [("bf16", D, (4, 4, 4), eight, "representative", False) for D in (64, 128)]
    return found + [_compilation(True, *case, raster=True) for case in in_raster]


def _compilation(
    auto: bool,
    dtype: str,
    D: int,
    tile: tuple[int, int, int],
    window: tuple[int, int, int] | None,
    fill: str,
    medoid: bool,
    scheduled: bool = False,
    raster: bool = False,
) -> Compilation:
    sides = tile if window is None else window
    slots = triton.next_power_of_2(tile[0] * tile[1] * tile[2])
    n = sides[0] * sides[1] * sides[2]
    A = triton.cdiv(tile[0], sides[0]) * triton.cdiv(tile[1], sides[1]) * triton.cdiv(tile[2], sides[2])
    meta = config(A, n, D)
    constants: dict[str, Any] = {"A": A, "n": n, "SLOTS": slots, "WORDS": max(1, slots // 32), "Q": slots // 2, "D": D}
    constants |= {name: meta[name] for name in ("WA", "WN", "PIECE")}
    constants |= {"FILL": fill, "MEDOID": medoid, "IN_MEMORY": scheduled, "RASTER": raster}
    pointers = {"q": f"*{dtype}", "total": "*fp32"}
    pointers |= dict.fromkeys(("windows", "centres", "tokens", "kept", "counts", "source", "position"), "*i32")
    types = {**pointers, "share": "*fp64" if scheduled else "i64"}
    names = prune_kernel.arg_names
    return Compilation(
        kernel=prune_kernel,
        config={
            "dtype": dtype,
            "D": D,
            "slots": slots,
            "windows": f"{A}x{n}",
            "fill": fill,
            "medoid": medoid,
            "scheduled": scheduled,
        }
        | ({"raster": True} if raster else {}),
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constants=constants,
        aligned=(*pointers, *(name for name in names if name.startswith("stride_"))),
        num_warps=meta["num_warps"],
        num_stages=1,
        auto=auto,
    )
