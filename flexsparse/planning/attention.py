"""FLOPs and bytes of one attention call, dense and sparse, from its sizes alone.

A multiply-add is two FLOPs, as `torch.utils.flop_counter` counts; a backward is 2.5 times a forward (five products for
two), for the fine stage as for dense attention. The fine stage computes whole tiles: padding is computed and counted.
Shape letters: B batch, H query heads, S tokens, P padded tokens, N query tiles, M KV tiles, K list length, W words of a
bitmask row, D head dim.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from flexsparse.layout import TileLayout
from flexsparse.masks import BSA, VSA
from flexsparse.tile_bits import words_of

Builder = VSA | BSA
BACKWARD = 2.5
"""FLOPs of attention's backward over those of its forward: five matrix products for two."""
BISECTION = 32
"""Comparisons for each score: the choice finds a row's threshold bit by bit, on CUDA."""
INT, FLOAT, LONG = 4, 4, 8
Tensors = list[tuple[tuple[int, ...], torch.dtype]]


def dense_flops(batch: int, heads: int, queries: int, keys: int, head_dim: int) -> float:
    """Forward FLOPs of dense attention: scores and weighted sum."""
    return 4.0 * batch * heads * queries * keys * head_dim


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """Forward FLOPs of one sparse call.

    Attributes:
        coarse: pooling, scores between tiles, the coarse output where there is a gate, and for BSA the similarities.
        selection: comparisons, no FLOPs.
        fine: of the kept tiles, padding included.
        fine_valid: of the pairs of valid tokens among them; expected where tiles are partial.
        coarse_backward: of the coarse output.
    """

    coarse: float
    selection: float
    fine: float
    fine_valid: float
    coarse_backward: float


@dataclass(frozen=True, kw_only=True)
class Call:
    """One sparse call.

    Attributes:
        batch: B.
        heads: H.
        head_dim: D.
        layout: of queries and keys.
        builder: VSA or BSA.
        dtype: of q, k and v.
        gates: how many gates the call has, 0 to 2.
    """

    batch: int
    heads: int
    head_dim: int
    layout: TileLayout
    builder: Builder
    dtype: torch.dtype
    gates: int = 0

    @property
    def prunes(self) -> bool:
        """Whether queries are pruned."""
        return isinstance(self.builder, BSA) and self.builder.prunes

    @property
    def kept_tiles(self) -> float:
        """KV tiles that a query tile keeps: exact for VSA, the aim for BSA."""
        layout = self.layout
        builder = dataclasses.replace(self.builder, keep_queries=1) if isinstance(self.builder, BSA) else self.builder
        return builder.nominal_density(layout, layout) * layout.num_tiles

    @property
    def rows(self) -> int:
        """Query rows of one tile as computed: slots, or packed queries."""
        return self.builder.query_rows(self.layout)

    @property
    def capacity(self) -> int:
        """K."""
        return int(self.builder.capacity(self.layout.num_tiles))

    def pairs(self) -> tuple[float, float]:
        """(slots, valid tokens): pairs of queries and keys that the fine stage of one head computes, text included."""
        layout = self.layout
        M, slots, text_tiles = layout.num_tiles, layout.slots, layout.tiles_first + layout.tiles_last
        text, video = layout.text_first + layout.text_last, layout.num_tokens
        padded = M * self.rows * (self.kept_tiles + text_tiles) * slots + text_tiles * slots * (M + text_tiles) * slots
        density = self.builder.nominal_density(layout, layout)
        queries = video * density / (self.kept_tiles / M)
        valid = video * video * density + queries * text + text * (text + video)
        return float(padded), float(valid)

    def flops(self) -> Sparse:
        """Forward FLOPs."""
        each, D, M, S = float(self.batch * self.heads), self.head_dim, self.layout.num_tiles, self.layout.num_tokens
        product = 2.0 * M * M * D
        gated = self.gates > 0
        similarities = 4.0 * S * D if self.prunes else 0.0  # a product with the representative, and a norm
        padded, valid = self.pairs()
        return Sparse(
            coarse=each * ((3 if gated else 2) * S * D + (2 if gated else 1) * product + similarities),
            selection=each * BISECTION * M * M,
            fine=each * 4 * D * padded,
            fine_valid=each * 4 * D * valid,
            coarse_backward=each * 5 * product if gated else 0.0,  # the scores again, then four products
        )

    @property
    def bitmask_bytes(self) -> int:
        """Bitmask and counts ``[B, H, N, W + 1]``: kept for backward."""
        M = self.layout.num_tiles
        return self.batch * self.heads * M * (words_of(M) + 1) * INT

    @property
    def list_bytes(self) -> int:
        """Ascending lists ``[B, H, N, K]``: workspace of one call, forward and backward."""
        return self.batch * self.heads * self.layout.num_tiles * self.capacity * INT

    @property
    def column_bytes(self) -> float:
        """The transposed lists: workspace of one call's backward. Expected entries for BSA."""
        M = self.layout.num_tiles
        return self.batch * self.heads * M * (LONG + INT + self.kept_tiles * INT)

    def saved(self) -> Tensors:
        """What backward needs: tensors of their shapes and dtypes, without gates and the layout's tables."""
        layout, D, B, H = self.layout, self.head_dim, self.batch, self.heads
        M, P = layout.num_tiles, layout.padded_len
        text = (layout.tiles_first + layout.tiles_last) * layout.slots
        Q = M * self.rows + text
        found: Tensors = [((B, H, rows, D), self.dtype) for rows in (Q, P, P, Q)]  # q, k, v and the output
        found += [((B, H, Q), torch.float32), ((B, H, M, words_of(M) + 1), torch.int32)]
        if self.prunes:
            found += [((B, H, layout.seq_len), torch.int32), ((B, H, M, self.rows), torch.int32)]
        if self.gates:
            found += [((B, H, M, D), torch.float32)] * 4  # pooled q, k, v and the coarse output
        if self.gates > 1:
            found.append(((B, H, Q, D), self.dtype))  # the fine output, for its gate's gradient
        return found
