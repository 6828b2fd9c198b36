"""What the numbers are held against: a floor and an aim for each line of the two tables of targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.suite.cases import OURS
from bench.suite.measures import (
    File,
    Measure,
    between_tiles,
    both_over,
    bytes_over,
    groups,
    rate_over,
    share_of,
    speed_over,
)
from bench.suite.model import DENSE_MODEL
from bench.suite.rows import Row

LONG = 32000
"""Tokens from which a case counts for the targets."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One line.

    Attributes:
        table: which of the two.
        text: as the table says it.
        floor: at least (at most, where ``lower``) this; None where the table has none.
        aim: likewise.
        wants: which cases count.
        measure: the number of a case, None where it was not measured.
        lower: whether less is better.
        share: whether the number is a share.
    """

    table: str
    text: str
    floor: float | None
    aim: float | None
    wants: Callable[[Row], bool]
    measure: Measure
    lower: bool = False
    share: bool = False

    def verdict(self, value: float) -> str:
        """``meets the aim``, ``meets the floor``, ``misses the floor``; where there is no floor, ``misses the aim``."""

        def reached(bound: float) -> bool:
            return value <= bound if self.lower else value >= bound

        if self.aim is not None and reached(self.aim):
            return "meets the aim"
        if self.floor is None:
            return "misses the aim"
        if not reached(self.floor):
            return "misses the floor"
        return "meets the floor"

    def show(self, value: float | None) -> str:
        """A bound or a number as text."""
        if value is None:
            return ""
        return f"{value:.1%}" if self.share else f"{value:.3g}x"

    def bound(self, value: float | None) -> str:
        """A floor or an aim as text."""
        if value is None:
            return ""
        return f"{'at most ' if self.lower else ''}{self.show(value)}"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A target and what was measured.

    Attributes:
        target: the target.
        values: by case, of the newest file that has it.
        why: what kept a case from being measured, where the files say it.
        taken: by case, whose kernels the number is with, where ours was timed with those of `tune` and with the defaults.
    """

    target: Target
    values: dict[str, float] = field(default_factory=dict)
    why: str | None = None
    taken: dict[str, str] = field(default_factory=dict)

    @property
    def worst(self) -> float | None:
        """The case that decides."""
        if not self.values:
            return None
        return (max if self.target.lower else min)(self.values.values())

    @property
    def measured(self) -> str:
        """The numbers as text: one, or the range over cases."""
        if not self.values:
            return "not measured"
        low, high = min(self.values.values()), max(self.values.values())
        one = self.target.show(low)
        if len(self.values) > 1:
            one += f" to {self.target.show(high)} ({len(self.values)} cases)"
        for which in sorted(set(self.taken.values())):
            one += f"; {which} kernels: {', '.join(case for case, own in self.taken.items() if own == which)}"
        return one

    @property
    def verdict(self) -> str:
        """By the worst case."""
        return "not measured" if self.worst is None else self.target.verdict(self.worst)


def fine_case(op: str, D: int | None = None, slots: int = 64) -> Callable[[Row], bool]:
    """Fine-stage cases of a configuration, bfloat16, long enough; the forward of a training case is not one of its own."""

    def wants(row: Row) -> bool:
        right = row["op"] == op and (D is None or row["D"] == D) and not (row["config"] or {}).get("training")
        return right and row["dtype"] == "bfloat16" and row["S"] >= LONG and math.prod(row["tile"]) == slots

    return wants


def attention_case(**fields: Any) -> Callable[[Row], bool]:
    """Whole attentions with these fields, on a grid that their tile divides."""

    def wants(row: Row) -> bool:
        divides = all(extent % side == 0 for extent, side in zip(row["grid"], row["tile"]))
        return divides and row["dtype"] == "bfloat16" and all(row.get(key) == value for key, value in fields.items())

    return wants


def tenth(row: Row) -> bool:
    """VSA at density 0.1 (as far as whole tiles allow), 32k tokens or more, fewer heads than Wan2.1-14B's 40."""
    ours = row["impl"] == OURS and row["density"] is not None and abs(row["density"] - 0.1) < 0.005
    return ours and row["S"] >= LONG and row["H"] < 40 and attention_case(method="vsa")(row)


def of_length(low: int, high: int) -> Callable[[Row], bool]:
    """Attentions at density 0.1 of about so many tokens."""
    return lambda row: low <= row["S"] < high and row["impl"] == OURS and abs((row["density"] or 0) - 0.1) < 0.005


def named(word: str) -> Callable[[Row], bool]:
    """Cases by name."""
    return lambda row: word in row["case"]


COMBINED = (("select", None, 1), ("attention_forward", "combine", 1), ("attention_forward", "untile", -1))
FORWARD, TRAINING = "Forward and selection", "Training"


def _line(
    table: str, text: str, floor: float | None, aim: float | None, wants: Any, measure: Any, **more: bool
) -> Target:
    return Target(table=table, text=text, floor=floor, aim=aim, wants=wants, measure=measure, **more)


