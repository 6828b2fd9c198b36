"""Tables of questions 3, 4 and 5 (BSA's rules; training-free and schedules; overlap of neighbours), made from
rows only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from bench.report import table
from bench.study import paper
from bench.study.evidence import Row, Study
from bench.study.statistics import NOT_RUN, Comparison, Estimate, gap_text, many, shown, verdict
from bench.study.tables import Section, against, anchor_line, at, number, seeds
from bench.study.tables_parts import PARTS_SIZE

TRAINED: dict[str, str] = {
    "bsa_zero": "pruned queries give zero",
    "bsa_nearest": "pruned queries take the nearest kept query's output",
    "bsa_tile_window": "one window: the whole tile",
    "bsa_mass": "threshold on the attention mass",
    "bsa_medoid": "window centre is the medoid",
}


def values(rows: Sequence[Row], name: str) -> list[float]:
    """Finite values of a field."""
    found = [row.get(name) for row in rows]
    return [float(x) for x in found if isinstance(x, int | float) and math.isfinite(x)]


def spread(found: Sequence[float], digits: int = 3) -> str:
    """``0.123 (0.1 to 0.2)``: mean and range."""
    if not found:
        return "not measured"
    return f"{fmean(found):.{digits}f} ({min(found):.{digits}f} to {max(found):.{digits}f})"


def grouped(rows: Sequence[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """By fields, in order of appearance."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def models(rows: Sequence[Row]) -> int:
    """How many trained models these are of."""
    return len({row["model"] for row in rows})


def of_models(rows: Sequence[Row]) -> str:
    """``3 models, 960 steps``: how many trained models rows are of, and how long they were trained, where all rows say it."""
    steps = {row.get("steps") for row in rows}
    trained = "" if None in steps else f", {' or '.join(str(n) for n in sorted(steps))} steps"
    return many(models(rows), "model") + trained


def ratio_over_models(name: str, own: Sequence[Row], anchor: Sequence[Row], what: str) -> Comparison:
    """Mean of a field over a model's rows against the anchor's, once a model."""
    left, right = grouped(own, "model"), grouped(anchor, "model")
    pairs = [(values(left[m], what), values(right[m], what)) for m in left if m in right]
    found = tuple(fmean(a) / fmean(b) - 1 for a, b in pairs if a and b and fmean(b) > 0)
    return Comparison(name=name, gap=Estimate(found) if found else None, why="" if found else NOT_RUN)


def rules(study: Study) -> Section:
    """Question 3: BSA's rules, on captured attention and trained."""
    parts, comparisons, answers = [], [], []
    for size in study.sizes("bsa_rule"):
        found = grouped(study.of("bsa_rule", size=size), "rule")
        default = found.get(("default",), [])
        heading = ["rule", "models", "keep queries", "KV density", "density"]
        heading += ["error (range)", "error of pruned queries (range)", "error against default"]
        body = []
        order = sorted(found, key=lambda key: fmean(values(found[key], "error") or [math.inf]))
        for key in order:
            rows = found[key]
            change = ratio_over_models(f"{size}, BSA rule {key[0]}", rows, default, "error")
            if key != ("default",):
                comparisons.append(change)
            knobs = [
                ", ".join(sorted({f"{x:g}" for x in values(rows, name)})) for name in ("keep_queries", "kv_density")
            ]
            line = [key[0], str(models(rows)), *(knob or "not set" for knob in knobs)]
            line += [f"{fmean(values(rows, 'density')):.3f}", spread(values(rows, "error"))]
            pruned = values(rows, "pruned_error")
            line += [spread(pruned) if pruned else "none pruned"]
            body.append([*line, "" if key == ("default",) else gap_text(change)])
        parts += [f"### Size {size}: output error on captured q, k, v of models trained dense", table(heading, body)]
        if order and default:
            rivals = [k for k in order if "density" not in k[0] and "keep" not in k[0] and k != ("default",)]
            best = next(iter(rivals), None)
            if best is not None:
                error = ratio_over_models("", found[best], default, "error")
                answers.append(
                    f"BSA's rules at size {size}, {of_models(found[best])}: of single changes, `{best[0]}` "
                    f"has the least output error, {gap_text(error)} against the default ({verdict(error)}); "
                    f"densities differ, see the table."
                )
    if parts:
        parts.append(
            "Error: RMS of the difference to dense attention's output over RMS of that output; mean and range over "
            "layers, noise levels and models. Sorted by error; a rule with a higher density has an easier task. "
            "Intervals are over models."
        )
    else:
        parts = [f"Output error of the rules: {NOT_RUN}."]
        answers = [f"BSA's rules on captured attention: {NOT_RUN}."]
    made, trained, said = trained_rules(study)
    return Section(
        title="3. BSA's rules",
        parts=[*parts, *made],
        comparisons=[*comparisons, *trained],
        answers=[*answers, *said],
    )


