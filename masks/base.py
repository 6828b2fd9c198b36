"""What mask builders share: the coarse stage's inputs and the primitives of selection.

Shape letters: B batch, H query heads, G KV heads, S tokens, N query tiles, M KV tiles, D head dim.
Everything from pooling to the choice of tiles is plain torch where a compiler looks on, so that it sees the whole chain.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from flexsparse.arguments import check_cut_tiles, check_tile_counts, other_tokens, softmax_scale
from flexsparse.autocast import autocast_off
from flexsparse.given import never_changes
from flexsparse.layout import TileLayout
from flexsparse.masks.checked import checked_mask, planned
from flexsparse.ops.choice import Rule, masked_softmax
from flexsparse.ops.coarse_select import pool_tiles
from flexsparse.ops.select_tiles import allowed_bits, select_tiles
from flexsparse.schedule import BoundRatio, SparsitySchedule
from flexsparse.selection import TileSelection
from flexsparse.tables import is_tracing, lasting, valid_slots
from flexsparse.tile_bits import pack_bits


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of pooled vectors and scores: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def pool(x: Tensor, counts: Tensor, masked: bool = False) -> Tensor:
    """Mean over the valid tokens of each tile, accumulated in at least float32 (VSA, section 2.2).

    Args:
        x: ``[B, H, N, slots, D]`` tile order.
        counts: int32 ``[N]`` or ``[B, N]`` valid tokens of each tile; a tile with none pools to zero.
        masked: whether slots past the count may hold anything (else they are zero).

    Returns:
        ``[B, H, N, D]``, at least float32.
    """
    if masked:
        each = counts if counts.dim() == 1 else counts[:, None]
        x = x.masked_fill((torch.arange(x.shape[3], device=x.device) >= each[..., None])[..., None], 0)
    return pool_tiles(x, counts)


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, G, ...]`` to ``[B, H, ...]``: query head h reads KV head ``h // (H / G)``."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def keep_top(scores: Tensor, n: int | Tensor) -> Tensor:
    """The best ``n`` entries of each row: exactly ``n``, ties to the lowest index. For builders of your own.

    Args:
        scores: ``[B, H, N, M]``; -inf for what must not be chosen first.
        n: how many, an int or an integer tensor that broadcasts to ``[B, H, N, 1]``.

    Returns:
        Bool ``[B, H, N, M]``.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(scores.shape[-1], device=scores.device) < n
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, first.expand(scores.shape))


@dataclass(frozen=True)
class CoarseInputs:
    """What a builder selects from: tiles of queries and keys, without the extra tokens.

    Attributes:
        q: ``[B, H, N, slots, D]`` tile order, padding zero.
        k: ``[B, G, M, slots, D]``.
        layout: query layout.
        kv_layout: KV layout.
        scale: softmax scale.
        tile_counts: an override of the KV tiles' valid tokens, int32 ``[tiles]`` or ``[B, tiles]``.
        same: whether queries and keys are the same tokens, so that the override holds for queries too.
        tables: where tokens are in raster order, ``q [B, H, S, D]`` and ``k [B, G, Z, D]``, the tables by which
            `ops.coarse_select` finds those of a tile: for builders that do not read tiles themselves
            (`MaskBuilder.reads_tiles`), uncompiled and without an override. None: they are tiles.
    """

    q: Tensor
    k: Tensor
    layout: TileLayout
    kv_layout: TileLayout
    scale: float
    tile_counts: Tensor | None = None
    same: bool = True
    tables: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    @property
    def kv_counts(self) -> Tensor:
        """Valid tokens of the KV video tiles, int32 ``[M]`` or ``[B, M]``."""
        kv = self.kv_layout
        counts = kv.index(self.k.device)[2] if self.tile_counts is None else self.tile_counts
        return counts.narrow(-1, kv.tiles_first, kv.num_tiles)

    @property
    def q_counts(self) -> Tensor:
        """Valid tokens of the query video tiles, int32 ``[N]`` or ``[B, N]``."""
        if self.tile_counts is not None and self.same:
            return self.kv_counts
        return self.layout.index(self.q.device)[2].narrow(-1, self.layout.tiles_first, self.layout.num_tiles)

    def pooled_q(self) -> Tensor:
        """``[B, H, N, D]``."""
        return pool(self.q, self.q_counts, masked=self.tile_counts is not None and self.same)

    def pooled_k(self) -> Tensor:
        """``[B, H, M, D]``, expanded to the query heads."""
        return expand_heads(pool(self.k, self.kv_counts, self.tile_counts is not None), self.q.shape[1])

    def pooled_v(self, v: Tensor) -> Tensor:
        """``[B, G, M, slots, D]`` values to ``[B, H, M, D]``."""
        return expand_heads(pool(v, self.kv_counts, self.tile_counts is not None), self.q.shape[1])

    def selection(self, bits: Tensor, counts: Tensor, capacity: int, **fields: Any) -> TileSelection:
        """The tiles that a builder chose, from bitmask and counts."""
        return TileSelection(
            bits=bits,
            counts=counts,
            layout=self.layout,
            kv_layout=self.kv_layout,
            capacity=capacity,
            tile_counts=self.tile_counts,
            **fields,
        )

    def alive(self) -> Tensor | None:
        """Bool, broadcasts to ``[B, H, N, M]``: KV tiles that hold a token; None where all do."""
        if self.tile_counts is None:
            return None
        alive = self.kv_counts > 0
        return alive if alive.dim() == 1 else alive[:, None, None]