def targets() -> list[Target]:
    """All lines, in the order of the tables."""
    cudnn, tk, flex = "dense_cudnn", "fastvideo_tk", "flex_64"
    share = {"lower": True, "share": True}
    at_16k, at_32k = of_length(16000, 20000), of_length(32000, 36000)
    f, b = "fine_forward", "fine_backward"
    return [
        _line(
            FORWARD,
            "fine forward TFLOPS / cuDNN dense TFLOPS, D=128",
            0.85,
            1.05,
            fine_case(f, 128),
            rate_over(f, cudnn),
        ),
        _line(FORWARD, "the same, D=64", 0.8, 1.0, fine_case(f, 64), rate_over(f, cudnn)),
        _line(FORWARD, "128-slot tiles, D=128", 0.95, 1.1, fine_case(f, 128, 128), rate_over(f, cudnn)),
        _line(
            FORWARD, "fine forward / FastVideo ThunderKittens, same lists", 1.0, 1.25, fine_case(f), speed_over(f, tk)
        ),
        _line(FORWARD, "forward / stock FlexAttention, same selection", 1.3, 2.0, fine_case(f), speed_over(f, flex)),
        _line(
            FORWARD,
            "selection + combine, share of attention forward, 32k",
            0.1,
            0.05,
            at_32k,
            share_of(*COMBINED),
            **share,
        ),
        _line(FORWARD, "the same, 16k", None, 0.1, at_16k, share_of(*COMBINED), **share),
        _line(
            FORWARD,
            "tiling, share of attention forward, 32k",
            *(0.1, 0.0, at_32k, share_of(("attention_forward", "tiling", 1))),
            **share,
        ),
        _line(
            FORWARD,
            "whole attention forward, density 0.10, gate, against dense cuDNN",
            *(7.0, 9.0, tenth, speed_over("attention_forward", cudnn)),
        ),
        _line(FORWARD, "the same on 21x30x52, against 4x4x4 padding", 1.2, 1.4, named("ragged"), between_tiles),
        _line(
            FORWARD,
            "index memory / (3 x 4 bytes x kept entries)",
            1.0,
            None,
            named("memory"),
            bytes_over("index"),
            lower=True,
        ),
        _line(
            TRAINING,
            "fine backward TFLOPS / cuDNN dense backward, D=128, tile 64",
            0.7,
            0.85,
            fine_case(b, 128),
            rate_over(b, cudnn),
        ),
        _line(TRAINING, "the same, D=64", 0.65, 0.85, fine_case(b, 64), rate_over(b, cudnn)),
        _line(TRAINING, "128-slot tiles, D=128", 0.8, 0.95, fine_case(b, 128, 128), rate_over(b, cudnn)),
        _line(
            TRAINING, "fine backward / FastVideo ThunderKittens, same lists", 1.0, 1.4, fine_case(b), speed_over(b, tk)
        ),
        _line(
            TRAINING, "forward+backward / stock FlexAttention, same selection", 1.3, 2.0, fine_case(b), both_over(flex)
        ),
        _line(
            TRAINING,
            "whole attention, training, density 0.10, gate, against dense cuDNN",
            *(6.0, 8.0, tenth, speed_over("attention_training", cudnn)),
        ),
        _line(
            TRAINING,
            "BSA, 40x48x80, training, against dense",
            10.0,
            17.8,
            named("bsa"),
            speed_over("attention_training", cudnn),
        ),
        _line(TRAINING, "BSA, the same, inference", 10.0, 18.0, named("bsa"), speed_over("attention_forward", cudnn)),
        _line(
            TRAINING,
            "Wan2.1-1.3B-shaped blocks, compiled forward, against dense compiled",
            *(1.72, 2.2, named("model"), speed_over("model_step", DENSE_MODEL, "forward")),
        ),
        _line(
            TRAINING,
            "the same, training step",
            *(None, 2.0, named("model"), speed_over("model_step", DENSE_MODEL, "training")),
        ),
        _line(
            TRAINING,
            "Wan2.1-14B at 720p (20x48x80), attention only, training",
            *(6.0, 8.0, named("14b"), speed_over("attention_training", cudnn)),
        ),
        _line(
            TRAINING,
            "saved for backward / padded q, k, v, o, lse (gate apart)",
            *(1.05, None, named("memory"), bytes_over("saved")),
            lower=True,
        ),
    ]


def lines(files: Sequence[File]) -> list[Line]:
    """Every target with what the files say of it."""
    found = []
    for target in targets():
        values: dict[str, float] = {}
        why: str | None = None
        taken: dict[str, str] = {}
        for group in groups(files):
            if group.case in values or not any(target.wants(row) for row in group.rows):
                continue
            value = target.measure(group)
            if value is not None:
                values[group.case] = value
                if group.taken is not None:
                    taken[group.case] = group.taken
            elif why is None:
                why = next((str(row["reason"]) for row in group.rows if row["reason"]), None)
        found.append(Line(target=target, values=values, why=why, taken=taken))
    return found
