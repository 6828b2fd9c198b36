"""What the figures show, from rows: no matplotlib here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import fmean

from bench.study.evidence import Curve, Study
from bench.study.tables import main_sizes
from bench.study.tables_probes import grouped, values
from bench.study.tables_schedule import SCHEDULES

Point = tuple[float, float, float, float]
"""x, mean over seeds, lowest, highest."""
Trade = Mapping[str, list[Point]]
Lines = Mapping[str, list[tuple[float, float]]]
Bars = Mapping[str, tuple[float, float, float, "float | None", float]]
Heat = Mapping[int, Mapping[str, float]]
SKIPPED = 0.2
"""Share of the steps at the start of a curve that figures leave out: their losses hide the rest."""


def begun(seeds: Mapping[int, Curve], start: int) -> dict[int, Curve]:
    """Seeds that got as far as figures begin: one that was only just started would hide what the others show."""
    return {seed: curve for seed, curve in seeds.items() if curve.steps and curve.steps[-1] >= start}


def band(seeds: Mapping[int, Curve], x: Callable[[Curve, int], float], start: int) -> list[Point]:
    """Steps that every seed has that has begun: mean and range."""
    seeds = begun(seeds, start)
    if not seeds:
        return []
    found = []
    for step in sorted(set.intersection(*(set(curve.steps) for curve in seeds.values()))):
        losses = [curve.at(step) for curve in seeds.values()]
        if step >= start and all(map(math.isfinite, losses)):
            place = fmean(x(curve, step) for curve in seeds.values())
            found.append((place, fmean(losses), min(losses), max(losses)))
    return found


def _shown(study: Study, size: str) -> dict[str, dict[int, Curve]]:
    return {m: study.curves(size, m) for m in study.methods(size, "main")}


def _start(study: Study, size: str) -> int:
    dense = study.curves(size, "dense") or next(iter(_shown(study, size).values()), {})
    return math.ceil(SKIPPED * max((curve.steps[-1] for curve in dense.values()), default=0))


def _flops(curve: Curve, step: int) -> float:
    return curve.flops[curve.steps.index(step)]


def against_flops(study: Study) -> dict[str, Trade]:
    """Size -> method -> loss by training FLOPs."""
    found = {}
    for size in main_sizes(study):
        lines = {m: band(seeds, _flops, max(1, _start(study, size))) for m, seeds in _shown(study, size).items()}
        if kept := {m: points for m, points in lines.items() if points and points[0][0] > 0}:
            found[size] = kept
    return found


def against_time(study: Study) -> dict[str, Trade]:
    """Size -> method -> loss by seconds, for methods that were timed."""
    found = {}
    for size in main_sizes(study):
        lines = {}
        for method, seeds in _shown(study, size).items():
            each = study.seconds(size, method)
            if each and (points := band(seeds, lambda _, step: step, max(1, _start(study, size)))):
                lines[method] = [(step * each, *rest) for step, *rest in points]
        if lines:
            found[size] = lines
    return found


def gaps(own: Mapping[int, Curve], other: Mapping[int, Curve], start: int) -> list[Point]:
    """Gap in percent by step, over the seeds that both have."""
    both = sorted(begun(own, start).keys() & begun(other, start).keys())
    if not both:
        return []
    found = []
    for step in sorted(set.intersection(*({*own[s].steps} & {*other[s].steps} for s in both))):
        ratios = [100 * (own[s].at(step) / other[s].at(step) - 1) for s in both]
        if step >= start and all(map(math.isfinite, ratios)):
            found.append((step, fmean(ratios), min(ratios), max(ratios)))
    return found


def curves(study: Study) -> dict[str, tuple[Trade, Trade]]:
    """Size -> loss by step, gap to dense in percent by step."""
    found = {}
    for size in main_sizes(study):
        start, dense, shown = _start(study, size), study.curves(size, "dense"), _shown(study, size)
        losses = {m: points for m, seeds in shown.items() if (points := band(seeds, lambda _, step: step, start))}
        apart = {m: points for m, seeds in shown.items() if m != "dense" and (points := gaps(seeds, dense, start))}
        if losses:
            found[size] = losses, apart
    return found


def training_free(study: Study) -> dict[str, tuple[Lines, Lines]]:
    """Size -> error, attention mass kept; by density, mean over layers, levels and models."""
    found = {}
    for size in study.sizes("training_free"):
        both: tuple[dict[str, list[tuple[float, float]]], ...] = ({}, {})
        for (method, _), rows in grouped(study.of("training_free", size=size), "method", "option").items():
            for lines, name in zip(both, ("error", "recall")):
                if (y := values(rows, name)) and (x := values(rows, "density")):
                    lines.setdefault(method, []).append((fmean(x), fmean(y)))
        errors, recalls = ({m: sorted(points) for m, points in lines.items()} for lines in both)
        if errors:
            found[size] = errors, recalls
    return found


def rules(study: Study) -> dict[str, Bars]:
    """Size -> rule -> error: mean, lowest, highest; mean over pruned queries; density. The least error first."""
    found = {}
    for size in study.sizes("bsa_rule"):
        bars = {}
        for (rule,), rows in grouped(study.of("bsa_rule", size=size), "rule").items():
            if error := values(rows, "error"):
                pruned = values(rows, "pruned_error")
                density = fmean(values(rows, "density"))
                bars[rule] = (fmean(error), min(error), max(error), fmean(pruned) if pruned else None, density)
        if bars:
            found[size] = dict(sorted(bars.items(), key=lambda item: item[1][0]))
    return found


def overlap(study: Study) -> dict[str, Heat]:
    """Title -> layer -> axis -> overlap, mean over levels and models."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    rows = [{**row, "trained": row["model"].split("/")[1]} for row in study.of("overlap")]
    for (size, trained, method), some in grouped(rows, "size", "trained", "method").items():
        for (layer, axis), cell in sorted(grouped(some, "layer", "axis").items(), key=lambda item: item[0][0]):
            if shared := values(cell, "overlap"):
                title = f"size {size}, trained {trained}: lists of {method}"
                found.setdefault(title, {}).setdefault(layer, {})[axis] = fmean(shared)
    return found


def schedule(study: Study) -> dict[str, Trade]:
    """Size -> run -> gap to dense continued, in percent, by step."""
    found = {}
    for size in study.sizes("evaluation"):
        anchor = study.curves(size, "dense_more")
        lines = {m: points for m in SCHEDULES if (points := gaps(study.curves(size, m), anchor, 0))}
        if lines:
            found[size] = lines
    return found
