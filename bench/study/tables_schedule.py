"""Table of question 4's second half (annealing against an abrupt switch), made from rows only."""

from __future__ import annotations

import math
from statistics import fmean

from bench.report import table
from bench.study.evidence import Study
from bench.study.statistics import NOT_RUN, Comparison, gap_text, many, shown, verdict
from bench.study.tables import Section, against, number, seeds

SCHEDULES = ("vsa_abrupt", "vsa_annealed", "bsa_abrupt", "bsa_annealed")
POINTS = 6
"""Steps of a curve that a table shows, at most."""


def schedules(study: Study) -> Section:
    """Question 4, second half: annealing against an abrupt switch, from a dense model."""
    parts, comparisons, contradictions, answers = [], [], [], []
    for size in [s for s in study.sizes("evaluation") if {*study.methods(s)} & {*SCHEDULES, "dense_more"}]:
        steps = sorted({s for m in (*SCHEDULES, "dense_more") for c in study.curves(size, m).values() for s in c.steps})
        chosen = (
            steps
            if len(steps) <= POINTS
            else [steps[round(i * (len(steps) - 1) / (POINTS - 1))] for i in range(POINTS)]
        )
        body = []
        for method in ("dense_more", *SCHEDULES):
            line = [method, str(len(study.curves(size, method)))]
            body.append([*line, *(number(study.loss(size, method, step)) for step in chosen)])
        parts += [f"### Size {size}: held-out loss by step after the switch, mean over seeds"]
        parts.append(table(["run", "seeds", *map(str, chosen)], body))
        body = []
        for method in SCHEDULES:
            body.append(_schedule_line(study, size, method, "dense_more", comparisons))
        for name in ("vsa", "bsa"):
            body.append(_schedule_line(study, size, f"{name}_annealed", f"{name}_abrupt", comparisons))
            gap = comparisons[-1]
            if gap.gap:
                answers.append(
                    f"{name} from a dense model at size {size}, {many(int(seeds(gap)), 'seed')}: annealed against abrupt "
                    f"{gap_text(gap)} after {gap.step} steps: {verdict(gap)}."
                )
            if gap.gap and gap.gap.mean > 0 and shown(gap):
                text = f"{size}/{name}: annealed against abrupt is {verdict(gap)}; the VSA paper found abrupt unstable"
                only = ("dense", f"{name}_abrupt", f"{name}_annealed")
                contradictions.append((text, study.command(size, *only)))
        heading = ["run", "against", "seeds", "step", "final gap", "verdict", "largest gap on the way"]
        parts.append(table(heading, body))
    return Section(
        title="4b. The schedule: annealed against abrupt",
        parts=parts or [f"{NOT_RUN.capitalize()}."],
        comparisons=comparisons,
        contradictions=contradictions,
        answers=answers or [f"Annealing against an abrupt switch: {NOT_RUN}."],
    )


def _schedule_line(study: Study, size: str, method: str, anchor: str, comparisons: list[Comparison]) -> list[str]:
    gap = against(study, size, method, anchor)
    comparisons.append(gap)
    own, other = study.curves(size, method), study.curves(size, anchor)
    steps = sorted({s for seed in own.keys() & other.keys() for s in {*own[seed].steps} & {*other[seed].steps}})
    way = []
    for step in steps:
        pairs = [(own[k].at(step), other[k].at(step)) for k in own.keys() & other.keys() if step in own[k].steps]
        found = [a / b - 1 for a, b in pairs if math.isfinite(a / b)]
        way += [(fmean(found), step)] if found else []
    worst = max(way, default=None)
    peak = "" if worst is None else f"{100 * worst[0]:+.2f} % at step {worst[1]}"
    return [method, anchor, seeds(gap), str(gap.step or ""), gap_text(gap), verdict(gap), peak or NOT_RUN]
