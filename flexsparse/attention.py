"""Sparse attention: coarse stage, selection, fine stage, combination.

Shape letters: B batch, H query heads, G KV heads, S query tokens, Z KV tokens, N query tiles, D head dim.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from flexsparse.arguments import check_cut_tiles, check_inputs, check_selection, other_tokens, softmax_scale
from flexsparse.autocast import autocast_off
from flexsparse.backends import Case, choose, flex, gather, reference, triton
from flexsparse.gated import GatedCoarse, gated_coarse
from flexsparse.layout import TileLayout
from flexsparse.masks.base import MaskBuilder
from flexsparse.masks.checked import planned
from flexsparse.masks.coarse import CoarseInputs
from flexsparse.masks.combine import name_of
from flexsparse.ops import tile_tokens
from flexsparse.selection import TileSelection
from flexsparse.tables import is_compiling, is_tracing, valid_slots

log = logging.getLogger("flexsparse")


@dataclass(frozen=True)
class AttentionAux:
    """What `sparse_attention` computed besides its output.

    Attributes:
        selection: the critical tiles.
        coarse_out: coarse output ``[B, H, N, D]``, at least float32, or None where the builder has none.
        lse: natural log-sum-exp of the fine stage ``[B, H, S]``, raster order; a pruned query has its source's.
        density: share of token pairs computed, float64 0-d.
        capped: rows that wanted more tiles than the static capacity and kept their best, int64 0-d.
        backend: the backend that ran the fine stage.
    """

    selection: TileSelection
    coarse_out: Tensor | None
    lse: Tensor
    density: Tensor
    capped: Tensor
    backend: str


@functools.lru_cache(256)
def _log_once(message: str) -> None:
    log.info(message)


def case_of(
    q: Tensor,
    layout: TileLayout,
    *,
    gradients: bool,
    lse: bool,
    compiled: bool,
    dtype: torch.dtype | None = None,
) -> Case:
    """What a backend is asked for; ``dtype`` where q will be cast."""
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    head_dim = q.shape[-1] if isinstance(q.shape[-1], int) else int(q.shape[-1].node.hint)
    dynamic = layout.symbolic or any(isinstance(size, torch.SymInt) for size in q.shape)
    return Case(
        device=q.device.type,
        dtype=dtype or q.dtype,
        gradients=gradients,
        lse=lse,
        compiled=compiled,
        dynamic=dynamic,
        rows=layout.slots,
        head_dim=head_dim,
        capability=capability,
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TileLayout,
    builder: Any,
    *,
    kv_layout: TileLayout | None = None,
    gate: Tensor | None = None,
    fine_gate: Tensor | None = None,
    scale: float,
    tile_counts: Tensor | None = None,
    backend: str,
    coarse_wanted: bool = False,
    lse_wanted: bool = False,
    in_graph: bool = False,
    call: str = "",
) -> tuple[Tensor, TileSelection, Tensor | None, Tensor | None]:
    """The computation itself, on checked arguments: (output, selection, coarse output, log-sum-exp)."""
    keys = layout if kv_layout is None else kv_layout
    gradients = wants_gradients(q, k, v, gate, fine_gate)
    if not isinstance(builder, MaskBuilder | TileSelection) and not is_tracing():  # it reads no tiles
        builder = plan(q, k, (q, k, v), layout, builder, kv_layout, scale, tile_counts, False)[0]
    raster = tile_counts is None and reads_raster(q, layout, keys, builder, backend, gradients)
    tiles = (q, k, v) if raster else tiles_of(q, k, v, layout, kv_layout, tile_counts)
    wants = (coarse_wanted or gate is not None) and getattr(builder, "has_coarse", False)
    selection, coarse_out = plan(q, k, tiles, layout, builder, kv_layout, scale, tile_counts, wants, raster)
    same = kv_layout is None or kv_layout is layout
    if selection.queries is not None and tile_counts is not None and same and not is_tracing():
        check_cut_tiles(tile_counts, layout)
    gates = (gate, fine_gate)
    how: dict[str, Any] = {"lse_wanted": lse_wanted, "in_graph": in_graph, "call": call, "raster": raster}
    out, lse = fine(q, tiles, selection, coarse_out, gates, scale, backend, **how)
    return out, selection, coarse_out, lse


Tiles = tuple[Tensor, Tensor, Tensor]


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether a call with these arguments has a backward."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def reads_raster(
    q: Tensor, layout: TileLayout, kv_layout: TileLayout, builder: Any, backend: str, gradients: bool
) -> bool:
    """Whether an uncompiled call leaves tokens in raster order: everything that runs finds them by tables.

    In a graph `compile_passes` decide it. Builders that read tiles themselves want tile order.
    """
    if backend != "triton" or is_tracing() or layout.order != "raster" or kv_layout.order != "raster":
        return False
    if isinstance(builder, TileSelection):
        rows = builder.query_rows
    elif not isinstance(builder, MaskBuilder) or builder.reads_tiles:
        return False
    else:
        rows = builder.query_rows(layout)
    from flexsparse.compile_passes.templates import tuned

    return tuned.finds_rows(q, rows, kv_layout.slots, gradients)


def video_tables(
    layout: TileLayout, kv_layout: TileLayout, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tables that `ops.coarse_select` takes for tokens in raster order."""
    (q_tokens, q_back), (kv_tokens, kv_back) = (one.video_tables(device) for one in (layout, kv_layout))
    return q_tokens, kv_tokens, q_back, kv_back


