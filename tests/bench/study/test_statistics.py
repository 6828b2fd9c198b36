"""Intervals and verdicts of the study: against known quantiles, by hand and by simulation."""

from __future__ import annotations

import math
import random

import pytest
from study_rows import evaluation

from bench.study import statistics
from bench.study.evidence import Curve, Study, curve
from bench.study.statistics import Comparison, Estimate


def made(*points: tuple[int, float, float | None], **more: object) -> Curve:
    """A curve from (step, FLOPs, loss)."""
    return curve(evaluation("base", "vsa", 0, step, loss, flops, **more) for step, flops, loss in points)


def gap(*values: float, **more: object) -> Comparison:
    return Comparison(name="x", gap=Estimate(values) if values else None, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("freedom", "level", "known"),
    [
        (1, 0.95, 12.70620),
        (2, 0.95, 4.302653),
        (3, 0.95, 3.182446),
        (4, 0.95, 2.776445),
        (9, 0.95, 2.262157),
        (29, 0.95, 2.045230),
        (2, 0.90, 2.919986),
        (5, 0.99, 4.032143),
        (1000, 0.95, 1.962339),
    ],
)
def test_t_quantiles_are_the_tables(freedom: int, level: float, known: float) -> None:
    assert statistics.t_quantile(freedom, level) == pytest.approx(known, rel=2e-6)


@pytest.mark.parametrize(("freedom", "level"), [(0, 0.95), (3, 0.0), (3, 1.0)])
def test_impossible_quantiles_are_refused(freedom: int, level: float) -> None:
    with pytest.raises(ValueError, match="give at least 1"):
        statistics.t_quantile(freedom, level)


def test_interval_by_hand() -> None:
    low, high = Estimate((0.01, 0.02, 0.03)).interval() or (0, 0)
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert (low, high) == pytest.approx((0.02 - half, 0.02 + half), rel=1e-5)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_cover_as_often_as_they_say(seeds: int) -> None:
    draw, hits, tries = random.Random(seeds), 0, 3000
    for _ in range(tries):
        low, high = Estimate(tuple(draw.gauss(0.3, 1) for _ in range(seeds))).interval() or (0, 0)
        hits += low <= 0.3 <= high
    assert hits / tries == pytest.approx(0.95, abs=0.015)  # four standard errors


@pytest.mark.parametrize(
    ("values", "verdict", "claim"),
    [
        ((0.001, 0.0011, 0.0009), "worse by 0.08 to 0.12 %", "within"),
        ((-0.02, -0.0201, -0.0199), "better by 1.98 to 2.02 %", "within"),
        ((0.02, 0.0201, 0.0199), "worse by 1.98 to 2.02 %", "outside"),
        ((0.001, -0.001, 0.0), "no difference shown (interval includes 0)", "within"),
        ((0.01, -0.02, 0.03), "no difference shown (interval includes 0)", "too wide to tell"),
        ((0.0, 0.0, 0.0), "no difference shown (interval includes 0)", "within"),
        ((0.4,), "one seed: no verdict", "one seed: no verdict"),
        ((), "not run", "not run"),
    ],
)
def test_verdicts(values: tuple[float, ...], verdict: str, claim: str) -> None:
    found = gap(*values, why="" if values else "not run")
    assert (statistics.verdict(found), statistics.claim(found)) == (verdict, claim)


def test_text_of_one_seed_and_of_several() -> None:
    assert statistics.gap_text(gap(0.0123)) == "+1.23 % (one seed)"
    assert statistics.gap_text(gap(0.01, 0.02, 0.03)) == "+2.00 % (-0.48 to +4.48)"


def test_zero_has_no_minus() -> None:
    assert statistics.gap_text(gap(-1e-9)) == "+0.00 % (one seed)"


def test_pairs_share_seed_and_step() -> None:
    dense = {0: made((0, 0, 9.0), (10, 10, 2.0)), 1: made((0, 0, 9.0), (10, 10, 4.0)), 2: made((0, 0, 9.0))}
    own = {0: made((10, 5, 2.2), (20, 10, 1.0)), 1: made((10, 5, 4.2)), 3: made((10, 5, 8.0))}
    found = statistics.equal_steps("x", own, dense)
    assert found.step == 10 and found.gap is not None
    assert found.gap.values == pytest.approx((0.1, 0.05))  # each seed with its own; not means over seeds
    assert found.why.startswith("2 more seeds")


def test_what_is_missing_is_said() -> None:
    some = {0: made((10, 10, 2.0))}
    assert statistics.gap_text(statistics.equal_steps("x", {}, some)) == "not run"
    assert statistics.gap_text(statistics.equal_flops("x", {}, some)) == "not run"
    assert "no seed" in statistics.gap_text(statistics.equal_steps("x", {1: made((10, 10, 2.0))}, some))