class MaskBuilder:
    """Maps (q, k, layout) to a `TileSelection`.

    Ours are frozen dataclasses. A builder of your own needs `plan` only, or just an object with ``select``.
    """

    has_coarse: ClassVar[bool] = False
    """Whether the builder has a coarse output, which a gate can use."""
    reads_tiles: ClassVar[bool] = True
    """Whether `plan` reads tokens of tiles itself; False where it leaves them to `coarse_stage`, which reads any order."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "plan" in vars(cls) and "reads_tiles" not in vars(cls):  # another plan may read them
            cls.reads_tiles = True

    def plan(self, coarse: CoarseInputs, v: Tensor | None = None) -> tuple[TileSelection, Tensor | None]:
        """Select, and compute the coarse output where ``v`` is given.

        Args:
            coarse: tiles of queries and keys. Gradients flow through them to the coarse output only.
            v: ``[B, G, M, slots, D]`` values, or None where no coarse output is wanted.

        Returns:
            The selection, and the coarse output ``[B, H, N, D]`` or None.
        """
        raise NotImplementedError(f"{type(self).__name__} must define plan()")

    def select(
        self,
        q: Tensor,
        k: Tensor,
        layout: TileLayout,
        kv_layout: TileLayout | None = None,
        scale: float | None = None,
        tile_counts: Tensor | None = None,
    ) -> TileSelection:
        """The critical tiles of every query tile; no gradient.

        Args:
            q: queries ``[B, H, S, D]`` in raster order, after QK-norm and RoPE.
            k: keys ``[B, G, S_kv, D]``, H divisible by G.
            layout: query layout.
            kv_layout: KV layout where keys are other tokens; the query layout by default.
            scale: softmax scale, ``D ** -0.5`` by default.
            tile_counts: valid tokens of every KV tile where they differ from the layout's, int32 ``[tiles]`` or
                ``[B, tiles]``, in sequence order; zero is allowed.

        Raises:
            ValueError: shapes that disagree with the layouts, or parameters that the layout cannot meet.
        """
        kv_layout, same = other_tokens(layout, kv_layout, tile_counts), kv_layout is None
        kv_layout = layout if kv_layout is None else kv_layout
        self.check(layout, kv_layout)
        if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
            raise ValueError(
                f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}: give [B, H, S, D] and [B, G, S_kv, D]"
            )
        if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
            raise ValueError(f"q has {q.shape[1]} heads and k has {k.shape[1]}: q's must be a multiple of k's (GQA)")
        if q.shape[3] == 0:
            raise ValueError(f"q has shape {tuple(q.shape)}: give a head dim of at least 1")
        scale = softmax_scale(scale, q.shape[3])
        if tile_counts is not None:
            check_tile_counts(tile_counts, q.shape[0], kv_layout)
        with torch.no_grad(), autocast_off(q.device.type):  # scores are of float32
            k_tiles = kv_layout.to_tiles(k.detach())
            if tile_counts is not None:  # as in `attention.tiles_of`: what lies past a count may be anything
                k_tiles = k_tiles.masked_fill(~valid_slots(k_tiles, tile_counts, kv_layout.slots), 0)
            coarse = CoarseInputs(
                layout.video(layout.to_tiles(q.detach())),
                kv_layout.video(k_tiles),
                layout,
                kv_layout,
                scale,
                tile_counts,
                same,
            )
            selection = planned(self, coarse)[0]
            if selection.queries is not None and tile_counts is not None and same and not is_tracing():
                check_cut_tiles(tile_counts, layout)
            return selection

    def check(self, layout: TileLayout, kv_layout: TileLayout) -> None:
        """Raise a `ValueError` where the parameters do not fit the layouts."""

    def nominal_density(self, layout: TileLayout, kv_layout: TileLayout) -> float:
        """The density that the parameters ask for, in tiles; what a selection has is `TileSelection.density`."""
        raise NotImplementedError(f"{type(self).__name__} does not say its density")

    def schedules(self) -> tuple[SparsitySchedule, ...]:
        """The schedules among the parameters, nested builders included."""
        found: list[SparsitySchedule] = []
        for value in self._values():
            if isinstance(value, SparsitySchedule):
                found.append(value)
            elif isinstance(value, MaskBuilder):
                found.extend(value.schedules())
        return tuple(found)

    def bind(self, tensors: dict[int, Tensor]) -> MaskBuilder:
        """A copy that reads each schedule from a tensor of the graph being traced, keyed by the schedule's id."""

        def replace(value: Any) -> Any:
            if isinstance(value, SparsitySchedule):
                low, high = sorted((value.start, value.target))
                return BoundRatio(tensors[id(value)], low, high)
            if isinstance(value, MaskBuilder):
                return value.bind(tensors)
            if isinstance(value, tuple):
                return tuple(replace(item) for item in value)
            return value

        if not self.schedules():
            return self
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return dataclasses.replace(self, **{f.name: replace(getattr(self, f.name)) for f in fields})  # type: ignore[type-var]

    def _values(self) -> list[Any]:
        if not dataclasses.is_dataclass(self):
            return []
        values: list[Any] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            values.extend(value if isinstance(value, tuple) else (value,))
        return values


