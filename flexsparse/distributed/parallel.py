"""Attention of a sequence that is spread over ranks.

Shape letters: B batch, H query heads, G KV heads, L tokens of one rank, S tokens of all ranks, D head dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flexsparse.attention import sparse_attention
from flexsparse.distributed.builders import of_heads
from flexsparse.distributed.heads import Exchange, Heads
from flexsparse.distributed.own_tiles import OwnTiles, own_tile_attention, packed_order
from flexsparse.distributed.tokens import (
    Ranks,
    Segment,
    Segments,
    gather_tokens,
    local_length,
    own_part,
    segments_of,
)
from flexsparse.layout import TileLayout


class SequenceParallel:
    """How the tokens of a video are spread over ranks, and the attention that goes with it.

    >>> # not run: needs 8 GPUs
    >>> mesh = init_device_mesh("cuda", (8,), mesh_dim_names=("ulysses",))
    >>> parallel = fs.distributed.SequenceParallel(ulysses=mesh)
    >>> x = parallel.shard(x, layout)                                    # [B, S, C] -> [B, L, C]
    >>> out = parallel.attention(q, k, v, layout, builder, gate=gate)    # [B, H, L, D] each
    >>> x = parallel.unshard(x, layout)                                  # [B, L, C] -> [B, S, C]

    Gradients are those of the sum of what the ranks call backward on. So parameters that every rank holds get their gradient
    by averaging over the ranks (as DDP and FSDP do) where every rank computes the loss of the whole video, after `unshard`,
    and by summing where each computes the loss of its own tokens.

    Args:
        ulysses: a mesh of one dimension. Around attention, all heads of a rank's tokens are exchanged for all tokens of its
            heads. At most as many ranks as query heads; the first ranks compute a head more where they do not divide.
        tiles: a mesh of one dimension, for more ranks than heads: each rank computes some query tiles, against keys and values
            gathered from all ranks. Tokens are in tile order then, and a rank's are those of its tiles.
        text: how a layout's extra tokens lie on the ranks. ``"replicated"``: each holds all of them; ``"split"``: its part of
            the first ones, of the video, of the last ones (models with separate text and video streams); ``"joined"``: its
            part of the whole sequence.

    With both, ``tiles`` cuts the video into runs of tiles, and ``ulysses`` cuts those: give two dimensions of one mesh.

    Raises:
        TypeError: a mesh that is none.
        ValueError: a mesh of several dimensions, no mesh, an unknown ``text``, ``"joined"`` with ``tiles``.
    """

    def __init__(
        self, *, ulysses: DeviceMesh | None = None, tiles: DeviceMesh | None = None, text: str = "replicated"
    ) -> None:
        if ulysses is None and tiles is None:
            raise ValueError("neither ulysses nor tiles is given: give at least one device mesh")
        self._set(Ranks.of(ulysses, "ulysses"), Ranks.of(tiles, "tiles"), text)

    def _set(self, ulysses: Ranks, tiles: Ranks, text: str) -> None:
        segments_of(0, Segment.of(0, 1), 0, text)  # raises for an unknown text
        if text == "joined" and tiles.size > 1:
            raise ValueError("text is 'joined', but tiles= orders video tokens by tile: give 'replicated' or 'split'")
        self.ulysses, self.tiles, self.text = ulysses, tiles, text

    @classmethod
    def planned(cls, ulysses: Ranks, tiles: Ranks, text: str = "replicated") -> SequenceParallel:
        """As seen by a rank of groups that need not exist: for sizes, not for communication."""
        new = cls.__new__(cls)
        new._set(ulysses, tiles, text)
        return new

    def __repr__(self) -> str:
        return f"SequenceParallel(ulysses={self.ulysses.size}, tiles={self.tiles.size}, text={self.text!r})"

    def segments(self, layout: TileLayout) -> tuple[Segments, Segments]:
        """What ``tiles`` cuts, and what ``ulysses`` cuts of this rank's part of it."""
        if self.tiles.size > 1:
            outer = self.own_tiles(layout).segments
            first, video, last = (segment.sizes[self.tiles.rank] for segment in outer)
        else:
            outer, (first, video, last) = (), (layout.text_first, layout.num_tokens, layout.text_last)
        return outer, segments_of(first, Segment.of(video, self.ulysses.size), last, self.text)

    def own_tiles(self, layout: TileLayout) -> OwnTiles:
        """The query tiles of this rank.

        Raises:
            ValueError: fewer tiles than ranks.
        """
        if layout.num_tiles < self.tiles.size:
            raise ValueError(
                f"grid {layout.grid} has {layout.num_tiles} tiles of {layout.tile} for {self.tiles.size} ranks of tiles=: give "
                "fewer ranks or a smaller tile"
            )
        return OwnTiles(layout, self.tiles, self.text)

    def length(self, layout: TileLayout) -> int:
        """L: tokens that this rank holds."""
        return local_length(self.segments(layout)[1], self.ulysses.rank)

    def shard(self, x: Tensor, layout: TileLayout, dim: int = 1) -> Tensor:
        """This rank's tokens of a whole sequence that every rank has; no communication.

        Args:
            x: S tokens of the layout in dimension ``dim``, raster order: hidden states, position tables, targets.
            layout: the layout.
            dim: dimension of the tokens.

        Raises:
            ValueError: x does not have the layout's tokens.
        """
        if x.shape[dim] != layout.seq_len:
            raise ValueError(
                f"x has {x.shape[dim]} tokens in dimension {dim}, the layout {layout.seq_len}: give all of them"
            )
        outer, inner = self.segments(layout)
        if self.tiles.size > 1:
            order, _ = packed_order(self.own_tiles(layout), x.device)
            x = own_part(x.index_select(dim, order), outer, self.tiles.rank, dim)
        return own_part(x, inner, self.ulysses.rank, dim)

    def unshard(self, x: Tensor, layout: TileLayout, dim: int = 1) -> Tensor:
        """The whole sequence, on every rank: the inverse of `shard`, by all-gather.

        Args:
            x: L tokens of this rank in dimension ``dim``.
            layout: the layout.
            dim: dimension of the tokens.

        Raises:
            ValueError: x does not have this rank's tokens.
        """
        self._check(x, layout, dim, "x")
        outer, inner = self.segments(layout)
        x = gather_tokens(x, inner, self.ulysses, dim)
        if self.tiles.size > 1:
            x = gather_tokens(x, outer, self.tiles, dim)
            _, place = packed_order(self.own_tiles(layout), x.device)
            x = x.index_select(dim, place)
        return x

    def exchange(self, q: Tensor, k: Tensor, layout: TileLayout) -> Exchange:
        """The all-to-alls around one attention: what `attention` does, for callers with an attention of their own."""
        return Exchange(self.segments(layout)[1], self.ulysses, self.heads(q, k))

    def heads(self, q: Tensor, k: Tensor) -> Heads:
        """Which heads each rank computes.

        Raises:
            ValueError: fewer heads than ranks.
        """
        return Heads.of(q, k, self.ulysses.size)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: TileLayout,
        builder: Any,
        *,
        gate: Tensor | None = None,
        fine_gate: Tensor | None = None,
        scale: float | None = None,
        tile_counts: Tensor | None = None,
        backend: str = "auto",
        return_aux: bool = False,
    ) -> Any:
        """`flexsparse.sparse_attention` of the whole sequence, from and to this rank's tokens.

        Args:
            q: ``[B, H, L, D]``, after QK-norm and RoPE.
            k: ``[B, G, L, D]``, H divisible by G.
            v: as k.
            layout: the layout of the whole sequence.
            builder: a mask builder, or a `TileSelection` of all heads and query tiles.
            gate: ``[B, H, L, D]`` factor of the coarse output; travels in q's dtype.
            fine_gate: ``[B, H, L, D]`` factor of the fine output; travels in q's dtype.
            scale: softmax scale.
            tile_counts: valid tokens of every KV tile of the whole sequence; with ``tiles``, video tiles must be whole.
            backend: as `flexsparse.sparse_attention`.
            return_aux: also return an `AttentionAux`, of the heads and query tiles that this rank computes.

        Returns:
            ``[B, H, L, D]`` in q's dtype; with ``return_aux`` a pair.

        Raises:
            ValueError: as `flexsparse.sparse_attention`, and fewer heads than ``ulysses`` ranks; with ``tiles``, a builder
                that prunes queries.
            TypeError: dtypes that disagree; with ``tiles``, a builder of one's own that is not static.
        """
        for name, x in (("q", q), ("k", k), ("v", v), ("gate", gate), ("fine_gate", fine_gate)):
            if x is not None:
                self._check(x, layout, -2, name)
        if q.dim() != 4 or q.shape[:1] != k.shape[:1] or k.shape != v.shape or q.shape[3] != k.shape[3]:
            shapes = [tuple(x.shape) for x in (q, k, v)]
            raise ValueError(f"q, k and v have shapes {shapes}: give [B, H, L, D] and twice [B, G, L, D]")
        if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
            raise ValueError(f"q has {q.shape[1]} heads and k has {k.shape[1]}: q's must be a multiple of k's (GQA)")
        if not q.dtype == k.dtype == v.dtype:
            raise TypeError(f"q is {q.dtype}, k {k.dtype} and v {v.dtype}: cast them to one dtype")
        exchange = self.exchange(q, k, layout)
        start, end = exchange.heads.query(self.ulysses.rank)
        builder = of_heads(builder, start, end, q.shape[1])
        q, k, v, gates = exchange.to_heads(q, k, v, (gate, fine_gate))
        options = {"scale": scale, "backend": backend, "return_aux": return_aux}
        if self.tiles.size > 1:
            found = own_tile_attention(q, k, v, self.own_tiles(layout), builder, gates, tile_counts, **options)
        else:
            named = dict(zip(("gate", "fine_gate"), gates))
            found = sparse_attention(q, k, v, layout, builder, tile_counts=tile_counts, **named, **options)
        out, aux = found if return_aux else (found, None)
        out = exchange.to_tokens(out)
        return (out, aux) if return_aux else out

    def _check(self, x: Tensor, layout: TileLayout, dim: int, name: str) -> None:
        length = self.length(layout)
        if x.shape[dim] != length:
            raise ValueError(
                f"{name} has {x.shape[dim]} tokens, but this rank holds {length} of the {layout.seq_len} of grid {layout.grid} "
                f"with {layout.text_first} and {layout.text_last} extra ones, text={self.text!r}: give what shard() does"
            )


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TileLayout,
    builder: Any,
    mesh: DeviceMesh,
    text: str = "replicated",
    **options: Any,
) -> Any:
    """Sparse attention of a sequence that is spread over ranks, by two all-to-alls (Ulysses, arXiv 2309.14509).

    >>> # not run: needs 8 GPUs
    >>> mesh = init_device_mesh("cuda", (8,))
    >>> out = fs.distributed.ulysses_attention(q, k, v, layout, fs.VSA(sparsity=0.9), mesh, gate=gate)

    Args:
        q: ``[B, H, L, D]``: all heads of this rank's tokens.
        k: ``[B, G, L, D]``.
        v: as k.
        layout: the layout of the whole sequence.
        builder: a mask builder, or a `TileSelection` of all heads.
        mesh: the ranks, a mesh of one dimension.
        text: as `SequenceParallel`.
        options: as `SequenceParallel.attention`.

    Returns:
        ``[B, H, L, D]``: equal to this rank's tokens of `flexsparse.sparse_attention` of the whole.
    """
    return SequenceParallel(ulysses=mesh, text=text).attention(q, k, v, layout, builder, **options)