def trained_rules(study: Study) -> tuple[list[str], list[Comparison], list[str]]:
    """The rules trained from the start, against BSA as it is."""
    parts, comparisons, answers = [], [], []
    for size in [s for s in study.sizes("evaluation") if {*study.methods(s)} & {*TRAINED}] or [PARTS_SIZE]:
        body = []
        gaps = {method: against(study, size, method, "bsa") for method in TRAINED}
        body.append(anchor_line(study, size, "bsa", "what the others are compared with", gaps.values()))
        for method, what in TRAINED.items():
            gap = gaps[method]
            comparisons.append(gap)
            body.append([method, what, seeds(gap), str(gap.step or ""), at(study, size, method, gap), gap_text(gap)])
            body[-1].append(verdict(gap))
            if gap.gap and shown(gap):
                answers.append(f"{method} trained at size {size} ({what}): {verdict(gap)} than bsa.")
        heading = ["variant", "what", "seeds", "step", "loss", "gap to bsa", "verdict"]
        parts += [f"### Size {size}: trained", table(heading, body)]
    return parts, comparisons, answers


def training_free(study: Study) -> Section:
    """Question 4, first half: dense models with their attention swapped."""
    parts, comparisons, answers = [], [], []
    for size in study.sizes("training_free", "training_free_loss"):
        probes = grouped(study.of("training_free", size=size), "method", "option")
        losses = grouped(study.of("training_free_loss", size=size), "method", "option")
        anchor = [row for key, rows in losses.items() if key[0] == "dense" for row in rows]
        keys = [key for key in dict.fromkeys([*probes, *losses]) if key[0] != "dense"]
        body = []
        for key in sorted(keys, key=lambda key: (key[0], -key[1])):
            rows, swapped = probes.get(key, []), losses.get(key, [])
            change = ratio_over_models(f"{size}, {key[0]} {key[1]:g} without training", swapped, anchor, "loss")
            if swapped:
                comparisons.append(change)
            kept = values([*rows] or [*swapped], "density")
            line = [
                key[0],
                f"{key[1]:g}",
                str(models([*rows, *swapped])),
                f"{fmean(kept):.3f}" if kept else "not measured",
            ]
            line.append(spread(values(rows, "error")) if rows else NOT_RUN)
            line.append(
                (spread(values(rows, "recall")) if values(rows, "recall") else "cannot be said") if rows else NOT_RUN
            )
            body.append([*line, gap_text(change)])
            if key[0] in ("vsa", "bsa", "bsa_kv") and key[1] == 0.125 and rows:
                answers.append(
                    f"Without training, {key[0]} at density {fmean(kept):.3f} on models trained dense at size {size} "
                    f"({of_models(rows)}): output error {fmean(values(rows, 'error')):.3f}, attention mass kept "
                    f"{number(fmean(values(rows, 'recall')), 3) if values(rows, 'recall') else 'not known'}, "
                    f"held-out loss {gap_text(change)}{' against dense' if change.gap else ''}."
                )
        blind, chosen = probes.get(("random", 0.125), []), probes.get(("vsa", 0.125), [])
        if blind and chosen:
            luck = ratio_over_models(f"{size}, random against vsa without training", blind, chosen, "error")
            comparisons.append(luck)
            why = "" if luck.gap is None or luck.gap.mean >= 0 else "; so it is where attention is spread evenly"
            answers.append(
                f"Without training at size {size}, an eighth of the tiles drawn at random: output error {gap_text(luck)} "
                f"against vsa's: {verdict(luck)}{why}."
            )
        heading = [
            "method",
            "option",
            "models",
            "density",
            "error (range)",
            "attention mass kept (range)",
            "loss against dense",
        ]
        parts += [f"### Size {size}", table(heading, body)]
    if parts:
        parts.append(
            "Error and mass: mean and range over layers, noise levels and models. Option: the density aimed at, "
            "for top_p the mass. `random` draws tiles blindly (the floor), `best` takes the tiles with the most "
            "true mass (the ceiling of the mass, not of the error; it costs what dense costs). Losses are on fewer windows "
            "than those of training, dense on the same ones."
        )
    return Section(
        title="4. Without training: a model trained dense, its attention swapped",
        parts=parts or [f"{NOT_RUN.capitalize()}."],
        comparisons=comparisons,
        answers=answers or [f"Attention swapped without training: {NOT_RUN}."],
    )


