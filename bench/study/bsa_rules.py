"""What each of BSA's rules costs: output error against dense attention, one option changed at a time.

Shape letters: H heads, S tokens in raster order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bench.study.capture import Attention, Row
from flexsparse import BSA

DEFAULT: dict[str, Any] = {
    "keep_queries": 0.5,
    "kv_density": 0.125,
    "fill": "representative",
    "window": (2, 2, 2),
    "threshold": "normal",
    "representative": "center",
    "score_queries": "kept",
    "statistics": "row",
}
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"fill": "nearest"},
    {"fill": "zero"},
    {"window": (1, 2, 2)},
    {"window": (2, 1, 1)},
    {"window": None},
    {"threshold": "probability"},
    {"threshold": "mass", "mass": 0.5},
    {"threshold": "mass", "mass": 0.9},
    {"representative": "medoid"},
    {"score_queries": "all"},
    {"statistics": "head"},
    {"keep_queries": 1.0},
    {"kv_density": 1.0},
    {"kv_density": 1.0, "fill": "nearest"},
    {"kv_density": 1.0, "fill": "zero"},
)
"""What is changed; density 1 of queries or of KV tiles leaves the other's error."""


def rule_name(change: dict[str, Any]) -> str:
    """As rows say it: ``"default"``, ``"fill=zero"``, ``"window=1x2x2"``, ``"window=tile"``."""

    def text(value: Any) -> str:
        if value is None:
            return "tile"
        if isinstance(value, tuple):
            return "x".join(map(str, value))
        return value if isinstance(value, str) else f"{value:g}"

    return ", ".join(f"{key}={text(value)}" for key, value in change.items()) or "default"


def rule_rows(one: Attention) -> Iterator[Row]:
    """Rows "bsa_rule" of one attention. ``kv_density`` is None where the threshold does not aim at one."""
    own = torch.arange(one.layout.seq_len, device=one.q.device)
    for change in CHANGES:
        builder = BSA(**DEFAULT | change)
        selection = builder.select(one.q, one.k, one.layout)
        out = one.attend(selection)
        pruned = None if selection.queries is None else selection.queries.source != own
        yield {
            "kind": "bsa_rule",
            "rule": rule_name(change),
            "keep_queries": builder.keep_queries,
            "kv_density": None if builder.threshold == "mass" else builder.kv_density,
            "density": selection.density,
            "error": one.error(out),
            "pruned_error": None if pruned is None else one.error(out, pruned),
        }
