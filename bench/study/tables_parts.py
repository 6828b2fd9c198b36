"""Tables of question 1b and 2 (the papers' comparison points and their order; which parts matter), made from rows
only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from bench.report import table
from bench.study import paper
from bench.study.evidence import Study
from bench.study.statistics import (
    NOT_RUN,
    Comparison,
    common_steps,
    gap_text,
    percent,
    rank_correlation,
    shown,
    verdict,
)
from bench.study.tables import Section, against, anchor_line, at, main_sizes, seeds

PARTS: dict[str, str] = {
    "vsa": "tile 4x4x4, mean pooling, coarse branch: what the others are compared with",
    "fine_only": "without the coarse branch",
    "vsa_tile16": "tiles of 16 tokens, as many tokens kept",
    "vsa_tile128": "tiles of 128",
    "vsa_tile256": "tiles of 256",
    "vsa_max": "max pooling",
    "vsa_half_k": "half as many tiles kept",
    "vsa_double_k": "twice as many tiles kept",
}
ODD: dict[str, str] = {
    "vsa": "tile 4x4x4, last tiles partly filled: what the others are compared with",
    "dense": "all pairs",
    "vsa_auto": 'tile="auto"',
    "vsa_bias": "partial tiles weighed by their tokens (log-count bias)",
}
PARTS_SIZE, ODD_SIZE = "small", "odd"
"""Sizes that the presets run the parts and the grid question on; named where nothing is on file."""


def order(study: Study) -> Section:
    """Question 1b: does the paper's order of attentions hold?"""
    parts, comparisons, contradictions, answers = [], [], [], []
    for size in main_sizes(study):
        names = [m for m in study.methods(size, "main") if m != "dense"]
        step = _widest_step(study, size, names)
        gaps = {m: against(study, size, m, step=step) for m in names}
        found = {m: gap.gap.mean for m, gap in gaps.items() if gap.gap and not gap.diverged}
        if len(found) < 2:
            continue
        found["dense"] = 0.0
        ordered = sorted(found, key=found.__getitem__)
        heading = ["method", "gap to dense", "the paper's", paper.SMALL_BUDGET, paper.LARGE_BUDGET]
        body = []
        for method in ordered:
            name, small, large = paper.ATTENTIONS.get(method, ("not in the paper", None, None))
            cell = "anchor" if method == "dense" else gap_text(gaps[method])
            body.append([method, cell, name, *("" if x is None else f"{x:.5f}" for x in (small, large))])
        parts += [f"### Size {size}, ordered by loss at step {step}", table(heading, body)]
        late = [m for m in names if m not in found and not gaps[m].diverged]
        if late:
            parts.append(f"Not trained to step {step}, and left out: {', '.join(late)}.")
        for index, budget in ((1, paper.SMALL_BUDGET), (2, paper.LARGE_BUDGET)):
            known = [m for m in ordered if m in paper.ATTENTIONS and paper.ATTENTIONS[m][index] is not None]
            theirs = [float(paper.ATTENTIONS[m][index]) for m in known]  # type: ignore[arg-type]
            same = theirs == sorted(theirs)
            correlation = rank_correlation(range(len(known)), theirs)
            says = "" if correlation is None else f", rank correlation {correlation:+.2f}"
            text = f"Size {size}, step {step}, against {budget}, {len(known)} attentions: "
            text += f"{'same' if same else 'other'} order{says}"
            apart = list(_against_paper(study, size, known, index, step)) if not same else []
            comparisons += [c for _, _, c in apart]
            sure = [(low, high) for low, high, c in apart if shown(c)]
            if not same:
                text += (
                    f"; pairs in the other order: {len(apart)}, of them with an interval that excludes 0: {len(sure)}"
                )
                text += "".join(f"; {a} below {b}" for a, b in sure)
                only = dict.fromkeys(m for pair in (sure or [known]) for m in pair)
                sentence = f"{size}: the order of the attentions is not that of {paper.SOURCE} ({budget}); " + (
                    f"{len(sure)} of {len(apart)} swapped pairs are beyond the seeds' spread"
                )
                contradictions.append((sentence, study.command(size, *dict.fromkeys(["dense", *only]))))
            parts.append(text + ".")
            answers.append(text + ".")
    if not parts:
        parts = [f"{NOT_RUN.capitalize()}: fewer than two attentions besides dense."]
    else:
        parts.append(
            f"The paper's losses: {paper.SOURCE}, one run each, without intervals, on models and budgets far larger "
            "than most here; the sliding tile stands for its strided window, and is not the same. Its own order at "
            "one budget is not its order at the other (dense is last but one at the small budget, and second at "
            "the large one)."
        )
    return Section(
        title="1b. The papers' comparison points, and their order",
        parts=parts,
        comparisons=comparisons,
        contradictions=contradictions,
        answers=answers,
    )


