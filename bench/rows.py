"""The result file: a header and rows, one row a line so that a diff shows what changed."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.cases import DENSE, Case, Entry

RESULTS = Path(__file__).parent / "results" / "cpu.json"


@dataclass(kw_only=True)
class Row:
    """One measurement; `bench/README.md` says what each field means."""

    case: str
    op: str
    impl: str
    part: str | None
    B: int
    H: int
    G: int
    S: int
    D: int
    grid: tuple[int, int, int]
    tile: tuple[int, int, int]
    method: str | None
    density: float | None
    dtype: str
    threads: int
    ms: list[float] | None = None
    dense_ms: list[float] | None = None
    mib: list[float] | None = None
    dense_mib: list[float] | None = None
    ratio_to_dense: float | None = None
    error: dict[str, float] = field(default_factory=dict)
    checked: bool = False
    checked_on: list[str] = field(default_factory=list)
    reason: str | None = None
    target: float | None = None


def row_of(case: Case, entry: Entry, threads: int, density: float | None, **fields: Any) -> Row:
    """A row without measurements."""
    return Row(
        case=case.name,
        op=entry.op,
        impl=entry.impl,
        part=entry.part,
        B=case.B,
        H=case.H,
        G=case.G,
        S=case.S,
        D=case.D,
        grid=case.grid,
        tile=case.layout.sides,
        method=None if entry.impl == DENSE or entry.op == "layout" else case.method,
        density=density,
        dtype=case.dtype,
        threads=threads,
        target=entry.target,
        **fields,
    )


def ratio(own: list[float], dense: list[float]) -> float:
    """Median of the pairwise ratios: neighbours in time share the machine's mood."""
    return statistics.median(a / max(b, 1e-9) for a, b in zip(own, dense))


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    return value


def write(path: Path, header: dict[str, Any], rows: list[Row], profile: list[dict[str, Any]] | None = None) -> None:
    """Write a result file, whole or not at all."""
    lines = [json.dumps(_short(dataclasses.asdict(row))) for row in rows]
    text = '{"header": ' + json.dumps(header, indent=1) + ',\n"rows": [\n' + ",\n".join(lines) + "\n]"
    if profile:
        text += ',\n"profile": [\n' + ",\n".join(json.dumps(_short(part)) for part in profile) + "\n]"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "}\n")
    partial.replace(path)
