"""The gaps along training, made from rows only: a method that is ahead at a small budget need not be at a large one."""

from __future__ import annotations

import dataclasses

from bench.report import table
from bench.study import paper
from bench.study.evidence import Curve, Study
from bench.study.statistics import Comparison, Curves, compared, equal_flops, gap_text, missing, verdict
from bench.study.tables import FLOOR, MAIN, Section, main_sizes, number


def at_step(name: str, method: Curves, anchor: Curves, step: int) -> Comparison:
    """The gap at one step, over the seeds that have it of both."""
    both = sorted(seed for seed in method.keys() & anchor.keys() if step in method[seed].steps)
    pairs = [(method[seed].at(step), anchor[seed].at(step)) for seed in both if step in anchor[seed].steps]
    return compared(name, pairs, step, "" if pairs else missing(method, anchor))


def up_to(curve: Curve, step: int) -> Curve:
    """A curve that ends at a step which it has."""
    end = curve.steps.index(step) + 1
    return dataclasses.replace(
        curve,
        steps=curve.steps[:end],
        flops=curve.flops[:end],
        attention_flops=curve.attention_flops[:end],
        losses=curve.losses[:end],
    )


def along(study: Study) -> Section:
    """At each evaluation of dense: gaps at that step, and at the FLOPs that dense took up to there."""
    made, comparisons, answers = [], [], []
    for size in main_sizes(study):
        dense = study.curves(size, "dense")
        steps = sorted({step for curve in dense.values() for step in curve.steps if step > 0})
        body = []
        for step in steps:
            anchor = {seed: up_to(curve, step) for seed, curve in dense.items() if step in curve.steps}
            line = [str(step), number(study.loss(size, "dense", step))]
            for method in MAIN:
                curves = study.curves(size, method)
                found = (
                    at_step(f"{size}/{method} at step {step}", curves, anchor, step),
                    equal_flops(f"{size}/{method} at dense's FLOPs of step {step}", curves, anchor),
                )
                comparisons += found
                line += [gap_text(gap) for gap in found]
            body.append([*line, gap_text(at_step(size, study.curves(size, FLOOR), anchor, step))])
        if body:
            heading = ["step", "dense loss", *(f"{m}, equal {what}" for m in MAIN for what in ("steps", "FLOPs"))]
            made += [f"### Size {size}", table([*heading, f"{FLOOR}, equal steps"], body)]
            floor = at_step(f"{size}/{FLOOR}", study.curves(size, FLOOR), dense, steps[-1])
            answers.append(_matters(size, steps[-1], floor))
    explained = (
        f"`{FLOOR}` is the floor: no tile sees another. Where it is not worse than dense, attention over the video does not "
        f"matter at that point of training, and the other gaps say nothing about selecting it well. The paper's dense model "
        f"is the worst but one of seven at its small budget ({paper.SMALL_BUDGET}) and second at its large one "
        f"({paper.LARGE_BUDGET}; {paper.SOURCE})."
    )
    return Section(
        title="Gap along training",
        parts=[explained, *made] if made else ["Not run."],
        comparisons=comparisons,
        answers=answers,
    )


def _matters(size: str, step: int, floor: Comparison) -> str:
    """Whether attention between tiles matters at the end of dense's training."""
    if floor.gap is None:
        return f"Whether attention between tiles matters at size {size} at step {step}: {verdict(floor)} ({FLOOR})."
    return (
        f"Attention within tiles alone ({FLOOR}) at size {size}, step {step}: loss {gap_text(floor)} against dense: "
        f"{verdict(floor)}. The nearer to zero or below, the less the other gaps at this size mean."
    )
