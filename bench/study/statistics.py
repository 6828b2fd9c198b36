"""Paired comparisons over seeds, and how sure they are.

A run and its anchor (dense, mostly) share seed, data order, noise and held-out windows, so that the ratio of their losses
varies far less than the losses. The seeds are the sample: intervals are Student's t over the seeds' ratios.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from bench.study.evidence import Curve

LEVEL = 0.95
CLAIM = 0.005
"""The VSA paper's bound on the relative gap of the loss (arXiv 2505.13389, Table 1 and its scaling figure): 0.5 %."""
NOT_RUN = "not run"


def t_probability(t: float, freedom: int) -> float:
    """P(abs(T) <= t) of Student's distribution with whole degrees of freedom: the finite series of Abramowitz and Stegun,
    26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for index in range(2 if not odd else 3, freedom + 1, 2):
        total += term
        term *= square * (index - 1) / index
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """The t with P(abs(T) <= t) = level, by bisection.

    Raises:
        ValueError: no degrees of freedom, or a level outside (0, 1).
    """
    if freedom < 1 or not 0 < level < 1:
        raise ValueError(f"freedom is {freedom} and level {level}: give at least 1 and something between 0 and 1")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        below = t_probability(math.tan(middle) * math.sqrt(freedom), freedom) < level
        low, high = (middle, high) if below else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


@dataclass(frozen=True)
class Estimate:
    """A quantity measured once a seed (or a model)."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    def interval(self, level: float = LEVEL) -> tuple[float, float] | None:
        """Two-sided t-interval; None for one seed."""
        n = len(self.values)
        if n < 2:
            return None
        half = t_quantile(n - 1, level) * stdev(self.values) / math.sqrt(n)
        return self.mean - half, self.mean + half


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A method against its anchor.

    Attributes:
        name: what is compared, for people.
        gap: loss / anchor's loss - 1 of each seed that both have; None where nothing can be compared.
        step: at which both were measured; None where it is not the same step.
        why: what is missing; empty where nothing is.
        diverged: seeds whose loss is not finite; they are in no mean.
    """

    name: str
    gap: Estimate | None
    step: int | None = None
    why: str = ""
    diverged: int = 0


Curves = Mapping[int, Curve]


def common_steps(method: Curves, anchor: Curves) -> dict[int, set[int]]:
    """Seed -> steps at which both were measured."""
    return {seed: set(method[seed].steps) & set(anchor[seed].steps) for seed in method.keys() & anchor.keys()}


def equal_steps(name: str, method: Curves, anchor: Curves, step: int | None = None) -> Comparison:
    """At a step, by default the last that any seed has of both; seeds that do not have it are left out, and ``why`` counts
    them."""
    common = common_steps(method, anchor)
    reached = {found for steps in common.values() for found in steps}
    step = max(reached, default=None) if step is None else step
    if step not in reached:
        return Comparison(name=name, gap=None, why=missing(method, anchor))
    pairs = [(method[s].at(step), anchor[s].at(step)) for s, steps in sorted(common.items()) if step in steps]
    late = len(method.keys() | anchor.keys()) - len(pairs)
    why = f"{late} more {'seed' if late == 1 else 'seeds'} without a pair at this step" if late else ""
    return compared(name, pairs, step, why)


def missing(method: Curves, anchor: Curves) -> str:
    """Why there is no pair."""
    if not method or not anchor:
        return NOT_RUN
    return "no seed and step in common"


def compared(name: str, pairs: Sequence[tuple[float, float]], step: int | None, why: str) -> Comparison:
    """From losses (own, anchor's)."""
    ratios = tuple(own / other - 1 for own, other in pairs if math.isfinite(own) and math.isfinite(other))
    gap = Estimate(ratios) if ratios else None
    return Comparison(name=name, gap=gap, step=step, why=why, diverged=len(pairs) - len(ratios))


def equal_flops(name: str, method: Curves, anchor: Curves) -> Comparison:
    """At the training FLOPs of the anchor's last evaluation, the method's curve linear in log FLOPs."""
    return _at_budget(name, method, anchor, lambda own, other: other.flops[-1], "dense's")


def shared_flops(name: str, method: Curves, anchor: Curves) -> Comparison:
    """At the most training FLOPs that both curves of a seed reach, both linear in log FLOPs.

    What equal steps can always say about equal FLOPs, at the smaller budget of the two.
    """
    return _at_budget(name, method, anchor, lambda own, other: min(own.flops[-1], other.flops[-1]), "the shared")


def shared_budget(method: Curves, anchor: Curves) -> float | None:
    """The budget of `shared_flops` over the FLOPs of the anchor's last evaluation, mean over seeds."""
    both = sorted(method.keys() & anchor.keys())
    shares = [min(1.0, method[s].flops[-1] / anchor[s].flops[-1]) for s in both if anchor[s].flops[-1]]
    return fmean(shares) if shares else None


def _at_budget(
    name: str, method: Curves, anchor: Curves, budget: Callable[[Curve, Curve], float], whose: str
) -> Comparison:
    both = sorted(method.keys() & anchor.keys())
    if not both:
        return Comparison(name=name, gap=None, why=missing(method, anchor))
    pairs, short = [], []
    for seed in both:
        own, other = method[seed], anchor[seed]
        flops = budget(own, other)
        losses = own.at_flops(flops), other.at_flops(flops)
        if None in losses:
            short.append(min(own.flops[-1], other.flops[-1]) / flops if flops else 0.0)
        else:
            pairs.append(losses)
    if not pairs:
        return Comparison(
            name=name, gap=None, why=f"not measured: the curves meet only to {100 * min(short):.0f} % of {whose} FLOPs"
        )
    why = f"{len(short)} more seeds do not reach {whose} FLOPs" if short else ""
    return compared(name, pairs, None, why)  # type: ignore[arg-type]


def window_spread(method: Curve, anchor: Curve, step: int) -> float | None:
    """Standard deviation over held-out windows of the relative gap of one seed. It tells how much clips differ, and is no
    substitute for more seeds. None with fewer than two windows."""
    own, other = method.windows.get(step, ()), anchor.windows.get(step, ())
    ratios = [a / b - 1 for a, b in zip(own, other)]
    return stdev(ratios) if len(ratios) > 1 and len(own) == len(other) else None


def percent(value: float) -> str:
    """``+0.31 %``."""
    return f"{_hundredths(value)} %"


def _hundredths(value: float) -> str:
    return f"{round(100 * value, 2) + 0.0:+.2f}"  # + 0.0: no minus before zero


def many(count: int, what: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{count} {what}" + ("" if count == 1 else "s")


def interval_text(estimate: Estimate | None) -> str:
    """``+0.31 % (-0.10 to +0.72)``."""
    if estimate is None:
        return NOT_RUN
    found = estimate.interval()
    if found is None:
        return f"{percent(estimate.mean)} (one seed)"
    return f"{percent(estimate.mean)} ({_hundredths(found[0])} to {_hundredths(found[1])})"


def gap_text(comparison: Comparison) -> str:
    """A table's cell."""
    text = interval_text(comparison.gap) if comparison.gap else comparison.why or "not measured"
    if comparison.diverged:
        text = (f"{text}; " if comparison.gap else "") + f"{comparison.diverged} diverged"
    return text


def verdict(comparison: Comparison, level: float = LEVEL) -> str:
    """What the interval shows, and no more."""
    if comparison.diverged:
        finite = len(comparison.gap.values) if comparison.gap else 0
        return f"{comparison.diverged} of {comparison.diverged + finite} seeds diverged"
    if comparison.gap is None:
        return comparison.why or "not measured"
    found = comparison.gap.interval(level)
    if found is None:
        return "one seed: no verdict"
    low, high = found
    if low > 0:
        return f"worse by {100 * low:.2f} to {100 * high:.2f} %"
    if high < 0:
        return f"better by {-100 * high:.2f} to {-100 * low:.2f} %"
    return "no difference shown (interval includes 0)"


def claim(comparison: Comparison, bound: float = CLAIM) -> str:
    """Whether the interval lies below a bound on the gap."""
    if comparison.diverged:
        return "outside"
    if comparison.gap is None:
        return comparison.why or "not measured"
    found = comparison.gap.interval()
    if found is None:
        return "one seed: no verdict"
    return "within" if found[1] <= bound else "outside" if found[0] > bound else "too wide to tell"


def shown(comparison: Comparison, level: float = LEVEL) -> bool:
    """Whether an interval excludes 0."""
    found = comparison.gap.interval(level) if comparison.gap else None
    return found is not None and (found[0] > 0 or found[1] < 0)


def family(comparisons: Sequence[Comparison], *, names: bool = True) -> str:
    """How many comparisons were made, and what is left when all of them must hold together (Bonferroni).

    Args:
        comparisons: of a question, or of the page.
        names: whether to name those that are left.
    """
    made = [c for c in comparisons if c.gap is not None and len(c.gap.values) > 1]
    single = sum(c.gap is not None and len(c.gap.values) == 1 for c in comparisons)
    if not made:
        return f"Comparisons with an interval: none; with one seed, so without: {single}."
    level = 1 - (1 - LEVEL) / len(made)
    apart, strict = sum(shown(c) for c in made), [c.name for c in made if shown(c, level)]
    left = f"{len(strict)}" + (f" ({'; '.join(strict)})" if names else "") if strict else "none"
    return (
        f"Comparisons with an interval: {len(made)}; with one seed, so without: {single}. At {100 * LEVEL:g} % each, about "
        f"{(1 - LEVEL) * len(made):.1f} intervals would exclude 0 with no difference anywhere; {apart} do. With the "
        f"level raised to 1 - {1 - LEVEL:.2f}/{len(made)} (Bonferroni), intervals that still exclude 0: {left}."
    )


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, the smallest first; equal values share the mean of their ranks."""
    return [sum(other < x for other in values) + (1 + sum(other == x for other in values)) / 2 for x in values]


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Spearman's; None where either side does not vary or there are fewer than three."""
    a, b = ranks(left), ranks(right)
    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    x, y = fmean(a), fmean(b)
    top = sum((p - x) * (q - y) for p, q in zip(a, b))
    return top / math.sqrt(sum((p - x) ** 2 for p in a) * sum((q - y) ** 2 for q in b))
