"""What `sparse_attention` is given, checked: one clear error where arguments disagree.

Shape letters: B batch, H query heads, G KV heads, S query tokens, Z KV tokens, D head dim.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from flexsparse.given import to_float
from flexsparse.layout import TileLayout
from flexsparse.selection import TileSelection
from flexsparse.tables import is_tracing


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TileLayout,
    kv_layout: TileLayout,
    gate: Tensor | None,
    fine_gate: Tensor | None,
    tile_counts: Tensor | None,
) -> None:
    """Raise one clear error where q, k, v, the gates, the counts and the layouts disagree."""
    for name, one in (("layout", layout), ("kv_layout", kv_layout)):
        if not isinstance(one, TileLayout):
            raise TypeError(f"{name} is {one!r}: give a TileLayout(grid=(T, H, W), ...)")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is {type(x).__name__}: give a tensor [batch, heads, tokens, head dim]")
        if x.is_nested or x.layout != torch.strided:
            what = "nested" if x.is_nested else x.layout
            raise TypeError(f"{name} is {what}: give a dense tensor; tile_counts says where samples have fewer tokens")
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: give [batch, heads, tokens, head dim]")
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"{name} is {x.dtype}: give float32, bfloat16, float16 or float64")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype} and q is {q.dtype}: cast them to one dtype")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}: move them to one device")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has batch {x.shape[0]} and q has {q.shape[0]}: give the same batch")
        if x.shape[3] != q.shape[3]:
            raise ValueError(f"{name} has head dim {x.shape[3]} and q has {q.shape[3]}: give the same head dim")
    if q.shape[1] == 0 or q.shape[3] == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}: give at least one head, and a head dim of at least 1")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)} and k has {tuple(k.shape)}: give the same shape")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads and k has {k.shape[1]}: q's must be a multiple of k's (GQA)")
    for name, x, one in (("q", q, layout), ("k", k, kv_layout)):
        if x.shape[2] != one.seq_len:
            raise ValueError(
                f"{name} has {x.shape[2]} tokens, but grid {one.grid} with text_first={one.text_first} and "
                f"text_last={one.text_last} has {one.seq_len}: give the layout of this sequence"
            )
    for name, gate_ in (("gate", gate), ("fine_gate", fine_gate)):
        if gate_ is None:
            continue
        if not isinstance(gate_, Tensor) or not gate_.is_floating_point():
            kind = gate_.dtype if isinstance(gate_, Tensor) else repr(gate_)
            raise TypeError(
                f"{name} is {kind}: give a floating point tensor of the shape of q, {tuple(q.shape)}, or None"
            )
        if gate_.shape != q.shape:
            raise ValueError(f"{name} has shape {tuple(gate_.shape)}: give the shape of q, {tuple(q.shape)}")
        if gate_.device != q.device:
            raise ValueError(f"{name} is on {gate_.device} and q on {q.device}: move them to one device")
    if tile_counts is not None:
        check_tile_counts(tile_counts, q.shape[0], kv_layout)


def softmax_scale(scale: float | None, head_dim: int) -> float:
    """The softmax scale, ``head_dim ** -0.5`` by default.

    Raises:
        TypeError: a tensor: it would have no gradient.
        ValueError: not a positive finite number.
    """
    if scale is None:
        return float(head_dim) ** -0.5
    if isinstance(scale, Tensor):
        raise TypeError(
            "scale is a tensor, which would get no gradient: give a number, and multiply q by a learned scale"
        )
    number = to_float(scale)
    if number is None or not 0 < number < math.inf:  # `math.isfinite` is none of Dynamo's functions of a symbolic float
        raise ValueError(f"scale is {scale!r}: give a positive finite number, or None for head_dim ** -0.5")
    return number


def other_tokens(layout: TileLayout, kv_layout: TileLayout | None, tile_counts: Tensor | None) -> TileLayout | None:
    """The layout of keys that were given one: an object of its own, as one that is the queries' stands for the same tokens."""
    if tile_counts is not None and kv_layout is layout:
        return dataclasses.replace(layout)
    return kv_layout


