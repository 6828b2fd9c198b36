"""What mask builders share: from (q, k, layout) to a selection.

Shape letters: B batch, H query heads, G KV heads, S tokens, N query tiles, M KV tiles, D head dim.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from flexsparse.arguments import check_cut_tiles, check_tile_counts, other_tokens, softmax_scale
from flexsparse.autocast import autocast_off
from flexsparse.layout import TileLayout
from flexsparse.masks.checked import planned
from flexsparse.masks.coarse import CoarseInputs
from flexsparse.schedule import BoundRatio, SparsitySchedule
from flexsparse.selection import TileSelection
from flexsparse.tables import is_tracing, valid_slots


class MaskBuilder:
    """Maps (q, k, layout) to a `TileSelection`.

    Ours are frozen dataclasses. A builder of your own needs `plan` only, or just an object with ``select``.
    """

    has_coarse: ClassVar[bool] = False
    """Whether the builder has a coarse output, which a gate can use."""
    reads_tiles: ClassVar[bool] = True
    """Whether `plan` reads tokens of tiles itself; False where it leaves them to `coarse_stage`, which reads any order."""
    heads_alike: ClassVar[bool] = False
    """Whether `plan` treats each head by itself and all alike: `PerHead` plans all heads then, and takes some of them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, careful in (("reads_tiles", True), ("heads_alike", False)):
            if "plan" in vars(cls) and name not in vars(cls):  # another plan may do otherwise
                setattr(cls, name, careful)

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

    def query_rows(self, layout: TileLayout) -> int:
        """Query tokens of one tile as computed: all slots, unless queries are pruned."""
        return layout.slots

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