@functools.lru_cache(64)
@torch.inference_mode(False)  # what is cached must serve training later
def _cached_mask(builder: StaticBuilder, layout: TileLayout, kv_layout: TileLayout, device: torch.device) -> Tensor:
    return checked_mask(builder, layout, kv_layout, device)


@functools.lru_cache(64)
@torch.inference_mode(False)
def _cached_bits(
    builder: StaticBuilder, layout: TileLayout, kv_layout: TileLayout, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    mask = checked_mask(builder, layout, kv_layout, torch.device("cpu"))
    counts = mask.sum(-1, dtype=torch.int32)
    bits, counts = lasting((pack_bits(mask), counts), device)
    return bits, counts, max(1, int(counts.max()))


class StaticBuilder(MaskBuilder):
    """A builder whose tiles depend on the layout alone: built once per layout and cached.

    Cached are frozen dataclasses of numbers, texts and such builders; of another class, which may change, `tile_mask` is called
    at every call.

    In a compiled graph the mask is a few comparisons that fuse into whatever reads it.
    """

    reads_tiles: ClassVar[bool] = False

    def tile_mask(self, layout: TileLayout, kv_layout: TileLayout, device: torch.device) -> Tensor:
        """Bool ``[N, M]``: tiles that each query tile keeps."""
        raise NotImplementedError(f"{type(self).__name__} must define tile_mask()")

    def mask(self, layout: TileLayout, kv_layout: TileLayout, device: torch.device) -> Tensor:
        """`tile_mask`, cached."""
        if not self._cached(layout, kv_layout):
            return checked_mask(self, layout, kv_layout, device)
        return _cached_mask(self, layout, kv_layout, device)

    def plan(self, coarse: CoarseInputs, v: Tensor | None = None) -> tuple[TileSelection, Tensor | None]:
        layout, kv_layout = coarse.layout, coarse.kv_layout
        heads, device, alive = coarse.q.shape[:2], coarse.q.device, coarse.alive()
        if alive is None and self._cached(layout, kv_layout):
            bits, counts, capacity = _cached_bits(self, layout, kv_layout, device)
        else:
            keep = self.mask(layout, kv_layout, device)
            bits, counts = torch.ops.flexsparse.pack_tiles(keep if alive is None else keep & alive)
            capacity = self.most(layout, kv_layout)
        # one mask for all heads, packed before it is repeated
        bits, counts = bits.expand(*heads, *bits.shape[-2:]), counts.expand(*heads, counts.shape[-1])
        return coarse.selection(bits.contiguous(), counts.contiguous(), capacity), None

    def _cached(self, layout: TileLayout, kv_layout: TileLayout) -> bool:
        return not (is_tracing() or layout.symbolic or kv_layout.symbolic) and never_changes(self)

    def most(self, layout: TileLayout, kv_layout: TileLayout) -> int:
        """An upper bound of the tiles that a row keeps: the static length of its list in a graph."""
        return kv_layout.num_tiles

    def nominal_density(self, layout: TileLayout, kv_layout: TileLayout) -> float:
        return float(self.mask(layout, kv_layout, torch.device("cpu")).double().mean())


def tile_axes(layout: TileLayout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tile coordinates (t, h, w) of every video tile, int64 ``[N]`` each."""
    _, h, w = layout.tiles
    index = torch.arange(layout.num_tiles, device=device)
    return index // (h * w), index // w % h, index % w


def candidates(within: StaticBuilder | None, coarse: CoarseInputs) -> Tensor | None:
    """Bool, broadcasts to ``[B, H, N, M]``: tiles that may be chosen; None where all may."""
    alive = coarse.alive()
    if within is None:
        return alive
    mask = within.mask(coarse.layout, coarse.kv_layout, coarse.q.device)
    return mask if alive is None else mask & alive


def tile_scores(q_c: Tensor, k_c: Tensor, scale: float) -> Tensor:
    """Scores between tiles ``[B, H, N, M]`` from pooled vectors ``[B, H, N, D]`` and ``[B, H, M, D]``."""
    return (q_c @ k_c.transpose(-1, -2)) * scale


class Coarse(NamedTuple):
    """What a coarse stage found.

    Attributes:
        bits: int32 ``[B, H, N, W]`` (`pack_bits`).
        counts: int32 ``[B, H, N]``.
        wanted: int32 ``[B, H, N]``, tiles wanted before the capacity cut them.
        out: coarse output ``[B, H, N, D]``, or None.
    """

    bits: Tensor
    counts: Tensor
    wanted: Tensor
    out: Tensor | None


def coarse_stage(
    coarse: CoarseInputs,
    v: Tensor | None,
    rule: Rule,
    capacity: int,
    *,
    within: StaticBuilder | None = None,
    count_bias: bool = False,
    q_c: Tensor | None = None,
) -> Coarse:
    """Pool, score, choose, and compute the coarse output where ``v`` is given.

    A compiler sees plain torch and fuses it (`compile_passes.FuseSelection`); uncompiled, the fused op runs at once.

    Args:
        coarse: tiles of queries and keys.
        v: ``[B, G, M, slots, D]`` values, or None.
        rule: which tiles a row keeps.
        capacity: the most tiles that a row keeps.
        within: a static builder; only its tiles are candidates.
        count_bias: add ``log(valid tokens)`` of a KV tile to its score.
        q_c: pooled queries ``[B, H, N, D]``, where they are not the mean of their tiles.
    """
    allowed = candidates(within, coarse)
    masked = coarse.tile_counts is not None
    if is_tracing():
        scores = tile_scores(coarse.pooled_q() if q_c is None else q_c, coarse.pooled_k(), coarse.scale)
        if count_bias:
            log_counts = coarse.kv_counts.clamp_min(1).to(scores.dtype).log()
            scores = scores + (log_counts if log_counts.dim() == 1 else log_counts[:, None, None])
        bits, counts, wanted = select_tiles(scores.detach(), allowed, rule, capacity)
        weighted = None if v is None else masked_softmax(scores, allowed) @ coarse.pooled_v(v)
        return Coarse(bits, counts, wanted, weighted)
    if masked and coarse.same and q_c is None:
        q_c = coarse.pooled_q()
    q, q_counts = coarse.q, coarse.q_counts
    if q_c is not None:  # pooled already: tiles of one token
        q, q_counts = q_c[:, :, :, None], torch.ones_like(q_counts)
    among = None if allowed is None else allowed_bits(allowed, coarse.layout.num_tiles)
    how = (rule.now, rule.name, rule.value, rule.min_tiles, capacity, coarse.scale, count_bias)
    tables = coarse.tables or ()
    found = torch.ops.flexsparse.coarse_select(q, coarse.k, v, q_counts, coarse.kv_counts, among, *how, *tables)
    return Coarse(found[5], found[6], found[7], None if v is None else found[0])


def check_within(name: str, within: Any) -> None:
    """Raise a `TypeError` where ``within`` is no static builder."""
    if within is not None and not isinstance(within, StaticBuilder):
        raise TypeError(
            f"{name} within is {within!r}: give a static builder (SlidingTile, Radial, FrameCausal, Dense, or a "
            "combination of them)"
        )
