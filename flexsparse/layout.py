"""Tile layouts: how the tokens of a (T, H, W) grid are grouped into tiles of contiguous tokens.

Shape letters: S tokens in raster order, P padded tokens in tile order, D channels.
Tile order is: tiles of the first extra tokens, video tiles (t-major, then h, then w), tiles of the last extra
tokens. Within a tile the valid tokens come first (raster order of the tile's part of the grid), padding after.
"Raster order" means the order of the model's tokens, which is tile order already where ``order="tiles"``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from flexsparse.given import keywords_only, to_int
from flexsparse.tables import (
    AUTO_SLOTS,
    MAX_SLOTS,
    MIN_SLOTS,
    TABLES,
    auto_tile,
    ceil_div,
    in_order,
    is_symbolic,
    is_tracing,
    slots_of,
    tables_in_order,
    this_device,
    token_tables,
)


def axes_of(name: str, value: Any) -> tuple[int, int, int]:
    """A grid or tile as three ints; raises a `ValueError` where it is none."""
    remedy = "give three ints of at least 1, as (t, h, w)"
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 3:
        raise ValueError(f"{name} is {value!r}: {remedy}")
    out = []
    for item in value:
        if not is_symbolic(item):
            item = _constant(item)
            if item is None or item < 1:
                raise ValueError(f"{name} is {tuple(value)!r}: {remedy}")
        out.append(item)
    return cast(tuple[int, int, int], tuple(out))


def _extra(name: str, value: Any) -> int:
    if is_symbolic(value):
        return value
    number = _constant(value)
    if number is None or number < 0:
        raise ValueError(f"{name} is {value!r}: give the number of extra tokens, an int of at least 0")
    return number


def _constant(value: Any) -> int | None:
    number = to_int(value)
    return None if number is None else operator.index(number)  # Dynamo: a layout made in a graph is of constant sizes


class Reorder(torch.autograd.Function):
    """One gather forward and one gather backward; autograd's own backward of a gather is a scatter-add."""

    @staticmethod
    def forward(x: Tensor, index: Tensor, back: Tensor, pad: bool, back_pad: bool) -> Tensor:
        return _gather_rows(x, index, pad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, index, back, pad, back_pad = inputs
        ctx.save_for_backward(index, back)
        ctx.pad, ctx.back_pad = pad, back_pad

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        index, back = ctx.saved_tensors
        return Reorder.apply(grad, back, index, ctx.back_pad, ctx.pad), None, None, None, None


def _gather_rows(x: Tensor, index: Tensor, pad: bool) -> Tensor:
    if not pad:
        return x.index_select(-2, index)
    rows, padding = x.index_select(-2, index.clamp_min(0)), (index < 0)[:, None]
    # a fill, not a product: a NaN in token 0 must not reach the padding
    return rows.masked_fill(padding, 0) if is_tracing() else rows.masked_fill_(padding, 0)


@keywords_only()
@dataclass(frozen=True, kw_only=True)
class TileLayout:
    """How the tokens of one video are grouped into tiles.

    >>> layout = TileLayout(grid=(21, 30, 52), tile=(4, 4, 4))
    >>> layout.seq_len, layout.num_tiles, layout.slots, layout.padded_len
    (32760, 624, 64, 39936)
    >>> TileLayout(grid=(21, 30, 52), tile="auto").tile       # 6.7 % padding instead of 21.9 %
    (3, 5, 4)

    Args:
        grid: latent token grid ``(T, H, W)``; an image has ``T = 1``.
        tile: tokens of one tile along each axis, or ``"auto"`` (see `auto_tile`).
        text_first: extra tokens before the video tokens.
        text_last: extra tokens after the video tokens.
        slots: the most slots a tile may take with ``tile="auto"``; afterwards, and for an explicit tile, the
            slots of one tile: ``t*h*w`` rounded up to a power of two, at least 16.
        order: in which order tokens come and go: ``"raster"``, or ``"tiles"`` where a model keeps them in tile order
            (`to_tiles` of the same layout in raster order brings them there). Then tiles must all be full, and `to_tiles`
            and `to_raster` change nothing.

    In a function of your own that is compiled, make the layout outside and give it as an argument: one that is made inside has
    constant sizes, and the function is compiled once for each grid.

    Raises:
        ValueError: a grid or tile that is no triple of positive ints, a negative number of extra tokens, tile order where
            tiles are not all full.
    """

    grid: tuple[int, int, int]
    tile: tuple[int, int, int] | str = (4, 4, 4)
    text_first: int = 0
    text_last: int = 0
    slots: int = AUTO_SLOTS
    order: str = "raster"

    def __post_init__(self) -> None:
        grid = axes_of("grid", self.grid)
        if self.tile == "auto":
            slots = to_int(self.slots)
            if slots is None or not MIN_SLOTS <= slots <= MAX_SLOTS or slots & (slots - 1):
                raise ValueError(f"slots is {self.slots!r}: give a power of two from {MIN_SLOTS} to {MAX_SLOTS}")
            tile = auto_tile(cast(tuple[int, int, int], tuple(int(x) for x in grid)), slots)
        elif isinstance(self.tile, str):
            raise ValueError(f"tile is {self.tile!r}: give three ints (t, h, w), or 'auto'")
        else:
            tile = axes_of("tile", self.tile)
            if math.prod(tile) > MAX_SLOTS:
                raise ValueError(
                    f"tile is {tile}, {math.prod(tile)} tokens: give one of at most {MAX_SLOTS} tokens, such as (4, 4, 4)"
                )
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "tile", tile)
        object.__setattr__(self, "slots", slots_of(tile))
        for name in ("text_first", "text_last"):
            object.__setattr__(self, name, _extra(name, getattr(self, name)))
        if self.order not in ("raster", "tiles"):
            raise ValueError(f"order is {self.order!r}: give 'raster' or 'tiles'")
        if self.order == "tiles" and not self.whole:
            raise ValueError(
                f"order is 'tiles', but tiles of {tile} do not fill grid {grid} with text_first={self.text_first} and "
                f"text_last={self.text_last}: give sizes that they divide, with {self.slots} tokens a tile, or order='raster'"
            )

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Video tiles along each axis."""
        return tuple(ceil_div(extent, side) for extent, side in zip(self.grid, self.sides))  # type: ignore[return-value]

    @property
    def sides(self) -> tuple[int, int, int]:
        """The tile as three ints (``tile`` itself, once validated)."""
        return cast(tuple[int, int, int], self.tile)

    @property
    def num_tiles(self) -> int:
        """Video tiles."""
        t, h, w = self.tiles
        return t * h * w

    @property
    def frame_tiles(self) -> int:
        """Video tiles of one frame of tiles: tile n and tile ``n + frame_tiles`` are neighbours in time."""
        _, h, w = self.tiles
        return h * w

    @property
    def tiles_first(self) -> int:
        """Tiles of the first extra tokens."""
        return ceil_div(self.text_first, self.slots)

    @property
    def tiles_last(self) -> int:
        """Tiles of the last extra tokens."""
        return ceil_div(self.text_last, self.slots)

    @property
    def total_tiles(self) -> int:
        """All tiles: first extra, video, last extra."""
        return self.tiles_first + self.num_tiles + self.tiles_last

    @property
    def num_tokens(self) -> int:
        """Video tokens."""
        T, H, W = self.grid
        return T * H * W

    @property
    def seq_len(self) -> int:
        """S: all tokens, extra ones included."""
        return self.text_first + self.num_tokens + self.text_last

    @property
    def padded_len(self) -> int:
        """P: slots of all tiles."""
        return self.total_tiles * self.slots

    @property
    def tile_counts(self) -> Tensor:
        """Valid tokens of every tile, int32 ``[total_tiles]``, in sequence order: first, video, last."""
        return self.index()[2].clone()  # that is cached, and this may be written to

    @property
    def symbolic(self) -> bool:
        """Whether a size is symbolic (a dynamic-shape trace)."""
        return is_symbolic(*self.grid, self.text_first, self.text_last)

    @property
    def whole(self) -> bool:
        """Whether every tile is known to have as many valid tokens as slots."""
        if self.symbolic:
            return False
        full = self.slots == math.prod(self.sides) and all(g % t == 0 for g, t in zip(self.grid, self.sides))
        return full and self.text_first % self.slots == 0 and self.text_last % self.slots == 0

    def index(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Slot -> token int32 ``[P]`` (-1: padding), token -> slot int32 ``[S]``, counts int32 ``[total_tiles]``."""
        given = self.__dict__.get("_tables")
        if given is not None:
            return cast(tuple[Tensor, Tensor, Tensor], given)
        device = torch.device(device)
        if self.order == "tiles" and is_tracing():
            return in_order(self.total_tiles, self.slots, device)
        if is_tracing() or self.symbolic:
            sizes = (list(self.grid), list(self.sides), self.text_first, self.text_last)
            token, slot, count = (torch.ops.flexsparse.tile_index(*sizes, which, device) for which in TABLES)
            return token, slot, count
        return self.tables(device)

    def tables(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors of `index`, made once for a layout and device; not while tracing, and not to be written to."""
        if self.order == "tiles":
            return tables_in_order(self.total_tiles, self.slots, this_device(device))
        return token_tables(self.grid, self.sides, self.text_first, self.text_last, this_device(device))

    def with_tables(self, tables: Sequence[Tensor] | None) -> TileLayout:
        """This layout, reading `index` from given tensors (a graph's buffers, so that it makes none); None changes nothing."""
        if tables is not None:
            object.__setattr__(self, "_tables", tuple(tables))
        return self

    def video(self, x: Tensor) -> Tensor:
        """Video slots of a tile-ordered tensor: ``[..., P, D]`` -> ``[..., N, slots, D]`` (a view)."""
        start = self.tiles_first * self.slots
        return x.narrow(-2, start, self.num_tiles * self.slots).unflatten(-2, (self.num_tiles, self.slots))

    def video_tables(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Of the video alone, in tiles: slot -> token int32 ``[N, slots]``, and token -> slot int32 ``[S]``, counted from the
        first video slot.
        """
        tokens, back, _ = self.index(device)
        start = self.tiles_first * self.slots
        video = tokens.narrow(0, start, self.num_tiles * self.slots).unflatten(0, (self.num_tiles, self.slots))
        return video, back - start if self.text_first else back

    def _check(self, x: Tensor, length: int, order: str) -> None:
        if x.dim() < 2 or x.shape[-2] != length:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: {order} order of grid {self.grid}, tile {self.tile}, text_first="
                f"{self.text_first}, text_last={self.text_last} needs {length} tokens in dimension -2"
            )

    def to_tiles(self, x: Tensor) -> Tensor:
        """Raster order to tile order.

        Args:
            x: ``[..., S, D]``, any device and any dtype that torch can mask (not float8).

        Returns:
            ``[..., P, D]``; padding slots are zero. `to_raster` inverts it exactly.

        Raises:
            ValueError: dimension -2 is not ``seq_len``.
        """
        self._check(x, self.seq_len, "raster")
        if self.order == "tiles":
            return x
        slot_to_token, token_to_slot, _ = self.index(x.device)
        pad = self.symbolic or self.padded_len != self.seq_len
        return Reorder.apply(x, slot_to_token, token_to_slot, pad, False)

    def to_raster(self, x: Tensor) -> Tensor:
        """Tile order to raster order: ``[..., P, D]`` -> ``[..., S, D]``. Padding slots are dropped.

        Raises:
            ValueError: dimension -2 is not ``padded_len``.
        """
        self._check(x, self.padded_len, "tile")
        if self.order == "tiles":
            return x
        slot_to_token, token_to_slot, _ = self.index(x.device)
        pad = self.symbolic or self.padded_len != self.seq_len
        return Reorder.apply(x, token_to_slot, slot_to_token, False, pad)
