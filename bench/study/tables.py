"""Tables of question 1 (quality against dense), and what all tables share; made from rows only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from bench.report import table
from bench.study.evidence import Study
from bench.study.statistics import (
    NOT_RUN,
    Comparison,
    claim,
    compared,
    equal_flops,
    equal_steps,
    gap_text,
    missing,
    shared_budget,
    shared_flops,
    verdict,
    window_spread,
)

MAIN = ("vsa", "bsa")
FLOOR = "own_tile"
COMPARED = ("fine_only", "own_tile", "sliding_tile", "top_p", "spatial_temporal", "spatial_full", "compressed_kv")


@dataclass(frozen=True, kw_only=True)
class Section:
    """One question's answer.

    Attributes:
        title: of it.
        parts: paragraphs and tables, Markdown.
        comparisons: all that it makes, for the count of comparisons.
        contradictions: (sentence, command that reproduces the runs) where a paper says otherwise.
        answers: sentences for the summary.
    """

    title: str
    parts: Sequence[str]
    comparisons: Sequence[Comparison] = ()
    contradictions: Sequence[tuple[str, str]] = ()
    answers: Sequence[str] = field(default_factory=tuple)


def number(value: float | None, digits: int = 5) -> str:
    """A cell."""
    return NOT_RUN if value is None else f"{value:.{digits}f}"


def times(value: float | None) -> str:
    """A ratio's cell."""
    return "not measured" if value is None else f"{value:.3f}x"


def seeds(comparison: Comparison) -> str:
    """How many pairs."""
    return str(len(comparison.gap.values)) if comparison.gap else "0"


def at(study: Study, size: str, method: str, comparison: Comparison) -> str:
    """The loss at the step of a comparison, over all seeds that have it."""
    return NOT_RUN if comparison.step is None else number(study.loss(size, method, comparison.step))


def against(study: Study, size: str, method: str, anchor: str = "dense", step: int | None = None) -> Comparison:
    """At equal steps, by default as far as both were trained."""
    name = f"{size}/{method} against {anchor}"
    return equal_steps(name, study.curves(size, method), study.curves(size, anchor), step)


def at_equal_flops(study: Study, size: str, method: str) -> str:
    """A cell: at dense's FLOPs, or where the method was not trained so far, at all of its own."""
    own, dense = study.curves(size, method), study.curves(size, "dense")
    whole = equal_flops(size, own, dense)
    share = shared_budget(own, dense)
    shared = shared_flops(size, own, dense)
    if whole.gap is not None or share is None or shared.gap is None:
        return gap_text(whole).partition(":")[0]
    return f"{gap_text(shared)} at {100 * share:.0f} % of dense's"


def anchor_line(study: Study, size: str, anchor: str, what: str, gaps: Iterable[Comparison]) -> list[str]:
    """The line of what others are compared with, at the last step of a comparison."""
    curves = study.curves(size, anchor)
    last = max((curve.steps[-1] for curve in curves.values()), default=None)
    step = max((gap.step for gap in gaps if gap.step is not None), default=last)
    loss = NOT_RUN if step is None else number(study.loss(size, anchor, step))
    return [anchor, what, str(len(curves)), "" if step is None else str(step), loss, "", ""]


def main_sizes(study: Study) -> list[str]:
    """Sizes on which dense, VSA or BSA was trained from the start, but for the grid question's."""
    found = {row["size"]: 0 for row in study.of("evaluation") if row.get("question", "main") == "main"}
    return list(found)


def main_methods(study: Study, size: str) -> list[str]:
    """Dense's rivals of question 1: those that must be there, then any other of the question."""
    others = [m for m in study.methods(size, "main") if m not in ("dense", *MAIN, *COMPARED)]
    return [*MAIN, *COMPARED, *others]


