"""Result files of the suite: ``{"header": {...}, "rows": [...]}``, one row a line, written whole or not at all."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

NOT_RUN = "does not run: kernels read and write raster order"
"""Why a piece of an attention call is not timed, where no call has it."""
NUMBERS = 6
"""Significant digits of a float in a file."""


def short(value: Any) -> Any:
    """Floats to a few digits; what is not finite becomes None, as JSON has no word for it."""
    if isinstance(value, float):
        return float(f"{value:.{NUMBERS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [short(item) for item in value]
    return value


def write(path: Path, header: dict[str, Any], rows: Sequence[Row]) -> None:
    """Replace a result file."""
    lines = ",\n".join(json.dumps(short(row)) for row in rows)
    text = '{"header": ' + json.dumps(short(header), indent=1) + ',\n"rows": [\n' + lines + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Header and rows of a result file.

    Raises:
        ValueError: it is none.
    """
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or not isinstance(found.get("header"), dict) or "rows" not in found:
        raise ValueError(f"{path.name} has no header and rows: give a result file")
    return found["header"], found["rows"]


def median(row: Row) -> float | None:
    """Milliseconds of a row; None where it has none."""
    return statistics.median(row["ms"]) if row.get("ms") else None


def tflops(flops: float | None, ms: Sequence[float] | None) -> float | None:
    """Rate from the median time."""
    return flops / (statistics.median(ms) * 1e9) if flops and ms else None


def worst_error(row: Row) -> float | None:
    """The largest relative error of a row."""
    error = row.get("error")
    values = [x for x in error.values() if isinstance(x, float | int)] if isinstance(error, dict) else []
    return max(values, default=None)


def label(row: Row) -> str:
    """What a row measures, besides the implementation."""
    tile = "x".join(map(str, row["tile"])) if row.get("tile") else "-"
    return f"{row['op']}{'/' + row['part'] if row.get('part') else ''} S={row['S']} H={row['H']} D={row['D']} {tile}"


def table(rows: Iterable[Row]) -> str:
    """A short table for a terminal, one line a row that has a time or a reason."""
    lines = []
    for row in rows:
        if row["op"] == "check":
            continue
        config = row.get("config") or {}
        mode = " ".join(filter(None, [config.get("mode") or config.get("kernel"), config.get("kernels")]))
        ms, rate = median(row), row.get("tflops")
        density = "" if row.get("density") is None else f" {row['density']:.3f}"
        if ms is not None:
            found = f"{ms:9.3f} ms" + (f" {rate:6.0f} TFLOPS" if rate else "")
        else:
            found = "  -  " + str(row.get("reason") or "")[:90]
        lines.append(f"{label(row)}{density} {row['dtype']} | {row['impl']} {mode} | {found}")
    return "\n".join(lines)
