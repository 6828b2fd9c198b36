"""What the rows of a study hold: curves by size, method and seed; the newest version of each row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from statistics import fmean, median
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Held-out loss of a run along its training.

    Attributes:
        steps: ascending.
        flops: training FLOPs up to each step.
        attention_flops: of them, attention and selection.
        losses: nan where the loss was not finite.
        levels: step -> noise level -> loss.
        windows: step -> losses of the held-out windows.
        density: of the last evaluation; None where no row says.
    """

    steps: tuple[int, ...]
    flops: tuple[float, ...]
    attention_flops: tuple[float, ...]
    losses: tuple[float, ...]
    levels: Mapping[int, Mapping[str, float]]
    windows: Mapping[int, Sequence[float]]
    density: float | None

    def at(self, step: int) -> float:
        """Loss at a step that was evaluated."""
        return self.losses[self.steps.index(step)]

    def at_flops(self, flops: float) -> float | None:
        """Loss at a number of training FLOPs, linear in log FLOPs between evaluations; None outside of the curve."""
        points = [(math.log(x), y) for x, y in zip(self.flops, self.losses) if x > 0]
        if not points or flops <= 0:
            return None
        x = math.log(flops)
        if not points[0][0] - 1e-9 <= x <= points[-1][0] + 1e-9:
            return None
        for (left, low), (right, high) in pairwise(points):
            if x <= right:
                share = (x - left) / (right - left) if right > left else 1.0
                return low + (high - low) * min(1.0, max(0.0, share))
        return points[-1][1]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _means(pairs: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    return (fmean(x for x, _ in pairs), fmean(x for _, x in pairs)) if pairs else None


def curve(rows: Iterable[Row]) -> Curve:
    """From the evaluations of one run."""
    found = sorted(rows, key=lambda row: row["step"])
    return Curve(
        steps=tuple(row["step"] for row in found),
        flops=tuple(row["flops"] for row in found),
        attention_flops=tuple(row["attention_flops"] for row in found),
        losses=tuple(_number(row["loss"]) for row in found),
        levels={row["step"]: {name: _number(x) for name, x in (row.get("levels") or {}).items()} for row in found},
        windows={row["step"]: [_number(x) for x in row.get("windows") or ()] for row in found},
        density=next((row["density"] for row in reversed(found) if row.get("density") is not None), None),
    )


@dataclass(frozen=True)
class Study:
    """Rows by what they are about.

    Attributes:
        rows: of all files, the newest version of each.
        presets: size -> preset that it was run with, for commands.
    """

    rows: Sequence[Row]
    presets: Mapping[str, str] = field(default_factory=dict)

    def of(self, kind: str, **fields: Any) -> list[Row]:
        """Rows of a kind with given values."""
        return [row for row in self._kinds.get(kind, ()) if all(row.get(k) == v for k, v in fields.items())]

    @cached_property
    def _kinds(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row["kind"], []).append(row)
        return found

    def sizes(self, *kinds: str) -> list[str]:
        """Sizes with rows of these kinds, in order of appearance."""
        return list(dict.fromkeys(row["size"] for row in self.rows if row["kind"] in (kinds or ("evaluation", "run"))))

    def methods(self, size: str, question: str | None = None) -> list[str]:
        """Methods of a size that were evaluated, in order of appearance."""
        found = self.of("evaluation", size=size)
        return list(dict.fromkeys(row["method"] for row in found if question in (None, row.get("question"))))

    def curves(self, size: str, method: str) -> dict[int, Curve]:
        """Seed -> curve."""
        seeds: dict[int, list[Row]] = {}
        for row in self.of("evaluation", size=size, method=method):
            seeds.setdefault(row["seed"], []).append(row)
        return {seed: curve(rows) for seed, rows in sorted(seeds.items())}

    def loss(self, size: str, method: str, step: int) -> float | None:
        """Mean over the seeds that have this step; None where none has, or one is not finite."""
        losses = [found.at(step) for found in self.curves(size, method).values() if step in found.steps]
        return fmean(losses) if losses and all(map(math.isfinite, losses)) else None

    def flops_ratio(self, size: str, method: str) -> tuple[float, float] | None:
        """FLOPs of a training step against dense: (attention and selection, total), means over runs; None without rows.

        From the runs that finished; before, from evaluations of the method and of dense at the same step.
        """
        dense = next((row["flops_per_step"] for row in self.of("run", size=size, method="dense")), None)
        found = []
        for row in self.of("run", size=size, method=method):
            own, other = row["flops_per_step"], row["dense_flops_per_step"]
            other = other if isinstance(other, dict) else dense
            if other is not None:
                attention = (own["attention"] + own["selection"]) / other["attention"]
                found.append((attention, own["total"] / other["total"]))
        return _means(found or self._flops_so_far(size, method))

    def _flops_so_far(self, size: str, method: str) -> list[tuple[float, float]]:
        dense, found = self.curves(size, "dense"), []
        for seed, own in self.curves(size, method).items():
            steps = set(own.steps) & set(dense[seed].steps) - {0} if seed in dense else set()
            if steps:
                a, b = own.steps.index(max(steps)), dense[seed].steps.index(max(steps))
                found.append(
                    (own.attention_flops[a] / dense[seed].attention_flops[b], own.flops[a] / dense[seed].flops[b])
                )
        return found

    def seconds(self, size: str, method: str) -> float | None:
        """Median seconds of a training step."""
        field_of = "dense_seconds" if method == "dense" else "seconds"
        rows = self.of("timing", size=size) if method == "dense" else self.of("timing", size=size, method=method)
        values = [value for row in rows for value in row[field_of]]
        return median(values) if values else None

    def time_ratio(self, size: str, method: str) -> float | None:
        """Step time against dense: median of the ratios of pairs measured in turn; None where not timed."""
        pairs = [
            own / other
            for row in self.of("timing", size=size, method=method)
            for own, other in zip(row["seconds"], row["dense_seconds"])
        ]
        return median(pairs) if pairs else None

    def command(self, size: str, *methods: str) -> str:
        """What reproduces these runs."""
        only = " ".join(f"{size}/{method}/" for method in methods)
        return f"python -m bench.study --preset {self.presets.get(size, 'cpu')} --out DIR --only {only}"