def quality(study: Study) -> Section:
    """Question 1: loss gap and FLOPs against dense, per size."""
    heading = ["size", "method", "seeds", "step", "loss", "gap at equal steps", "verdict"]
    heading += [
        "within the claim (gap at most 0.5 %)?",
        "gap at dense's FLOPs",
        "gap at the FLOPs both reach",
        "density",
    ]
    costs = ["size", "method", "attention FLOPs a step", "all FLOPs a step", "measured step time"]
    body, cost, comparisons, contradictions, answers, spreads = [], [], [], [], [], []
    for size in main_sizes(study):
        dense = study.curves(size, "dense")
        last = max((curve.steps[-1] for curve in dense.values()), default=None)
        body.append(
            [size, "dense", str(len(dense)), str(last or ""), number(study.loss(size, "dense", last) if last else None)]
        )
        body[-1] += [""] * (len(heading) - 5)
        for method in main_methods(study, size):
            curves = study.curves(size, method)
            gap = against(study, size, method)
            whole = equal_flops(f"{gap.name}, dense's FLOPs", curves, dense)
            shared = shared_flops(f"{gap.name}, shared FLOPs", curves, dense)
            comparisons += [gap, whole, shared]
            density = [c.density for c in curves.values() if c.density is not None]
            line = [size, method, seeds(gap), str(gap.step or ""), at(study, size, method, gap), gap_text(gap)]
            line += [verdict(gap), claim(gap), gap_text(whole), gap_text(shared)]
            body.append([*line, f"{fmean(density):.3f}" if density else "" if curves else NOT_RUN])
            flops = study.flops_ratio(size, method)
            attention, total = flops if flops else (None, None)
            cost.append([size, method, *((times(x) if curves else NOT_RUN) for x in (attention, total))])
            cost[-1].append(times(study.time_ratio(size, method)))
            if method in MAIN:
                answers.append(_answer(study, size, method, gap, flops))
            if method in MAIN and claim(gap) == "outside":
                what = f"{size}/{method}: {verdict(gap)}, outside of 0.5 % (VSA's claim; BSA's is of other scores)"
                contradictions.append((what, study.command(size, "dense", method)))
            if method in MAIN and gap.gap and gap.step is not None:
                shared_seeds = [
                    s for s in curves if s in dense and {gap.step} <= {*curves[s].steps} & {*dense[s].steps}
                ]
                spread = window_spread(curves[shared_seeds[0]], dense[shared_seeds[0]], gap.step)
                if spread is not None:
                    spreads.append(f"{size}/{method}, seed {shared_seeds[0]}: {100 * spread:.2f} %")
    parts = [table(heading, body) if body else f"{NOT_RUN.capitalize()}."]
    if cost:
        parts += [
            "Cost against dense (FLOPs counted from the modules, times measured in turn with dense, median of pairs):"
        ]
        parts.append(table(costs, cost))
    if spreads:
        parts.append(
            "Standard deviation of the gap over held-out windows, one seed (how much clips differ; not how sure "
            f"the mean over seeds is): {'; '.join(spreads)}."
        )
    return Section(
        title="1. Loss against dense",
        parts=parts,
        comparisons=comparisons,
        contradictions=contradictions,
        answers=answers,
    )


def _answer(study: Study, size: str, method: str, gap: Comparison, flops: tuple[float, float] | None) -> str:
    where = next((row for row in study.of("run", size=size, method=method)), None)
    shape = (
        ""
        if where is None
        else f" ({'x'.join(map(str, where['grid']))} tokens, {where['parameters'] / 1e6:.2f}M parameters)"
    )
    if gap.gap is None:
        return f"{method} at size {size}{shape}: {verdict(gap)}."
    n = len(gap.gap.values)
    fell = [1 - c.at(gap.step) / c.losses[0] for c in study.curves(size, "dense").values() if gap.step in c.steps]
    trained = f"; dense's loss fell by {100 * fmean(fell):.0f} % up to there" if fell else ""
    cost = (
        ""
        if flops is None
        else f"; a step takes {100 * flops[0]:.1f} % of dense's attention FLOPs and {100 * flops[1]:.1f} % of all its FLOPs"
    )
    flops_text = at_equal_flops(study, size, method)
    return (
        f"{method} at size {size}{shape}, step {gap.step}, {n} {'seeds' if n > 1 else 'seed'}: loss {gap_text(gap)} "
        f"against dense: {verdict(gap)}; the claim of at most 0.5 %: {claim(gap)}{cost}{trained}. At equal FLOPs: {flops_text}."
    )


def noise_levels(study: Study) -> Section:
    """The gaps at each noise level."""
    made, comparisons = [], []
    for size in main_sizes(study):
        body = []
        step = max((s for c in study.curves(size, "dense").values() for s in c.steps), default=None)
        dense = {seed: c.levels[step] for seed, c in study.curves(size, "dense").items() if step in c.levels}
        for level in sorted({level for found in dense.values() for level in found}, key=float):
            line = [level, number(fmean(found[level] for found in dense.values() if level in found))]
            for method in MAIN:
                gap = level_gap(study, size, method, step, level)
                comparisons.append(gap)
                line += [gap_text(gap), verdict(gap)]
            body.append(line)
        if body:
            heading = ["noise level t", "dense loss", *(text for m in MAIN for text in (f"{m} gap", f"{m} verdict"))]
            made += [f"### Size {size}, step {step}", table(heading, body)]
    return Section(
        title="Gap by noise level (t = 1 is pure noise)",
        parts=made or [f"{NOT_RUN.capitalize()}."],
        comparisons=comparisons,
    )


def level_gap(study: Study, size: str, method: str, step: int, level: str) -> Comparison:
    """Of one noise level at one step."""
    own, dense = study.curves(size, method), study.curves(size, "dense")
    pairs = [
        (own[seed].levels[step][level], dense[seed].levels[step][level])
        for seed in sorted(own.keys() & dense.keys())
        if level in own[seed].levels.get(step, {}) and level in dense[seed].levels.get(step, {})
    ]
    return compared(f"{size}/{method} at t {level}", pairs, step, "" if pairs else missing(own, dense))