def tiles_of(
    q: Tensor, k: Tensor, v: Tensor, layout: TileLayout, kv_layout: TileLayout | None, tile_counts: Tensor | None
) -> Tiles:
    """q, k and v in tile order, ``[B, H, P, D]`` each; what is no valid token of k and v is zero."""
    kv_layout = layout if kv_layout is None else kv_layout
    if layout.order == kv_layout.order == "raster" and tile_tokens.in_one_kernel(q.device, q.dtype):
        indices = [one.index(q.device)[:2] for one in (layout, kv_layout, kv_layout)]
        tables, back = ([pair[i] for pair in indices] for i in (0, 1))
        q_tiles, k_tiles, v_tiles = torch.ops.flexsparse.tile_tokens([q, k, v], tables, back)
    else:
        q_tiles, k_tiles, v_tiles = layout.to_tiles(q), kv_layout.to_tiles(k), kv_layout.to_tiles(v)
    if tile_counts is not None:  # what lies past a count may be anything, NaN included
        valid = valid_slots(k_tiles, tile_counts, kv_layout.slots)
        k_tiles, v_tiles = k_tiles.masked_fill(~valid, 0), v_tiles.masked_fill(~valid, 0)
    return q_tiles, k_tiles, v_tiles


def plan(
    q: Tensor,
    k: Tensor,
    tiles: Tiles,
    layout: TileLayout,
    builder: Any,
    kv_layout: TileLayout | None,
    scale: float,
    tile_counts: Tensor | None,
    coarse_wanted: bool,
    raster: bool = False,
) -> tuple[TileSelection, Tensor | None]:
    """The coarse stage: which tiles are critical, and the coarse output ``[B, H, N, D]`` where it is wanted.

    ``raster``: the tiles are tokens in raster order (`reads_raster`).
    """
    same = kv_layout is None or kv_layout is layout
    kv_layout = layout if kv_layout is None else kv_layout
    if isinstance(builder, TileSelection):
        return builder, None
    if not isinstance(builder, MaskBuilder):
        with torch.no_grad():
            selection = builder.select(q.detach(), k.detach(), layout, kv_layout=kv_layout, scale=scale)
        if not isinstance(selection, TileSelection):
            raise TypeError(
                f"{type(builder).__name__}.select returned {type(selection).__name__}: return a TileSelection "
                "(TileSelection.from_mask, TileSelection.from_lists)"
            )
        whose = f"the selection that {type(builder).__name__}.select returned"
        selection = check_selection(selection, q, layout, kv_layout, whose)
        if tile_counts is not None:  # a builder of somebody's own does not know of them
            selection = dataclasses.replace(selection, tile_counts=tile_counts)
        return selection, None
    q_tiles, k_tiles, v_tiles = tiles
    with torch.set_grad_enabled(torch.is_grad_enabled() and coarse_wanted):
        if raster:
            tables = video_tables(layout, kv_layout, q.device)
            found = CoarseInputs(q_tiles, k_tiles, layout, kv_layout, scale, None, same, tables)
            return planned(builder, found, v_tiles if coarse_wanted else None)
        coarse = CoarseInputs(
            layout.video(q_tiles), kv_layout.video(k_tiles), layout, kv_layout, scale, tile_counts, same
        )
        return planned(builder, coarse, kv_layout.video(v_tiles) if coarse_wanted else None)