def test_a_run_that_diverged_is_in_no_mean_and_not_hidden() -> None:
    dense = {seed: made((10, 10, 2.0)) for seed in range(3)}
    own = {0: made((10, 10, 2.02)), 1: made((10, 10, 2.02)), 2: made((10, 10, None))}
    found = statistics.equal_steps("x", own, dense)
    assert found.gap is not None and found.gap.values == pytest.approx((0.01, 0.01))
    assert statistics.verdict(found) == "1 of 3 seeds diverged" and "1 diverged" in statistics.gap_text(found)
    assert statistics.claim(found) == "outside"


def test_equal_flops_is_linear_in_log_flops() -> None:
    dense = {0: made((0, 0, 9.0), (10, 1e3, 0.5), (20, 2e3, 0.4))}
    own = {0: made((0, 0, 9.0), (10, 5e2, 0.6), (80, 4e3, 0.3))}  # log2: 0.1 a doubling, so 0.4 at 2e3
    found = statistics.equal_flops("x", own, dense)
    assert found.gap is not None and found.gap.values == pytest.approx((0.0,), abs=1e-12)


def test_equal_flops_out_of_reach_is_not_measured() -> None:
    dense, own = {0: made((10, 1e3, 0.5), (20, 2e3, 0.4))}, {0: made((10, 250.0, 0.5), (20, 500.0, 0.4))}
    found = statistics.equal_flops("x", own, dense)
    assert found.gap is None
    assert statistics.gap_text(found) == "not measured: the curves meet only to 25 % of dense's FLOPs"


def test_shared_flops_reads_dense_at_the_smaller_budget() -> None:
    dense = {0: made((10, 1e3, 0.5), (20, 4e3, 0.3))}
    own = {0: made((10, 5e2, 0.5), (20, 2e3, 0.42))}
    found = statistics.shared_flops("x", own, dense)
    assert found.gap is not None and found.gap.values == pytest.approx((0.42 / 0.4 - 1,))
    longer = {0: made((10, 1e3, 0.5), (90, 16e3, 0.1))}  # 0.3 at dense's 4e3
    found = statistics.shared_flops("x", longer, dense)
    assert found.gap is not None and found.gap.values == pytest.approx((0.0,), abs=1e-12)


def test_windows_spread() -> None:
    own, dense = made((10, 1, 1.0), windows=[1.1, 2.6]), made((10, 1, 1.0), windows=[1.0, 2.0])
    assert statistics.window_spread(own, dense, 10) == pytest.approx(0.2 / math.sqrt(2))
    assert statistics.window_spread(own, made((10, 1, 1.0), windows=[1.0]), 10) is None


def test_comparisons_are_counted_and_held_to_a_higher_level() -> None:
    clear, doubtful, none = gap(0.01, 0.01001, 0.00999), gap(0.01, 0.013, 0.007), gap(0.01, -0.01, 0.003)
    assert statistics.shown(doubtful) and not statistics.shown(none)
    text = statistics.family([clear, doubtful, none, gap(0.3), gap(why="not run")])
    assert "with an interval: 3; with one seed, so without: 1" in text
    assert "about 0.2 intervals" in text  # 3 x 0.05, rounded
    assert "; 2 do." in text and "still exclude 0: 1 (x)" in text
    assert "none" in statistics.family([gap(0.1)])


def test_rank_correlation() -> None:
    assert statistics.rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert statistics.rank_correlation([1, 2, 3], [9, 2, 1]) == pytest.approx(-1)
    assert statistics.rank_correlation([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)
    assert statistics.rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)
    assert (
        statistics.rank_correlation([1, 2], [1, 2]) is None
        and statistics.rank_correlation([1, 1, 1], [1, 2, 3]) is None
    )


def test_curves_are_sorted_and_by_seed() -> None:
    rows = [evaluation("base", "vsa", 1, step, 1.0 / step, step) for step in (30, 10, 20)]
    found = Study([*rows, evaluation("base", "dense", 1, 10, 5.0, 1), evaluation("odd", "vsa", 1, 10, 5.0, 1)])
    assert list(found.curves("base", "vsa")) == [1] and found.curves("base", "vsa")[1].steps == (10, 20, 30)


def test_step_time_is_the_median_of_pairs() -> None:
    row = {
        "kind": "timing",
        "size": "base",
        "method": "vsa",
        "seconds": [1.0, 4.0, 30.0],
        "dense_seconds": [4.0, 8.0, 10.0],
    }
    assert Study([row]).time_ratio("base", "vsa") == 0.5
    row = {**row, "seconds": [9.0, 1.0, 5.0], "dense_seconds": [9.0, 4.0, 20.0]}
    assert Study([row]).time_ratio("base", "vsa") == 0.25  # medians would give 5 / 9
    assert Study([row]).time_ratio("base", "bsa") is None


def test_flops_before_a_run_has_finished_come_from_its_evaluations() -> None:
    rows = [evaluation("base", "dense", 0, 10, 1.0, 100.0, attention_flops=80.0)]
    rows.append(evaluation("base", "vsa", 0, 10, 1.0, 40.0, attention_flops=20.0))
    assert Study(rows).flops_ratio("base", "vsa") == pytest.approx((0.25, 0.4))
    assert Study(rows).flops_ratio("base", "bsa") is None
