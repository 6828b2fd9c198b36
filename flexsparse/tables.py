"""Which token lies in which slot: the permutation of a tile layout in closed form, and the op that puts it into graphs.

Shape letters: S tokens in raster order, P padded tokens in tile order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor

MIN_SLOTS = 16
AUTO_SLOTS = 64
MAX_SLOTS = 4096
"""Of a tile; scores of a pair of tiles are its square, and kernels take up to 256."""


def is_symbolic(*values: Any) -> bool:
    """Whether any of the values is a symbolic size of a dynamic-shape trace."""
    return any(isinstance(value, torch.SymInt) for value in values)


def is_compiling() -> bool:
    """Whether Dynamo, or an export, traces this code.

    `torch.compiler.is_compiling` is one flag for all threads: true of a thread that trains while another one compiles.
    """
    return torch.compiler.is_dynamo_compiling() or is_exporting()


def is_exporting() -> bool:
    """Whether `torch.export` traces this code: an export that is not strict runs it, with modes that its thread alone has."""
    # torch's `is_exporting` is true of everything that Dynamo of torch 2.11 traces
    flag: bool = torch.compiler._is_exporting_flag
    return flag and (torch.compiler.is_dynamo_compiling() or _in_a_tracer())


def is_tracing() -> bool:
    """Whether this code is being traced, by Dynamo or by what follows it: nothing may be cached or looked at then."""
    return torch.compiler.is_dynamo_compiling() or torch._guards.TracingContext.try_get() is not None or _in_a_tracer()


def _in_a_tracer() -> bool:
    """Whether a mode that traces or makes fake tensors is on: not a user's own (selective checkpointing, counters)."""
    keys = torch._C._TorchDispatchModeKey
    traced = any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))
    return traced or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0


def ceil_div(a: int, b: int) -> int:
    """Ceiling of ``a / b``; symbolic sizes stay symbolic."""
    return (a + b - 1) // b


def smaller(a: int, b: int) -> int:
    """The smaller of two sizes, each of which may be symbolic. (Dynamo of torch 2.11 refuses `torch.sym_min` of plain ints.)"""
    if type(a) is int and type(b) is int:
        return min(a, b)
    found: int = torch.sym_min(a, b)
    return found


def larger(a: int, b: int) -> int:
    """The larger of two sizes, as `smaller`."""
    if type(a) is int and type(b) is int:
        return max(a, b)
    found: int = torch.sym_max(a, b)
    return found


def valid_slots(x: Tensor, counts: Tensor, slots: int) -> Tensor:
    """Bool ``[1 or B, 1, P, 1]``: which slots of ``[B, H, P, D]`` hold a token; counts int32 ``[tiles]`` or ``[B, tiles]``."""
    valid = torch.arange(slots, device=x.device) < counts[..., None]
    return valid.flatten(-2).reshape(-1, 1, x.shape[2], 1)


def slots_of(tile: Sequence[int]) -> int:
    """Slots of one tile: ``t*h*w`` rounded up to a power of two, at least 16."""
    return max(MIN_SLOTS, 1 << (math.prod(tile) - 1).bit_length())


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


def this_device(device: torch.device | str) -> torch.device:
    """A device by its number, which a cache may keep: ``"cuda"`` is whatever is current in the calling thread."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def lasting(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype = torch.int32) -> tuple[Tensor, ...]:
    """Copies of CPU tensors on a device, which a cache keeps.

    On CUDA from a thread of their own: where torch warms up a CUDA graph (``mode="reduce-overhead"``), all that its thread
    allocates is the graph's memory, and torch refuses to go on where anybody else still holds some of it.
    """
    if device.type != "cuda":
        return _moved(tensors, device, dtype)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_moved, tensors, device, dtype).result()


def _moved(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(x.to(device=device, dtype=dtype) for x in tensors)


@functools.lru_cache(128)
@torch.inference_mode(False)  # what is cached must serve training later
def token_tables(
    grid: tuple[int, int, int], tile: tuple[int, int, int], first: int, last: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Closed form of the permutation: no loop over tiles, so any grid costs a few vector operations, once."""
    slots = slots_of(tile)
    tiles = [ceil_div(extent, side) for extent, side in zip(grid, tile)]

    def extra(count: int, offset: int) -> tuple[Tensor, Tensor]:
        n = ceil_div(count, slots)
        position = torch.arange(n * slots, device="cpu")
        token = torch.where(position < count, position + offset, -1)
        return token, (count - torch.arange(n, device="cpu") * slots).clamp(max=slots)

    def tile_axes(index: Tensor) -> list[Tensor]:
        return [index // (tiles[1] * tiles[2]), index // tiles[2] % tiles[1], index % tiles[2]]

    where = tile_axes(torch.arange(math.prod(tiles), device="cpu"))
    extent = [torch.clamp(grid[i] - where[i] * tile[i], max=tile[i])[:, None] for i in range(3)]
    origin = [(where[i] * tile[i])[:, None] for i in range(3)]
    slot = torch.arange(slots, device="cpu")[None]
    local = [slot // (extent[1] * extent[2]), slot // extent[2] % extent[1], slot % extent[2]]
    counts = (extent[0] * extent[1] * extent[2])[:, 0]
    t, h, w = (origin[i] + local[i] for i in range(3))
    token = torch.where(slot < counts[:, None], (t * grid[1] + h) * grid[2] + w + first, -1).reshape(-1)

    first_token, first_counts = extra(first, 0)
    last_token, last_counts = extra(last, first + math.prod(grid))
    slot_to_token = torch.cat([first_token, token, last_token])
    valid = slot_to_token >= 0
    token_to_slot = torch.empty(first + math.prod(grid) + last, dtype=torch.int64, device="cpu")
    token_to_slot[slot_to_token[valid]] = torch.arange(len(slot_to_token), device="cpu")[valid]
    tile_counts = torch.cat([first_counts, counts, last_counts])
    return cast(tuple[Tensor, Tensor, Tensor], lasting((slot_to_token, token_to_slot, tile_counts), device))


def in_order(tiles: int, slots: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """As `token_tables` where tokens are in tile order; not cached."""
    index = torch.arange(tiles * slots, dtype=torch.int32, device=device)
    return index, index, torch.full((tiles,), slots, dtype=torch.int32, device=device)


@functools.lru_cache(128)
@torch.inference_mode(False)
def tables_in_order(tiles: int, slots: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`in_order`, not while tracing."""
    index, _, counts = in_order(tiles, slots, torch.device("cpu"))
    index, counts = lasting((index, counts), device)
    return index, index, counts


@torch.library.custom_op("flexsparse::tile_index", mutates_args=())
def tile_index(
    grid: Sequence[int], tile: Sequence[int], first: int, last: int, which: str, device: torch.device
) -> Tensor:
    """One index tensor of a layout: ``"token"`` of a slot, ``"slot"`` of a token, ``"count"`` of a tile (`TileLayout.index`).

    An op, so that a compiled graph holds the lookup and not the arithmetic, with static and symbolic sizes alike. Of one
    tensor: torch cannot save some of several outputs where activation checkpointing redoes the others.
    """
    index = token_tables(tuple(grid), tuple(tile), first, last, device)  # type: ignore[arg-type]
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
