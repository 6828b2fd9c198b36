"""How alike the lists of neighbouring query tiles are: on a dense model, and on models trained sparse.

Shape letters: B batch, H heads, N query tiles, M KV tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from bench.study.batch import Batch
from bench.study.capture import Attention, Progress, Row, by_level, means
from bench.study.settings import Size
from flexsparse import BSA, VSA
from flexsparse.analysis import SparseCall, overlap, watch
from flexsparse.analysis.measures import AXES
from flexsparse.selection import TileSelection

BUILDERS = {"vsa": VSA(sparsity=0.875), "bsa": BSA(keep_queries=0.5, kv_density=0.125)}


def random_overlap(selection: TileSelection) -> dict[str, Tensor]:
    """`overlap` to expect of lists of the same lengths drawn at random: of lists of a and b tiles, a * b / M are in both.

    Returns:
        For each axis, float64 ``[B, H]``; NaN where the axis has one tile only.
    """
    lengths = selection.counts.double().unflatten(2, selection.layout.tiles)
    found = {}
    for axis, name in enumerate(AXES, start=2):
        pairs = lengths.shape[axis] - 1
        a, b = (lengths.narrow(axis, start, pairs).flatten(2) for start in (0, min(1, pairs)))
        found[name] = 2 * (a * b / selection.kv_layout.num_tiles).sum(-1) / (a + b).sum(-1)
    return found


def axis_rows(selection: TileSelection, method: str) -> Iterator[Row]:
    """Rows "overlap" of one selection, mean over heads; none for an axis of one tile."""
    found, expected = overlap(selection), random_overlap(selection)
    for axis, extent in zip(AXES, selection.layout.tiles):
        if extent > 1:
            values = {"overlap": float(found[axis].mean()), "random": float(expected[axis].mean())}
            yield {"kind": "overlap", "method": method, "axis": axis, **values}


def overlap_rows(one: Attention) -> Iterator[Row]:
    """Rows "overlap" of one attention: what VSA and BSA would keep of a dense model's."""
    for method, builder in BUILDERS.items():
        yield from axis_rows(builder.select(one.q, one.k, one.layout), method)


def overlaps_of(
    model: nn.Module,
    held_out: Sequence[Batch],
    size: Size,
    name: str,
    method: str,
    *,
    windows: int | None = 2,
    progress: Progress | None = None,
) -> Iterator[Row]:
    """Rows "overlap" of a model that attends sparsely itself.

    Args:
        model: wrapped with ``compile=False``; left as it was.
        held_out: batches of one window at one level, on the model's device.
        size: of the model.
        name: the model's run.
        method: its method's name.
        windows: of each level, evenly spread; None for all.
        progress: told what was done.
    """
    for level, batches in by_level(held_out, windows).items():
        rows: list[Row] = []
        for batch in batches:
            calls: list[list[Row]] = []

            def note(call: SparseCall, found: list[list[Row]] = calls) -> None:
                found.append(list(axis_rows(call.selection, method)))

            with torch.no_grad(), watch(model, note):
                model(batch.noisy, batch.t)
            for layer, found in enumerate(calls):
                whose = {"size": size.name, "model": name, "layer": layer, "level": level}
                rows.extend({**row, **whose} for row in found)
        if progress is not None:
            progress(f"{name}: overlap at level {level}")
        yield from means(rows)