def fine(
    q: Tensor,
    tiles: Tiles,
    selection: TileSelection,
    coarse_out: Tensor | None,
    gates: tuple[Tensor | None, Tensor | None],
    scale: float,
    backend: str,
    *,
    lse_wanted: bool = False,
    in_graph: bool = False,
    call: str = "",
    raster: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The fine stage and the combination: output ``[B, H, S, D]`` in q's dtype, and log-sum-exp or None, raster order.

    ``raster``: the tiles are tokens in raster order (`reads_raster`).
    """
    q_tiles, k_tiles, v_tiles = tiles
    gate, fine_gate = gates
    lse: Tensor | None
    if backend == "reference":
        k, v = (selection.kv_layout.to_raster(x) for x in (k_tiles, v_tiles))
        out, lse = reference.attend(q, k, v, selection, scale)
    elif backend == "gather":
        out, lse = gather.attend(q, k_tiles, v_tiles, selection, scale, q_tiles, lse_wanted)
    elif backend == "triton":
        added: tuple[Tensor | None, Tensor | None] = (None, None)
        if fine_gate is None and triton.adds_coarse(q, gate, coarse_out, selection.layout, raster):
            added, gate = (coarse_out, gate), None
        out, lse = triton.attend(q, k_tiles, v_tiles, selection, scale, q_tiles, lse_wanted, raster, *added)
    else:
        out, lse = flex.attend(q, k_tiles, v_tiles, selection, scale, q_tiles, lse_wanted, in_graph, call)
    if fine_gate is not None:
        out = out * fine_gate
    if gate is not None and coarse_out is not None:
        if backend == "reference" or is_tracing():
            out = out + gated_coarse(gate, coarse_out, selection.layout, out.dtype)
        else:
            out = out + cast(Tensor, GatedCoarse.apply(gate, coarse_out, selection.layout, out.dtype))
    return out.to(q.dtype), lse  # gates may be of another dtype


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TileLayout,
    builder: Any,
    *,
    return_aux: Literal[True],
    **options: Any,
) -> tuple[Tensor, AttentionAux]: ...


@overload
def sparse_attention(q: Tensor, k: Tensor, v: Tensor, layout: TileLayout, builder: Any, **options: Any) -> Tensor: ...


def sparse_attention(  # type: ignore[misc]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TileLayout,
    builder: Any,
    gate: Tensor | None = None,
    fine_gate: Tensor | None = None,
    scale: float | None = None,
    kv_layout: TileLayout | None = None,
    tile_counts: Tensor | None = None,
    backend: str = "auto",
    return_aux: bool = False,
) -> Tensor | tuple[Tensor, AttentionAux]:
    """Sparse attention over video tokens, raster order in and out.

    ``out = fine * fine_gate + gate * coarse``: fine is softmax attention over the tokens of the kept tiles (and the
    extra tokens), coarse the pooled attention of the query's tile (VSA, arXiv 2505.13389, section 2.2).

    Args:
        q: ``[B, H, S, D]``, after QK-norm and RoPE; float32, bfloat16, float16, and float64 where the backend can.
        k: ``[B, G, Z, D]``, H divisible by G.
        v: as k.
        layout: layout of the queries, and of the keys unless ``kv_layout`` is given.
        builder: a mask builder, or a `TileSelection`: attention with given tiles.
        gate: ``[B, H, S, D]`` factor of the coarse output; None is zero.
        fine_gate: ``[B, H, S, D]`` factor of the fine output; None is one.
        scale: softmax scale of both stages, ``D ** -0.5`` by default.
        kv_layout: layout of the keys and values where they are other tokens than the queries': on another grid, of other
            tiles, or of a second video.
        tile_counts: valid tokens of every KV tile, int32 ``[tiles]`` or ``[B, tiles]`` in sequence order, where they
            differ from the layout's (padded text of different lengths); zero is allowed. Without ``kv_layout`` queries are the
            same tokens, and what lies past a count is no part of their tile's mean either.
        backend: ``auto``, ``reference``, ``gather``, ``flex`` or ``triton``.
        return_aux: also return an `AttentionAux`.

    Returns:
        ``[B, H, S, D]`` in q's dtype; with ``return_aux`` a pair.

    Raises:
        ValueError: shapes, devices or parameters that disagree, or an explicit backend that cannot do the case.
        TypeError: dtypes that disagree.
    """
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():
        raise NotImplementedError("torch.jit.trace does not record sparse attention: use torch.compile or torch.export")
    kv_layout = other_tokens(layout, kv_layout, tile_counts)
    keys = layout if kv_layout is None else kv_layout
    check_inputs(q, k, v, layout, keys, gate, fine_gate, tile_counts)
    scale = softmax_scale(scale, q.shape[-1])
    if isinstance(builder, TileSelection):
        builder = check_selection(builder, q, layout, keys, "the selection")
        if tile_counts is not None:
            builder = dataclasses.replace(builder, tile_counts=tile_counts)
        tile_counts = builder.tile_counts
    elif isinstance(builder, MaskBuilder):
        builder.check(layout, keys)
    elif isinstance(builder, type) or not callable(getattr(builder, "select", None)):
        raise TypeError(f"builder is {builder!r}: give a mask builder (flexsparse.masks) or a TileSelection")
    if gate is not None and not getattr(builder, "has_coarse", False):
        raise ValueError(
            f"gate is given, but {name_of(builder)} has no coarse output to apply it to: use VSA or TopP, or a combination "
            "with one of them, or no gate"
        )
    gradients = wants_gradients(q, k, v)
    compiled = is_compiling()
    case = case_of(q, layout, gradients=gradients, lse=return_aux, compiled=compiled)
    name, reason = choose(backend, case)
    if not compiled:
        _log_once(f"{case.device} {case.dtype} grid {layout.grid}: backend {name} ({reason})")
    with autocast_off(q.device.type):
        out, selection, coarse_out, lse = attend(
            q,
            k,
            v,
            layout,
            builder,
            kv_layout=kv_layout,
            gate=gate,
            fine_gate=fine_gate,
            scale=scale,
            tile_counts=tile_counts,
            backend=name,
            coarse_wanted=return_aux,
            lse_wanted=return_aux,
        )
    if not return_aux:
        return out
    computed, valid = selection.valid_pairs()
    capped = selection.capped if selection.capped is not None else torch.zeros((), dtype=torch.int64, device=q.device)
    return out, AttentionAux(selection, coarse_out, cast(Tensor, lse), computed / valid, capped, name)