def check_tile_counts(tile_counts: Tensor, batch: int, kv_layout: TileLayout) -> None:
    """Raise where valid tokens of KV tiles are none of the layout's."""
    if not isinstance(tile_counts, Tensor):
        raise TypeError(f"tile_counts is {type(tile_counts).__name__}: give an int32 tensor, or None")
    total = kv_layout.total_tiles
    if tile_counts.dtype != torch.int32 or tuple(tile_counts.shape) not in ((total,), (batch, total)):
        raise ValueError(
            f"tile_counts is {tile_counts.dtype} {tuple(tile_counts.shape)}: give int32 [{total}] or "
            f"[{batch}, {total}], valid tokens of every KV tile in sequence order"
        )
    if not is_tracing():
        most = kv_layout.index(tile_counts.device)[2]
        wrong = ((tile_counts < 0) | (tile_counts > most)).any()
        if tile_counts.is_cuda and torch.cuda.is_current_stream_capturing():
            torch._assert_async(
                ~wrong, "tile_counts holds negative numbers, or more tokens than the layout puts into a tile"
            )
        elif bool(wrong):
            raise ValueError(
                f"tile_counts holds {int(tile_counts.min())} to {int(tile_counts.max())}: each must lie between 0 "
                "and the tokens that the layout puts into that tile"
            )


def check_selection(
    selection: TileSelection, q: Tensor, layout: TileLayout, kv_layout: TileLayout, whose: str, trusted: bool = False
) -> TileSelection:
    """A selection, held to the call.

    Args:
        selection: somebody's.
        q: the queries ``[B, H, ...]``.
        layout: of the queries.
        kv_layout: of the keys.
        whose: what made or gave it.
        trusted: that no row keeps more than the capacity.

    Raises:
        ValueError: it is not one of these queries and layouts, or rows keep more than its capacity (on CUDA, and in a graph on
            a CPU, once that runs).
    """
    if selection.layout != layout or selection.kv_layout != kv_layout:
        raise ValueError(
            f"{whose} is for {_sizes(selection.layout, selection.kv_layout)}, and the call has {_sizes(layout, kv_layout)}: "
            "give one that was made with the call's layouts"
        )
    if tuple(selection.counts.shape) != (*q.shape[:2], layout.num_tiles):
        raise ValueError(
            f"{whose} has rows for [B, H, tiles] = {list(selection.counts.shape)}, and the call has "
            f"{[*q.shape[:2], layout.num_tiles]}: give a row for every sample, query head and query tile"
        )
    if selection.bits.device != q.device:
        raise ValueError(f"{whose} is on {selection.bits.device} and q on {q.device}: move them to one device")
    room, tiles = selection.capacity, kv_layout.num_tiles
    known = type(room) is type(tiles) is int  # of symbolic sizes a graph guards no more than equality
    if trusted or (room >= tiles if known else room == tiles):
        return selection
    counts = torch.ops.flexsparse.within_capacity(selection.counts, selection.capacity)
    return dataclasses.replace(selection, counts=counts)


def _sizes(layout: TileLayout, kv_layout: TileLayout) -> str:
    """What an error says of two layouts."""
    texts = [f"grid {x.grid}, tile {x.tile}, text {x.text_first} + {x.text_last}" for x in (layout, kv_layout)]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} and keys of {texts[1]}"


def check_cut_tiles(tile_counts: Tensor, layout: TileLayout) -> None:
    """Raise a `ValueError` where a count cuts a video tile short: a token past it could stand for a pruned query."""
    start, stop = layout.tiles_first, layout.tiles_first + layout.num_tiles
    counts, valid = tile_counts[..., start:stop], layout.index(tile_counts.device)[2][start:stop]
    cut = (counts > 0) & (counts < valid)
    if tile_counts.is_cuda and torch.cuda.is_current_stream_capturing():
        torch._assert_async(~cut.any(), "tile_counts cuts video tiles short, and the builder prunes queries (BSA)")
    elif bool(cut.any()):
        raise ValueError(
            f"tile_counts cuts {int(cut.sum())} video tiles short, and the builder prunes queries (BSA): a token past the "
            "count could be a window's representative; give keep_queries=1, or whole or empty video tiles"
        )
