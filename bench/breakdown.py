"""Where the gather backend's forward spends its time: its pieces, timed one by one on the data of a case.

This repeats what `flexsparse/ops/gathered.py` does chunk by chunk where every tile is full and every row keeps the
same number of tiles (VSA on a grid that the tile divides). What the pieces leave of the whole is `other_ms`.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

import flexsparse as fs
from bench.cases import DENSE, Case
from bench.problem import Problem, forward, make
from flexsparse.masks.coarse import keep_top, pool, tile_scores
from flexsparse.ops import gathered
from flexsparse.tile_bits import ascending_lists

PIECES = (
    "tiling",
    "pooling_and_scores",
    "choice_of_tiles",
    "gathering_kv",
    "qk_matmul",
    "softmax",
    "pv_matmul",
    "untiling",
)


class Clock:
    """Adds up milliseconds by piece."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    def lap(self, piece: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.ms[piece] += (now - self.last) * 1e3
        self.last = now


def once(p: Problem) -> tuple[dict[str, float], Tensor]:
    """One forward in pieces: milliseconds of each, and the output."""
    B, H, _, D = p.q.shape
    layout = p.layout
    slots, M = layout.slots, layout.num_tiles
    scale = D**-0.5
    clock = Clock()
    q, k, v = (layout.to_tiles(x) for x in (p.q, p.k, p.v))
    clock.lap("tiling")
    counts = layout.tile_counts
    scores = tile_scores(pool(layout.video(q), counts), pool(layout.video(k), counts), scale)
    clock.lap("pooling_and_scores")
    n = p.builder.tiles_kept(M)
    selection = fs.TileSelection.from_mask(keep_top(scores, n), layout)
    lists = ascending_lists(selection.keep(), n).flatten(0, 2).long()
    flat = lists + torch.arange(B * H).repeat_interleave(M)[:, None] * M
    clock.lap("choice_of_tiles")
    rows = q.view(B * H * M, slots, D)
    k_flat, v_flat = (x.reshape(B * H * M, slots * D) for x in (k, v))
    out = torch.empty_like(rows)
    step = max(1, gathered.CHUNK_ENTRIES["forward"] // (slots * slots * n))
    room = gathered.Room(q.device)
    for start in range(0, len(flat), step):
        index = flat[start : start + step].reshape(-1)
        size, tokens = (len(index), slots * D), (len(index) // n, n * slots, D)
        k_c = torch.index_select(k_flat, 0, index, out=room.take("k", size, q.dtype)).view(tokens)
        clock.lap("gathering_kv")
        logits = room.take("logits", (tokens[0], slots, tokens[1]), q.dtype)
        part = rows[start : start + step]
        torch.baddbmm(q.new_zeros(()), part, k_c.transpose(1, 2), beta=0, alpha=scale, out=logits)
        clock.lap("qk_matmul")
        weights = torch.softmax(logits, -1, out=logits)
        clock.lap("softmax")
        v_c = torch.index_select(v_flat, 0, index, out=room.take("v", size, q.dtype)).view(tokens)
        clock.lap("gathering_kv")
        torch.bmm(weights, v_c, out=out[start : start + step])
        clock.lap("pv_matmul")
    result = layout.to_raster(out.view(B, H, M * slots, D))
    clock.lap("untiling")
    return clock.ms, result


def breakdown(case: Case, threads: int, repeats: int) -> dict[str, Any]:
    """Medians of the pieces of a case, beside the whole forward and dense in the same loop.

    Raises:
        ValueError: a case that the pieces do not stand for.
        RuntimeError: the pieces compute something else than the backend.
    """
    layout = case.layout
    if case.method != "vsa" or case.G != case.H or case.dtype != "float32" or layout.padded_len != layout.seq_len:
        raise ValueError(f"case {case.name}: a breakdown needs VSA, float32, H = G and a grid that the tile divides")
    torch.set_num_threads(threads)
    p = make(case, case.grid)
    whole: list[float] = []
    dense: list[float] = []
    pieces: list[dict[str, float]] = []
    with torch.no_grad():
        if not torch.allclose(once(p)[1], forward("flexsparse_gather", p)["out"], atol=1e-5):
            raise RuntimeError("the pieces of the breakdown do not add up to what the gather backend computes")
        forward(DENSE, p)
        for _ in range(repeats):
            for impl, samples in ((DENSE, dense), ("flexsparse_gather", whole)):
                start = time.perf_counter()
                forward(impl, p)
                samples.append((time.perf_counter() - start) * 1e3)
            pieces.append(once(p)[0])
    medians = {name: statistics.median(sample[name] for sample in pieces) for name in PIECES}
    forward_ms, dense_ms = statistics.median(whole), statistics.median(dense)
    flops = 4 * case.B * case.H * case.S**2 * case.D
    kept = p.selection.density * flops
    return {
        "case": case.name,
        "D": case.D,
        "threads": threads,
        "forward_ms": forward_ms,
        "dense_ms": dense_ms,
        "pieces_ms": medians,
        "other_ms": forward_ms - sum(medians.values()),
        "dense_gflops": flops / dense_ms / 1e6,
        "matmul_gflops": kept / (medians["qk_matmul"] + medians["pv_matmul"]) / 1e6,
    }
