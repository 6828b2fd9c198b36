"""Tile layouts: how the tokens of a (T, H, W) grid are grouped into tiles of contiguous tokens.

Shape letters: S tokens in raster order, P padded tokens in tile order, D channels.
Tile order is: tiles of the first extra tokens, video tiles (t-major, then h, then w), tiles of the last extra
tokens. Within a tile the valid tokens come first (raster order of the tile's part of the grid), padding after.
"Raster order" means the order of the model's tokens, which is tile order already where ``order="tiles"``.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

MIN_SLOTS = 16
AUTO_SLOTS = 64


def is_symbolic(*values: Any) -> bool:
    """Whether any of the values is a symbolic size of a dynamic-shape trace."""
    return any(isinstance(value, torch.SymInt) for value in values)


def is_tracing() -> bool:
    """Whether this code is being traced, by Dynamo or by what follows it: nothing may be cached or looked at then.

    `torch.compiler.is_compiling` alone says no where a backend traces its graph, in torch 2.11.
    """
    return (
        torch.compiler.is_compiling()
        or torch._guards.TracingContext.try_get() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def ceil_div(a: int, b: int) -> int:
    """Ceiling of ``a / b``; symbolic sizes stay symbolic."""
    return (a + b - 1) // b


def slots_of(tile: Sequence[int]) -> int:
    """Slots of one tile: ``t*h*w`` rounded up to a power of two, at least 16."""
    return max(MIN_SLOTS, 1 << (math.prod(tile) - 1).bit_length())


def _axes(name: str, value: Any) -> tuple[int, int, int]:
    remedy = "give three ints of at least 1, as (t, h, w)"
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 3:
        raise ValueError(f"{name} is {value!r}: {remedy}")
    out = []
    for item in value:
        if not is_symbolic(item):
            try:
                item = operator.index(item)
            except TypeError:
                raise ValueError(f"{name} is {tuple(value)!r}: {remedy}") from None
            if item < 1:
                raise ValueError(f"{name} is {tuple(value)!r}: {remedy}")
        out.append(item)
    return cast(tuple[int, int, int], tuple(out))


def _extra(name: str, value: Any) -> int:
    if is_symbolic(value):
        return value
    try:
        value = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}: give the number of extra tokens, an int of at least 0") from None
    if value < 0:
        raise ValueError(f"{name} is {value}: give the number of extra tokens, an int of at least 0")
    return value


@functools.lru_cache(256)
def auto_tile(grid: tuple[int, int, int], slots: int = AUTO_SLOTS) -> tuple[int, int, int]:
    """The tile of at most ``slots`` tokens that pads ``grid`` least.

    Sides are within a factor 2 of each other; a shorter side is allowed where it spans its whole axis (an image
    has ``t = 1``). Candidates fill more than half of the slots, since a tile of fewer slots pads a little less but
    multiplies the coarse stage and starves the matrix units (VSA, arXiv 2505.13389, Table 1c); only a grid of
    fewer tokens than ``slots`` takes a smaller one. Fewest padded tokens win, then the most cubic tile (smallest
    ratio of longest to shortest side), then the lexicographically smallest.
    """

    def usable(tile: tuple[int, int, int]) -> bool:
        longest = max(tile)
        return all(longest <= 2 * side or side == extent for side, extent in zip(tile, grid))

    def cost(tile: tuple[int, int, int]) -> tuple[Any, ...]:
        tiles = math.prod(ceil_div(extent, side) for extent, side in zip(grid, tile))
        return tiles * slots_of(tile), max(tile) / min(tile), tile

    T, H, W = grid
    candidates = [
        (t, h, w)
        for t in range(1, min(T, slots) + 1)
        for h in range(1, min(H, slots // t) + 1)
        for w in range(1, min(W, slots // (t * h)) + 1)
        if usable((t, h, w))
    ]
    filling = [tile for tile in candidates if slots_of(tile) == slots]
    return min(filling if filling and math.prod(grid) >= slots else candidates, key=cost)


@functools.lru_cache(128)
@torch.inference_mode(False)  # what is cached must serve training later
def _index(
    grid: tuple[int, int, int], tile: tuple[int, int, int], first: int, last: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Closed form of the permutation: no loop over tiles, so any grid costs a few vector operations, once."""
    slots = slots_of(tile)
    tiles = [ceil_div(extent, side) for extent, side in zip(grid, tile)]

    def extra(count: int, offset: int) -> tuple[Tensor, Tensor]:
        n = ceil_div(count, slots)
        position = torch.arange(n * slots)
        token = torch.where(position < count, position + offset, -1)
        return token, (count - torch.arange(n) * slots).clamp(max=slots)

    def tile_axes(index: Tensor) -> list[Tensor]:
        return [index // (tiles[1] * tiles[2]), index // tiles[2] % tiles[1], index % tiles[2]]

    where = tile_axes(torch.arange(math.prod(tiles)))
    extent = [torch.clamp(grid[i] - where[i] * tile[i], max=tile[i])[:, None] for i in range(3)]
    origin = [(where[i] * tile[i])[:, None] for i in range(3)]
    slot = torch.arange(slots)[None]
    local = [slot // (extent[1] * extent[2]), slot // extent[2] % extent[1], slot % extent[2]]
    counts = (extent[0] * extent[1] * extent[2])[:, 0]
    t, h, w = (origin[i] + local[i] for i in range(3))
    token = torch.where(slot < counts[:, None], (t * grid[1] + h) * grid[2] + w + first, -1).reshape(-1)

    first_token, first_counts = extra(first, 0)
    last_token, last_counts = extra(last, first + math.prod(grid))
    slot_to_token = torch.cat([first_token, token, last_token])
    valid = slot_to_token >= 0
    token_to_slot = torch.empty(first + math.prod(grid) + last, dtype=torch.int64)
    token_to_slot[slot_to_token[valid]] = torch.arange(len(slot_to_token))[valid]
    tile_counts = torch.cat([first_counts, counts, last_counts])
    return cast(
        tuple[Tensor, Tensor, Tensor],
        tuple(x.to(device=device, dtype=torch.int32) for x in (slot_to_token, token_to_slot, tile_counts)),
    )


@functools.lru_cache(128)
@torch.inference_mode(False)
def _in_order(tiles: int, slots: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """As `_index` where tokens are in tile order."""
    index = torch.arange(tiles * slots, dtype=torch.int32, device=device)
    return index, index, torch.full((tiles,), slots, dtype=torch.int32, device=device)


@torch.library.custom_op("flexsparse::tile_index", mutates_args=())
def tile_index(
    grid: Sequence[int], tile: Sequence[int], first: int, last: int, which: str, device: torch.device
) -> Tensor:
    """One index tensor of a layout: ``"token"`` of a slot, ``"slot"`` of a token, ``"count"`` of a tile (`TileLayout.index`).

    An op, so that a compiled graph holds the lookup and not the arithmetic, with static and symbolic sizes alike. Of one
    tensor: torch cannot save some of several outputs where activation checkpointing redoes the others.
    """
    index = _index(tuple(grid), tuple(tile), first, last, device)  # type: ignore[arg-type]
    return index[TABLES.index(which)].clone()  # the compiler reuses outputs as buffers


TABLES = ("token", "slot", "count")


@tile_index.register_fake
def _(grid: Sequence[int], tile: Sequence[int], first: int, last: int, which: str, device: torch.device) -> Tensor:
    slots = slots_of(tile)
    tiles = ceil_div(first, slots) + ceil_div(last, slots)
    video = 1
    for extent, side in zip(grid, tile):
        video = video * ceil_div(extent, side)
    tokens = first + grid[0] * grid[1] * grid[2] + last
    sizes = {"token": (tiles + video) * slots, "slot": tokens, "count": tiles + video}
    return torch.empty(sizes[which], dtype=torch.int32, device=device)


class _Reorder(torch.autograd.Function):
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
        return _Reorder.apply(grad, back, index, ctx.back_pad, ctx.pad), None, None, None, None


def _gather_rows(x: Tensor, index: Tensor, pad: bool) -> Tensor:
    if not pad:
        return x.index_select(-2, index)
    # masked_fill, not a product: a NaN in token 0 must not reach the padding
    return x.index_select(-2, index.clamp_min(0)).masked_fill((index < 0)[:, None], 0)


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
        grid = _axes("grid", self.grid)
        if self.tile == "auto":
            if not isinstance(self.slots, int) or self.slots < MIN_SLOTS or self.slots & (self.slots - 1):
                raise ValueError(f"slots is {self.slots!r}: give a power of two of at least {MIN_SLOTS}")
            tile = auto_tile(cast(tuple[int, int, int], tuple(int(x) for x in grid)), self.slots)
        elif isinstance(self.tile, str):
            raise ValueError(f"tile is {self.tile!r}: give three ints (t, h, w), or 'auto'")
        else:
            tile = _axes("tile", self.tile)
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
        return self.index()[2]

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
            return _in_order.__wrapped__(self.total_tiles, self.slots, device)  # what is cached must not be fake
        if is_tracing() or self.symbolic:
            sizes = (list(self.grid), list(self.sides), self.text_first, self.text_last)
            token, slot, count = (torch.ops.flexsparse.tile_index(*sizes, which, device) for which in TABLES)
            return token, slot, count
        return self.tables(device)

    def tables(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors of `index`, made once for a layout and device; not while tracing, and not to be written to."""
        if self.order == "tiles":
            return _in_order(self.total_tiles, self.slots, torch.device(device))
        return _index(self.grid, self.sides, self.text_first, self.text_last, torch.device(device))

    def with_tables(self, tables: Sequence[Tensor] | None) -> TileLayout:
        """This layout, reading `index` from given tensors (a graph's buffers, so that it makes none); None changes nothing."""
        if tables is not None:
            object.__setattr__(self, "_tables", tuple(tables))
        return self

    def video(self, x: Tensor) -> Tensor:
        """Video slots of a tile-ordered tensor: ``[..., P, D]`` -> ``[..., N, slots, D]`` (a view)."""
        start = self.tiles_first * self.slots
        return x.narrow(-2, start, self.num_tiles * self.slots).unflatten(-2, (self.num_tiles, self.slots))

    def _check(self, x: Tensor, length: int, order: str) -> None:
        if x.dim() < 2 or x.shape[-2] != length:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: {order} order of grid {self.grid}, tile {self.tile}, text_first="
                f"{self.text_first}, text_last={self.text_last} needs {length} tokens in dimension -2"
            )

    def to_tiles(self, x: Tensor) -> Tensor:
        """Raster order to tile order.

        Args:
            x: ``[..., S, D]``, any dtype and device.

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
        return _Reorder.apply(x, slot_to_token, token_to_slot, pad, False)

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
        return _Reorder.apply(x, token_to_slot, slot_to_token, False, pad)
