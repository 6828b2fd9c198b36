"""Numbers from result files: ratios of rows that were measured in turn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.suite.cases import OURS
from bench.suite.rows import NOT_RUN, Row, median

WHOLE = ("attention_forward", "attention_training")


@dataclass(frozen=True, kw_only=True)
class File:
    """A result file."""

    name: str
    header: dict[str, Any]
    rows: list[Row]


@dataclass(frozen=True)
class Group:
    """Rows of one case of one file: measured in turn, so that their ratios mean something."""

    file: str
    case: str
    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        return self.rows[0]

    def best(
        self, op: str, impl: str, part: str | None = None, tile: Sequence[int] | None = None, **config: Any
    ) -> Row | None:
        """The fastest measured row of an implementation; modes and configurations of ours compete."""
        found = [
            row
            for row in self.rows
            if (row["op"], row["impl"], row["part"]) == (op, impl, part)
            and row["ms"]
            and (tile is None or list(row["tile"]) == list(tile))
            and all((row["config"] or {}).get(key) == value for key, value in config.items())
        ]
        return min(found, key=lambda row: statistics.median(row["ms"]), default=None)

    def like(self, whole: Row) -> Group:
        """Its rows with the kernels of a whole attention: its pieces, where the defaults were taken apart too."""
        return Group(self.file, self.case, tuple(row for row in self.rows if kernels(row) == kernels(whole)))

    @property
    def taken(self) -> str | None:
        """Whose kernels made the fastest whole attention of ours, ``tuned`` or ``default``, where it was timed with both."""
        both = [row for row in self.rows if row["impl"] == OURS and row["op"] in WHOLE and not row["part"]]
        if not any(map(kernels, both)):
            return None
        best = self.best(both[0]["op"], OURS)
        return None if best is None else kernels(best) or "tuned"


def kernels(row: Row) -> str | None:
    """What a row says of them: ``default`` where a winner of `tune` was not forced."""
    return (row["config"] or {}).get("kernels")


Measure = Callable[[Group], "float | None"]


def groups(files: Sequence[File]) -> Iterator[Group]:
    """Cases of all files, the newest file first."""
    for file in sorted(files, key=lambda file: str(file.header.get("date")), reverse=True):
        cases: dict[str, list[Row]] = {}
        for row in file.rows:
            if row["op"] != "check" and not row["case"].startswith("tune-"):
                cases.setdefault(row["case"], []).append(row)
        for name, rows in cases.items():
            yield Group(file.name, name, tuple(rows))


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios of samples of the same round."""
    return statistics.median(a / max(b, 1e-9) for a, b in zip(above, below))


def rate_over(op: str, other: str) -> Measure:
    """TFLOPS of ours over another's, each on the tiles it computes."""

    def measure(group: Group) -> float | None:
        own, peer = group.best(op, OURS), group.best(op, other)
        if own is None or peer is None:
            return None
        return ratio(peer["ms"], own["ms"]) * own["flops"] / peer["flops"]

    return measure


def speed_over(op: str, other: str, part: str | None = None) -> Measure:
    """Time of another over ours."""

    def measure(group: Group) -> float | None:
        own, peer = group.best(op, OURS, part), group.best(op, other, part)
        return None if own is None or peer is None else ratio(peer["ms"], own["ms"])

    return measure


def both_over(other: str) -> Measure:
    """Forward and backward of the fine stage together: time of another over ours."""

    def measure(group: Group) -> float | None:
        sums = []
        for impl in (other, OURS):
            parts = [group.best("fine_forward", impl), group.best("fine_backward", impl)]
            if any(row is None for row in parts):
                return None
            sums.append([sum(pair) for pair in zip(*(row["ms"] for row in parts if row is not None))])
        return ratio(*sums)

    return measure


def not_run(group: Group, op: str, part: str | None) -> bool:
    """Whether a piece of ours is not there because no call has it."""
    return any((row["op"], row["part"], row["impl"], row["reason"]) == (op, part, OURS, NOT_RUN) for row in group.rows)


def share_of(*parts: tuple[str, str | None, int]) -> Measure:
    """Pieces (op, part, sign) over the whole attention forward; one that no call has takes no time."""

    def measure(group: Group) -> float | None:
        whole = group.best("attention_forward", OURS)
        if whole is None:
            return None
        group = group.like(whole)
        run = [(op, part, sign) for op, part, sign in parts if not not_run(group, op, part)]
        if not run:
            return 0.0
        found = [(group.best(op, OURS, part), sign) for op, part, sign in run]
        if any(row is None for row, _ in found):
            return None
        sums = [sum(x) for x in zip(*([sign * ms for ms in row["ms"]] for row, sign in found if row is not None))]
        return ratio(sums, whole["ms"])

    return measure


def between_tiles(group: Group) -> float | None:
    """Time of the padded 4x4x4 tiles over that of the tiles chosen for the grid."""
    tiles = {tuple(row["tile"]) for row in group.rows if row["impl"] == OURS and not row["part"]} - {(4, 4, 4)}
    padded = group.best("attention_forward", OURS, tile=(4, 4, 4))
    own = [group.best("attention_forward", OURS, tile=tile) for tile in tiles]
    fastest = min((row for row in own if row is not None), key=lambda row: median(row) or math.inf, default=None)
    return None if padded is None or fastest is None else ratio(padded["ms"], fastest["ms"])


def bytes_over(part: str) -> Measure:
    """Memory taken over what the target counts."""

    def measure(group: Group) -> float | None:
        for row in group.rows:
            if row["op"] == "memory" and row["part"] == part and row.get("mib"):
                return row["mib"][0] / row["needed_mib"]
        return None

    return measure
