"""The page of `flexsparse inspect`: data, and HTML that shows them and makes no request.

Letters: H heads, N query tiles, M KV tiles (video), R sampled query tiles.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
from torch import Tensor

from flexsparse.analysis.inspection import Inspection, LayerView
from flexsparse.analysis.measures import AXES, sample_rows
from flexsparse.tile_bits import unpack_bits

LISTS = 24 << 20
"""Bytes of lists that a page holds; of a larger model it shows every n-th query tile."""
_DIGITS = 5
_HEAVY = ("frames",)
_HEAVY_OF_LAYER = ("lists", "mass", "kept_queries")


def describe(
    inspection: Inspection, header: Mapping[str, Any], frames: Sequence[bytes], most: int = LISTS
) -> dict[str, Any]:
    """What the page shows, as plain JSON values.

    Args:
        inspection: from `inspect`; all its calls are on one layout.
        header: ``title``, ``model``, ``builder``, ``clip``, ``credit`` (or None), ``time``, ``notes`` (a list).
        frames: JPEG files, one for each T of the grid.
        most: bytes of lists at most.

    Returns:
        The header and: ``grid``, ``tile``, ``tiles``, ``text`` (tokens before and after); ``queries``, the tiles whose lists
        are there; ``rows``, those of them that recall was computed for; ``layers``, see below; ``calls`` of the
        report; ``frames``.
        Of a layer, for each head: ``density``, ``row_density`` (for each of ``queries``), ``recall`` (for each of ``rows``),
        ``overlap`` along each axis (None where there is none), ``computed`` (share of the query tokens), and as base64
        ``lists`` (M bits for each of ``queries``, lowest first, each row in whole bytes), ``mass`` (a byte for each of ``rows``
        and M, in 255ths of ``peak``), ``kept_queries`` (a bit for each video token in raster order, None where all are).
    """
    layout = inspection.layers[0].layout
    heads = sum(len(layer.heads) for layer in inspection.layers)
    room = most // (heads * math.ceil(layout.num_tiles / 8))
    rows = inspection.layers[0].rows
    queries = sorted({*sample_rows(layout.num_tiles, max(1, room)), *rows})
    return {
        **header,
        "grid": list(layout.grid),
        "tile": list(layout.sides),
        "tiles": list(layout.tiles),
        "text": [layout.text_first, layout.text_last],
        "queries": queries,
        "rows": rows,
        "layers": [_layer(layer, queries) for layer in inspection.layers],
        "calls": [
            asdict(call) | {"shape": list(call.shape), "density": _number(call.density)} for call in inspection.calls
        ],
        "frames": [f"data:image/jpeg;base64,{base64.b64encode(frame).decode()}" for frame in frames],
    }


def _layer(layer: LayerView, queries: list[int]) -> dict[str, Any]:
    layout = layer.layout
    video = layer.mass.narrow(-1, layout.tiles_first, layout.num_tiles)
    peak = video.amax(-1)
    lists = unpack_bits(layer.bits, layout.num_tiles)[:, queries]
    kept = layer.kept_queries
    return {
        "index": layer.index,
        "name": layer.name,
        "heads": layer.heads,
        "density": _numbers(layer.density),
        "row_density": _numbers(layer.row_density[:, queries]),
        "recall": _numbers(layer.recall),
        "overlap": {axis: _numbers(layer.overlap[axis]) for axis in AXES},
        "computed": [1.0] * len(layer.heads) if kept is None else _numbers(kept.double().mean(-1)),
        "peak": _numbers(peak),
        "lists": [_bits(head) for head in lists],
        "mass": [_base64((head * 255).round().byte().numpy()) for head in video / peak.clamp_min(1e-30)[..., None]],
        "kept_queries": None if kept is None else [_bits(head) for head in kept],
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return round(value, _DIGITS) if math.isfinite(value) else None


def _numbers(x: Tensor) -> list[Any]:
    return [_numbers(row) for row in x] if x.dim() > 1 else [_number(value) for value in x.tolist()]


def _base64(x: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(x).tobytes()).decode()


def _bits(x: Tensor) -> str:
    return _base64(np.packbits(x.numpy(), axis=-1, bitorder="little"))


def measures(data: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of `describe` without pictures, lists and maps: what ``--json`` writes."""
    layers = [{key: value for key, value in layer.items() if key not in _HEAVY_OF_LAYER} for layer in data["layers"]]
    return {key: value for key, value in data.items() if key not in _HEAVY} | {"layers": layers}


def render(data: Mapping[str, Any]) -> str:
    """The page of `describe`'s data: one file, whose policy forbids every request."""
    template = files("flexsparse.analysis").joinpath("page.html").read_text(encoding="utf-8")
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # nothing in it may end the script
    return template.replace("{title}", escape(str(data["title"])), 1).replace("{data}", text, 1)
