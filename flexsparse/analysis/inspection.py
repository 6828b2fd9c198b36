"""One look at a model: its forward on one input, and what every sparse attention call kept.

Shape letters: H query heads, N query tiles, R sampled query tiles, L KV tiles (text's too), W words of a bitmask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flexsparse.analysis.capture import SparseCall, watch
from flexsparse.analysis.measures import head_density, overlap, recall, row_density, sample_rows, tile_mass
from flexsparse.layout import TileLayout
from flexsparse.reporting import Call
from flexsparse.wrap import report


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """What one sparse call kept, for the first sample; tensors lie on the CPU.

    Attributes:
        index: which sparse call of the model, from 0.
        name: the attention module.
        heads: numbers of the heads that were looked at, H of them.
        layout: query layout; the KV layout is the same.
        bits: kept tiles, int32 ``[H, N, W]`` (`pack_bits`).
        density: `head_density`, ``[H]``.
        row_density: `row_density`, ``[H, N]``.
        rows: the R query tiles that `recall` was computed for.
        mass: `tile_mass`, ``[H, R, L]``.
        recall: `recall`, ``[H, R]``.
        overlap: `overlap`, ``[H]`` along each axis.
        kept_queries: bool ``[H, T * H * W]``, video tokens that BSA computes, or None where all are.
    """

    index: int
    name: str
    heads: list[int]
    layout: TileLayout
    bits: Tensor
    density: Tensor
    row_density: Tensor
    rows: list[int]
    mass: Tensor
    recall: Tensor
    overlap: dict[str, Tensor]
    kept_queries: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A whole model: its sparse calls in the order in which they ran, and every call of the report."""

    layers: list[LayerView]
    calls: list[Call]


def part_of(call: SparseCall, heads: Sequence[int]) -> SparseCall:
    """The first sample of a call, and some of its heads; each has a KV head of its own then."""
    chosen, old = list(heads), call.selection
    groups = [head * call.k.shape[1] // call.q.shape[1] for head in chosen]
    counts, queries = old.tile_counts, old.queries
    if queries is not None:
        kept, source, position = (x[:1, chosen] for x in (queries.kept, queries.source, queries.position))
        queries = replace(queries, kept=kept, source=source, position=position)
    selection = replace(
        old,
        bits=old.bits[:1, chosen],
        counts=old.counts[:1, chosen],
        tile_counts=counts if counts is None or counts.dim() == 1 else counts[:1],
        queries=queries,
    )
    return replace(call, q=call.q[:1, chosen], k=call.k[:1, groups], selection=selection)


def view(call: SparseCall, *, index: int = 0, heads: Sequence[int] | None = None, sample: int = 8) -> LayerView:
    """Measure one call.

    Args:
        call: from `watch`.
        index: its number.
        heads: which to look at, None for all.
        sample: query tiles that `recall` is computed for, evenly spread.

    Raises:
        ValueError: no such head; queries and keys in different tiles, which one map cannot show.
    """
    selection, total = call.selection, call.q.shape[1]
    if selection.layout != selection.kv_layout:
        raise ValueError(f"{call.name} has other tiles for queries than for keys: wrap without query_tile")
    heads = list(range(total)) if heads is None else list(heads)
    wrong = [head for head in heads if not 0 <= head < total]
    if wrong:
        raise ValueError(f"heads has {wrong[0]}, but {call.name} has {total} heads: give numbers from 0 to {total - 1}")
    call = part_of(call, heads)
    selection, layout = call.selection, call.selection.layout
    rows = sample_rows(layout.num_tiles, sample)
    mass = tile_mass(call.q, call.k, selection, rows, call.scale)
    kept = None
    if selection.queries is not None:
        kept = selection.queries.source[0] == torch.arange(layout.seq_len, device=mass.device)
        kept = kept.narrow(-1, layout.text_first, layout.num_tokens).cpu()
    return LayerView(
        index=index,
        name=call.name,
        heads=heads,
        layout=layout,
        bits=selection.bits[0].cpu(),
        density=head_density(selection)[0].cpu(),
        row_density=row_density(selection)[0].cpu(),
        rows=rows,
        mass=mass[0].cpu(),
        recall=recall(mass, selection, rows)[0].cpu(),
        overlap={axis: value[0].cpu() for axis, value in overlap(selection).items()},
        kept_queries=kept,
    )


def inspect(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    sample: int = 8,
) -> Inspection:
    """Run a wrapped model once, without gradients, and measure its sparse calls as they come.

    q and k are dropped after each call: what grows with the number of layers are bitmasks and measures.

    Args:
        model: wrapped with ``compile=False``.
        inputs: keyword arguments of its call; the first sample is looked at.
        layers: which sparse calls to measure, counted from 0 in the order in which they run; None for all.
        heads: which heads, None for all.
        sample: query tiles of each head that dense attention is computed for.

    Raises:
        ValueError: no such layer or head, or a model that cannot be watched.
        RewriteError: no call became sparse.
    """
    found: list[LayerView] = []
    count = 0

    def each(call: SparseCall) -> None:
        nonlocal count
        if layers is None or count in layers:
            found.append(view(call, index=count, heads=heads, sample=sample))
        count += 1

    with torch.no_grad(), watch(model, each):
        model(**inputs)
    wrong = [layer for layer in layers or () if not 0 <= layer < count]
    if wrong:
        raise ValueError(
            f"layers has {wrong[0]}, but {type(model).__name__} has {count} sparse calls: give numbers from 0 to {count - 1}"
        )
    return Inspection(layers=found, calls=report(model).calls)
