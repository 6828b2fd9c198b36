"""BSA: bidirectional sparse attention (arXiv 2509.01085): queries and KV tiles are both sparse.

The paper leaves much open and no code of it is public; each choice is an option here, and the default is the reading
that `DESIGN.md` argues for. Shape letters as in `base`, and Q packed queries of a tile.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from flexsparse.given import keywords_only, to_axes
from flexsparse.layout import TileLayout
from flexsparse.masks.base import MaskBuilder
from flexsparse.masks.coarse import CoarseInputs, coarse_stage, tile_scores
from flexsparse.masks.static import StaticBuilder, check_within
from flexsparse.masks.top_p import check_tiles
from flexsparse.masks.windows import window_counts, window_in, window_sizes
from flexsparse.ops.choice import Rule, masked_softmax, read, row_threshold
from flexsparse.ops.coarse_select import pool_tiles
from flexsparse.ops.prune_queries import prune_queries as pruning
from flexsparse.ops.windows import Axes
from flexsparse.schedule import Ratio, SparsitySchedule, check_ratio, current, highest, rule_of, target
from flexsparse.selection import KeptQueries, TileSelection
from flexsparse.tables import MIN_SLOTS, is_tracing, smaller

Fill = Literal["representative", "nearest", "zero"]
Representative = Literal["center", "medoid"]
Threshold = Literal["normal", "probability", "mass"]
ScoreQueries = Literal["kept", "all"]
Statistics = Literal["row", "head"]


@keywords_only(either="kv_density")
@dataclass(frozen=True, kw_only=True)
class BSA(MaskBuilder):
    """Compute the queries that differ most from their window's representative, on the KV tiles above a threshold.

    Args:
        keep_queries: share of the valid tokens of a window to compute, in (0, 1], or a `SparsitySchedule` from 1
            down (its packed queries take the room of its highest value until the graph is compiled again). The
            representative is always computed; of the others, the least similar to it (cosine, per head; ties: lowest
            slot; what is not finite before all others), until ``ceil(keep_queries * tokens)`` are in.
        kv_density: share of KV tiles that ``threshold="normal"`` and ``"probability"`` aim at, in (0, 1], or a
            `SparsitySchedule` (not with ``"mass"``, which does not read it).
        window: tokens of a window along (t, h, w); None for the whole tile. Temporal and spatial extents are
            separate choices (the paper's "dynamic spatial-time" strategy is not specified).
        min_tiles: KV tiles that every row keeps at least.
        max_tiles: static capacity of a row, by default ``min(M, ceil(2 * kv_density * M) + min_tiles)``, or all tiles
            where the threshold does not aim at a density. Rows that want more keep their best and are counted.
        threshold: ``"normal"`` keeps logits above ``mean + std * Phi^-1(1 - kv_density)`` (population std), which hits
            the target at any spread of the logits; ``"probability"`` does the same on their softmax (keeps fewer the
            more peaked a row is); ``"mass"`` keeps the smallest set whose softmax mass reaches ``mass`` (what
            FastVideo's backend does).
        mass: for ``threshold="mass"``, in (0, 1], or a `SparsitySchedule` (not with the others).
        statistics: mean and std of each ``"row"`` (the paper: for each query), or of a whole ``"head"`` (not with
            ``within``: each row would depend on the tiles that others may see; nor with ``"mass"``, which has none).
        score_queries: pool the ``"kept"`` queries (what is computed) or ``"all"`` of a tile for the logits.
        fill: what a pruned token gets: the output of its window's ``"representative"`` (pruned tokens are those most
            similar to it), of the ``"nearest"`` kept token of its window (highest cosine), or ``"zero"`` (the model's
            residual connection only).
        representative: the token at the ``"center"`` of the window's valid extent, or its ``"medoid"`` (most similar
            to the window's mean; ties: lowest slot).
        within: a static builder; only its tiles are candidates.

    Raises:
        ValueError: a parameter out of range, or a schedule that the threshold does not read.
        TypeError: a parameter of another type, or ``within`` that is no static builder.
    """

    keep_queries: Ratio = 0.5
    kv_density: Ratio = 0.1
    window: Axes | None = (2, 2, 2)
    min_tiles: int = 1
    max_tiles: int | None = None
    threshold: Threshold = "normal"
    mass: Ratio = 0.9
    statistics: Statistics = "row"
    score_queries: ScoreQueries = "kept"
    fill: Fill = "representative"
    representative: Representative = "center"
    within: StaticBuilder | None = None
    reads_tiles: ClassVar[bool] = False
    heads_alike: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("keep_queries", "kv_density", "mass"):
            object.__setattr__(self, name, check_ratio(f"BSA {name}", getattr(self, name), zero=False, one=True))
        least, most = check_tiles("BSA", self.min_tiles, self.max_tiles)
        object.__setattr__(self, "min_tiles", least)
        object.__setattr__(self, "max_tiles", most)
        check_within("BSA", self.within)
        for name, choices in (
            ("threshold", Threshold),
            ("statistics", Statistics),
            ("score_queries", ScoreQueries),
            ("fill", Fill),
            ("representative", Representative),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"BSA {name} is {getattr(self, name)!r}: give one of {get_args(choices)}")
        unread, instead = ("kv_density", "normal") if self.threshold == "mass" else ("mass", "mass")
        if isinstance(getattr(self, unread), SparsitySchedule):
            raise ValueError(
                f"BSA {unread} is {getattr(self, unread)!r}, but threshold={self.threshold!r} does not read it, and nothing "
                f"would be annealed: give threshold={instead!r}, or the schedule to the other"
            )
        if self.statistics == "head" and self.threshold == "mass":
            raise ValueError("BSA statistics is 'head', but threshold='mass' has no mean and deviation: leave it out")
        if self.statistics == "head" and self.within is not None:
            raise ValueError(
                "BSA statistics is 'head' and within is given: a threshold over all rows would let a row depend on "
                "tiles outside of it (the future, for FrameCausal); use statistics='row'"
            )
        if self.window is not None:
            window = to_axes(self.window)
            if window is None:
                raise ValueError(f"BSA window is {self.window!r}: give three ints (t, h, w) of at least 1, or None")
            object.__setattr__(self, "window", window)

    def check(self, layout: TileLayout, kv_layout: TileLayout) -> None:
        if self.within is not None:
            self.within.check(layout, kv_layout)

    def capacity(self, M: int) -> int:
        """Static list length: the most tiles that a row can keep."""
        if self.max_tiles is not None:
            return smaller(self.max_tiles, M)
        if self.threshold == "mass":
            return M
        return smaller(math.ceil(2 * highest(self.kv_density) * M) + self.min_tiles, M)

    @property
    def prunes(self) -> bool:
        """Whether any query can be pruned."""
        return not (isinstance(self.keep_queries, float | int) and self.keep_queries == 1)

    def packed(self, layout: TileLayout) -> int:
        """Q: packed queries of a tile, a power of two of at least 16."""
        share = highest(self.keep_queries)
        sizes = window_sizes(layout.sides, window_in(layout, self.window))
        kept = sum(math.ceil(share * size) for size in sizes)  # no cut tile keeps more than a full one
        return max(MIN_SLOTS, 1 << (kept - 1).bit_length())

    def query_rows(self, layout: TileLayout) -> int:
        return self.packed(layout) if self.prunes else layout.slots

    def plan(self, coarse: CoarseInputs, v: Tensor | None = None) -> tuple[TileSelection, Tensor | None]:
        queries, q_c = prune_queries(self, coarse.q.detach(), coarse.layout) if self.prunes else (None, None)
        q_c = q_c if self.score_queries == "kept" else None
        coarse = dataclasses.replace(coarse, q=coarse.q.detach(), k=coarse.k.detach())
        capacity = self.capacity(coarse.kv_layout.num_tiles)
        found = coarse_stage(coarse, None, self.rule(coarse, q_c), capacity, within=self.within, q_c=q_c)
        capped = coarse.cut(found.wanted, capacity)
        return coarse.selection(found.bits, found.counts, capacity, capped=capped, queries=queries), None

    def rule(self, coarse: CoarseInputs, q_c: Tensor | None) -> Rule:
        """How many tiles a row keeps; what is kept are the highest scores."""
        if self.threshold == "mass":
            return rule_of("mass", self.mass, self.min_tiles)
        if self.statistics == "row":
            return rule_of(self.threshold, self.kv_density, self.min_tiles)
        scores = tile_scores(coarse.pooled_q() if q_c is None else q_c, coarse.pooled_k(), coarse.scale)
        allowed = coarse.alive()
        values = masked_softmax(scores, allowed) if self.threshold == "probability" else scores
        density = current(self.kv_density)  # a number stays one: a graph would read a tensor of it on the CPU
        if isinstance(density, Tensor) and density.device.type == "cpu" and not is_tracing():
            density = read(density)  # which refuses where a CUDA graph would keep it
        counted = allowed
        if allowed is not None and coarse.same:  # query tiles without a token have no say
            rows = coarse.q_counts[..., None] > 0
            counted = allowed & (rows if rows.dim() == 2 else rows[:, None])
        above = (values > row_threshold(values, counted, density, (-2, -1))) | (density >= 1)
        above = above if allowed is None else above & allowed
        return Rule(name="top_k", now=above.sum(-1, keepdim=True), min_tiles=self.min_tiles)

    def nominal_density(self, layout: TileLayout, kv_layout: TileLayout) -> float:
        """`query_share` times the KV tiles that a row aims at, within its bounds; for ``"mass"`` an upper bound."""
        M = kv_layout.num_tiles
        capacity = self.capacity(M)
        allowed = torch.tensor([M], device="cpu")
        if self.within is not None:
            allowed = self.within.kept(layout, kv_layout)
        allowed = allowed.double()
        aim = allowed if self.threshold == "mass" else allowed * target(self.kv_density)
        kept = torch.minimum(aim.clamp_min(self.min_tiles), allowed).clamp_max(capacity)
        return self.query_share(layout) * float(kept.mean() / M)

    def query_share(self, layout: TileLayout) -> float:
        """Share of the video's query tokens that are computed; of a schedule, at its target."""
        valid = window_counts(layout, self.window)
        kept = (valid.double() * target(self.keep_queries)).ceil().sum()
        return float(kept / valid.sum())


def prune_queries(builder: BSA, q: Tensor, layout: TileLayout) -> tuple[KeptQueries, Tensor]:
    """Choose the queries to compute.

    Args:
        builder: its ``keep_queries``, ``window``, ``fill`` and ``representative``.
        q: ``[B, H, N, slots, D]`` queries in tile order, or ``[B, H, S, D]`` in raster order.
        layout: query layout.

    Returns:
        The kept queries, and their mean ``[B, H, N, D]``, at least float32.
    """
    share = current(builder.keep_queries)
    number, now = (share, None) if isinstance(share, int | float) else (1.0, share)
    grid, window = list(layout.grid), list(window_in(layout, builder.window))
    sizes = (layout.tiles_first * layout.slots, layout.seq_len, builder.packed(layout))
    how = (float(number), grid, list(layout.sides), window, *sizes, builder.fill, builder.representative)
    slots = layout.slots if q.dim() == 4 else 0
    total, *fields = pruning(q, layout.index(q.device)[0], now, *how, slots)
    queries = KeptQueries(*fields)
    return queries, pool_tiles(total, queries.counts)