def overlap(study: Study) -> Section:
    """Question 5: how much neighbouring query tiles' lists have in common."""
    parts, answers = [], []
    for size in study.sizes("overlap"):
        rows = [{**row, "trained": row["model"].split("/")[1]} for row in study.of("overlap", size=size)]
        body: list[list[str]] = []
        said: dict[tuple[str, str], list[str]] = {}
        floor: dict[tuple[str, str], list[float]] = {}
        for (trained, method, axis), found in grouped(rows, "trained", "method", "axis").items():
            shared, chance = values(found, "overlap"), values(found, "random")
            if not shared:
                continue
            per_model = tuple(fmean(values(some, "overlap")) for some in grouped(found, "model").values())
            pays = sum(x >= paper.SHARING_PAYS for x in shared)
            says = sharing(Estimate(per_model))
            line = [trained, method, axis, str(models(found)), spread(shared), f"{fmean(chance):.3f}" if chance else ""]
            body.append([*line, f"{pays} of {len(shared)}", says])
            texts = said.setdefault((method, trained), [])
            texts.append(f"{axis} {fmean(shared):.3f} ({says})")
            if chance:
                floor.setdefault((method, trained), []).append(fmean(chance))
        for (method, trained), texts in said.items():
            blind = floor.get((method, trained))
            answers.append(
                f"Overlap of neighbours' lists, {method} on models trained {trained} at size {size}: "
                f"{', '.join(texts)}; random lists {f'{fmean(blind):.3f}' if blind else 'not measured'}; in "
                f"brackets, whether it is at least {paper.SHARING_PAYS}, where sharing loads pays."
            )
        heading = ["trained", "lists of", "axis", "models", "overlap (range)", "random lists"]
        heading += [
            f"layers x levels at {paper.SHARING_PAYS} or more",
            f"mean at least {paper.SHARING_PAYS}: sharing pays?",
        ]
        parts += [f"### Size {size}", table(heading, body)]
        axes = list(dict.fromkeys(row["axis"] for row in rows))
        body = []
        for (trained, method, layer), found in sorted(grouped(rows, "trained", "method", "layer").items(), key=str):
            cells = [values([row for row in found if row["axis"] == axis], "overlap") for axis in axes]
            body.append([trained, method, str(layer), *(f"{fmean(x):.3f}" if x else NOT_RUN for x in cells)])
        parts += ["By layer, mean over noise levels and models:"]
        parts.append(table(["trained", "lists of", "layer", *(f"along {axis}" for axis in axes)], body))
    if parts:
        parts.append(
            "Overlap: tiles in the lists of both of two neighbouring query tiles, over the mean length of the two. "
            "Random lists of the same lengths would have the overlap in the column beside it. At least half "
            "decides for a kernel that loads KV tiles once for two query tiles."
        )
    return Section(
        title="5. Neighbouring query tiles: what their lists share",
        parts=parts or [f"{NOT_RUN.capitalize()}."],
        answers=answers or [f"Overlap of neighbours' lists: {NOT_RUN}."],
    )


def sharing(estimate: Estimate) -> str:
    """Whether sharing loads pays, judged by the mean and, where there are several models, their interval."""
    found, bar = estimate.interval(), paper.SHARING_PAYS
    if found is None:
        return f"{'yes' if estimate.mean >= bar else 'no'}, one model"
    if found[0] >= bar:
        return "yes"
    return "no" if found[1] < bar else "too wide to tell"