def _widest_step(study: Study, size: str, names: Sequence[str]) -> int | None:
    """The step at which most attentions were compared with dense, the last of several: an order over different steps
    would be one of how long things were trained."""
    dense = study.curves(size, "dense")
    counted: Counter[int] = Counter()
    for name in names:
        counted.update(set().union(*common_steps(study.curves(size, name), dense).values()))
    return max(counted, key=lambda step: (counted[step], step), default=None)


def _against_paper(
    study: Study, size: str, ordered: Sequence[str], index: int, step: int | None
) -> Iterator[tuple[str, str, Comparison]]:
    """Pairs (lower loss here, higher loss here) that the paper has the other way round."""
    for place, low in enumerate(ordered):
        for high in ordered[place + 1 :]:
            if float(paper.ATTENTIONS[low][index]) > float(paper.ATTENTIONS[high][index]):  # type: ignore[arg-type]
                yield low, high, against(study, size, low, high, step)


def parts(study: Study) -> Section:
    """Question 2: which parts matter."""
    sizes = [
        s for s in study.sizes("evaluation") if s != ODD_SIZE and {*study.methods(s)} & {*PARTS} - {"vsa", "fine_only"}
    ]
    made, comparisons, contradictions, answers = [], [], [], []
    for size in sizes or [PARTS_SIZE]:
        gaps = {method: against(study, size, method, "vsa") for method in PARTS if method != "vsa"}
        comparisons += gaps.values()
        body = [[*anchor_line(study, size, "vsa", PARTS["vsa"], gaps.values()), _printed("vsa")]]
        for method, gap in gaps.items():
            body.append([*_variant(study, size, method, PARTS[method], gap), _printed(method)])
            if gap.gap and shown(gap):
                answers.append(f"{method} at size {size} ({PARTS[method]}): {verdict(gap)} than vsa.")
            theirs = paper.PARTS.get(method)
            if theirs is not None and gap.gap and shown(gap) and (gap.gap.mean > 0) != (theirs > paper.PARTS["vsa"]):
                text = f"{size}/{method}: {verdict(gap)} than vsa; {paper.SOURCE} has it the other way round"
                contradictions.append((text, study.command(size, "vsa", method)))
        heading = ["variant", "what", "seeds", "step", "loss", "gap to vsa", "verdict"]
        made += [f"### Size {size}", table([*heading, f"the paper's, {paper.SMALL_BUDGET}"], body)]
    gaps = {method: against(study, ODD_SIZE, method, "vsa") for method in ODD if method != "vsa"}
    comparisons += gaps.values()
    body = [anchor_line(study, ODD_SIZE, "vsa", ODD["vsa"], gaps.values())]
    for method, gap in gaps.items():
        body.append(_variant(study, ODD_SIZE, method, ODD[method], gap))
        if gap.gap and shown(gap):
            answers.append(f"{method} on a grid that 4 does not divide ({ODD[method]}): {verdict(gap)} than vsa.")
    made += [f"### Size {ODD_SIZE}: a grid that 4 does not divide", table(heading, body)]
    measured = sum(c.gap is not None for c in comparisons)
    if not answers:
        answers = [f"Parts: {measured} of {len(comparisons)} variants compared with vsa; no interval excludes 0."]
    return Section(
        title="2. Which parts matter",
        parts=made,
        comparisons=comparisons,
        contradictions=contradictions,
        answers=answers,
    )


def _variant(study: Study, size: str, method: str, what: str, gap: Comparison) -> list[str]:
    return [method, what, seeds(gap), str(gap.step or ""), at(study, size, method, gap), gap_text(gap), verdict(gap)]


def _printed(method: str) -> str:
    theirs = paper.PARTS.get(method)
    return "not in the paper" if theirs is None else f"{theirs:.5f} ({percent(theirs / paper.PARTS['vsa'] - 1)})"
