"""`choice.choose` against a loop over rows: how many tiles every rule keeps, and that they are the best, ties in order."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from flexsparse.ops.choice import RULES, Choice, Rule, _best, choose, masked_softmax, row_threshold, sortable
from flexsparse.ops.select_tiles import allowed_bits, select_tiles
from flexsparse.tile_bits import pack_bits, unpack_bits

NAN, INF = math.nan, math.inf


def slow_count(row: list[float], rule: Rule) -> int:
    """Tiles that a rule asks for of the allowed scores of one row, before bounds."""
    number, n = float(rule.value if rule.now is None else rule.now), len(row)
    if rule.name == "all":
        return n
    if rule.name == "top_k":
        return int(number)
    if rule.name == "normal" and number >= 1:
        return n
    weights = row
    if rule.name in ("probability", "mass"):
        top = max(row)
        weights = [math.exp(x - top) for x in row]
        weights = [x / math.fsum(weights) for x in weights]
    if rule.name == "mass":
        before = 0.0
        for count, weight in enumerate(sorted(weights, reverse=True)):
            if before >= number and number < 1:
                return count
            before += weight
        return n
    if number >= 1:
        return n
    mean = math.fsum(weights) / n
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in weights) / n)
    return sum(x > mean + deviation * NormalDist().inv_cdf(1 - number) for x in weights)


def slow(scores: Tensor, mask: Tensor, rule: Rule, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Kept tiles, counts and wanted counts, row after row."""
    M = scores.shape[-1]
    keep, wanted = torch.zeros(scores.shape, dtype=torch.bool), torch.zeros(scores.shape[:-1], dtype=torch.int32)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:-1])).tolist():
        place = tuple(at)
        allowed = mask[place].nonzero()[:, 0].tolist()
        row = [float(scores[place][m]) for m in allowed]
        asked = math.ceil((1 - rule.value) * M) if rule.name == "sparsity" else slow_count(row, rule) if row else 0
        asked = min(max(asked, 1), M) if rule.name == "sparsity" else asked
        wanted[place] = min(max(asked, rule.min_tiles), len(allowed))
        best = sorted(zip(row, allowed), key=lambda pair: (not math.isnan(pair[0]), -pair[0], pair[1]))
        if any(math.isnan(x) for x in row):  # comparisons with NaN order nothing
            best = [p for p in best if math.isnan(p[0])] + sorted(
                (p for p in best if not math.isnan(p[0])), key=lambda pair: (-pair[0], pair[1])
            )
        for _, m in best[: min(int(wanted[place]), capacity)]:
            keep[(*place, m)] = True
    return keep, keep.sum(-1, dtype=torch.int32), wanted


def check(scores: Tensor, mask: Tensor | None, rule: Rule, capacity: int) -> None:
    chosen = choose(scores, None if mask is None else pack_bits(mask), rule, capacity)
    full = torch.ones(scores.shape, dtype=torch.bool) if mask is None else mask.expand(scores.shape)
    keep, counts, wanted = slow(scores, full, rule, capacity)
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in chosen)
    assert torch.equal(chosen.wanted, wanted)
    assert torch.equal(chosen.counts, counts)
    assert torch.equal(unpack_bits(chosen.bits, scores.shape[-1]), keep)
    assert torch.equal(chosen.bits, pack_bits(keep)), "a bit past the last tile is set"


def rules(min_tiles: int = 1) -> list[Rule]:
    values = {"top_k": (0, 1, 3, 40), "sparsity": (0.0, 0.4, 0.97, 1.0), "all": (0.0,)}
    shares = (1e-3, 0.3, 0.9, 1.0)
    return [
        Rule(name=name, value=float(value), min_tiles=min_tiles) for name in RULES for value in values.get(name, shares)
    ]


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: f"{rule.name} {rule.value}")
@pytest.mark.parametrize("allowed", ("all", "of every head", "of all heads", "nothing in a row"))
def test_every_rule_is_what_a_loop_makes_of_it(rule: Rule, allowed: str) -> None:
    scores = torch.randn(2, 2, 3, 37, dtype=torch.float64)
    mask: Tensor | None = torch.rand(2, 2, 3, 37) < 0.5
    if allowed == "of all heads":
        mask = mask[:1, :1]  # type: ignore[index]
    elif allowed == "nothing in a row":
        mask[0, 1, 2] = mask[1, 0] = False  # type: ignore[index]
    elif allowed == "all":
        mask = None
    check(scores, mask, rule, capacity=37)


@given(
    M=st.sampled_from((1, 2, 31, 32, 33, 64, 70)),
    rule=st.sampled_from([*rules(), *rules(min_tiles=4)]),
    capacity=st.integers(1, 70),
    share=st.sampled_from((0.0, 0.1, 0.6, 1.0)),
    spread=st.sampled_from((0.1, 1.0, 30.0)),
    seed=st.integers(0, 1000),
)
def test_rules_bounds_and_masks_of_any_kind_combine(
    M: int, rule: Rule, capacity: int, share: float, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 2, 3, M, dtype=torch.float64, generator=generator) * spread
    mask = torch.rand(1, 1, 3, M, generator=generator) < share
    check(scores, mask, rule, min(capacity, M))


@given(
    dtype=st.sampled_from((torch.float32, torch.float64)),
    levels=st.integers(1, 4),
    n=st.integers(0, 40),
    seed=st.integers(0, 1000),
)
def test_ties_go_to_the_lowest_index_as_in_a_stable_sort(dtype: torch.dtype, levels: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels, levels, (2, 2, 4, 40), generator=generator).to(dtype) / levels
    scores[0] *= -1.0  # zeros of both signs
    chosen = choose(scores, None, Rule(name="top_k", value=float(n), min_tiles=0), 40)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    keep = torch.zeros(scores.shape, dtype=torch.bool).scatter(-1, order[..., :n], True)
    assert torch.equal(unpack_bits(chosen.bits, 40), keep)
    assert bool((chosen.counts == n).all())


def test_zeros_of_both_signs_are_equal() -> None:
    scores = torch.tensor([[[[0.0, -0.0, 0.0, -0.0, -1.0]]], [[[-0.0, 0.0, -0.0, 0.0, -1.0]]]])
    chosen = choose(scores, None, Rule(name="top_k", value=3), 5)
    assert unpack_bits(chosen.bits, 5)[:, 0, 0].tolist() == [[True, True, True, False, False]] * 2


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("name", ("top_k", "sparsity", "normal", "probability", "mass", "all"))
def test_nan_scores_are_always_kept(name: str, dtype: torch.dtype) -> None:
    """A NaN must stay visible in the output: no rule may drop it for a number, of either sign bit or infinite."""
    scores = torch.randn(1, 1, 4, 40, dtype=dtype)
    scores[..., 33] = -torch.tensor(NAN, dtype=dtype)
    scores[0, 0, 1, 7] = NAN
    scores[0, 0, 2, 3] = INF
    scores[0, 0, 3, 5] = -INF
    value = {"top_k": 2.0, "sparsity": 0.95}.get(name, 0.3)
    chosen = choose(scores, None, Rule(name=name, value=value, min_tiles=2), 40)
    keep = unpack_bits(chosen.bits, 40)
    assert bool(keep[scores.isnan()].all())


def test_nan_scores_that_are_not_allowed_are_not_kept() -> None:
    scores = torch.randn(1, 1, 2, 10)
    scores[..., 4] = NAN
    mask = torch.ones(1, 1, 2, 10, dtype=torch.bool)
    mask[..., 4] = False
    for name in RULES:
        chosen = choose(scores, pack_bits(mask), Rule(name=name, value=0.9), 10)
        assert not bool(unpack_bits(chosen.bits, 10)[..., 4].any())
        assert bool((chosen.counts > 0).all())


def test_infinite_scores_have_their_places() -> None:
    scores = torch.tensor([[[[-INF, 1.0, INF, -INF, 0.0]]]])
    for n, expected in ((1, {2}), (3, {1, 2, 4}), (4, {0, 1, 2, 4})):
        chosen = choose(scores, None, Rule(name="top_k", value=n), 5)
        assert set(unpack_bits(chosen.bits, 5)[0, 0, 0].nonzero()[:, 0].tolist()) == expected


def test_the_lowest_score_is_chosen_before_what_is_not_allowed() -> None:
    scores = torch.tensor([[[[-INF, 5.0, -INF, 3.0]]]])
    mask = torch.tensor([True, False, True, False]).expand(1, 1, 1, 4)
    chosen = choose(scores, pack_bits(mask), Rule(name="top_k", value=2), 4)
    assert unpack_bits(chosen.bits, 4)[0, 0, 0].tolist() == [True, False, True, False]


@pytest.mark.parametrize("value", (3.0, 0.4))
@pytest.mark.parametrize("name", [name for name in RULES if name != "all"])
def test_a_number_at_run_time_is_as_one_from_before(name: str, value: float) -> None:
    value = round(value * 2) if name == "top_k" else min(value, 1.0)
    scores = torch.randn(2, 2, 3, 37)
    before = choose(scores, None, Rule(name=name, value=float(value)), 20)
    for dtype in (torch.float64, torch.int64) if name == "top_k" else (torch.float64,):
        now = choose(scores, None, Rule(name=name, value=99.0, now=torch.tensor(value, dtype=dtype)), 20)
        assert all(torch.equal(mine, other) for mine, other in zip(now, before))


def test_counts_of_rows_may_be_given() -> None:
    scores, n = torch.randn(2, 3, 4, 10), torch.randint(0, 11, (2, 1, 4, 1))
    chosen = choose(scores, None, Rule(name="top_k", now=n, min_tiles=0), 10)
    assert torch.equal(chosen.counts, n[..., 0].expand(2, 3, 4).int())
    order = scores.argsort(-1, descending=True).argsort(-1)
    assert torch.equal(unpack_bits(chosen.bits, 10), order < n)


def test_rows_of_equal_scores_keep_their_least_or_all() -> None:
    scores = torch.full((1, 1, 2, 20), 0.7)
    for name in ("normal", "probability"):
        few, most = (choose(scores, None, Rule(name=name, value=value, min_tiles=3), 20) for value in (0.5, 1.0))
        assert few.counts.unique().tolist() == [3]
        assert most.counts.unique().tolist() == [20]
    assert bool(row_threshold(scores, None, torch.ones((), dtype=torch.float64)).isfinite().all())  # -inf * 0 is NaN


@pytest.mark.parametrize("shape", ((0, 2, 3, 5), (1, 0, 3, 5), (1, 2, 0, 5), (1, 1, 1, 1)))
def test_shapes_without_rows_are_chosen_from(shape: tuple[int, ...]) -> None:
    chosen = choose(torch.randn(shape), None, Rule(name="top_k", value=1), 1)
    assert [tuple(x.shape) for x in chosen] == [(*shape[:3], 2), shape[:3], shape[:3]]


@given(st.integers(0, 1000), st.sampled_from((torch.float32, torch.float64)))
def test_the_partition_and_the_plain_sort_agree(seed: int, dtype: torch.dtype) -> None:
    """One serves the CPU, the other any device without a template."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (2, 2, 5, 35), generator=generator).to(dtype)
    kept = torch.randint(0, 36, (2, 2, 5), generator=generator).int()
    chosen = choose(scores, None, Rule(name="top_k", now=kept[..., None], min_tiles=0), 35)
    assert torch.equal(pack_bits(_best(sortable(scores), kept)), chosen.bits)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_sortable_keys_have_the_order_of_the_scores(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    values = [-INF, -1e30, -1.0, -tiny, -tiny / 4, 0.0, tiny / 4, tiny, 1.0, 1e30, INF, NAN]
    keys = sortable(torch.tensor(values, dtype=dtype)).tolist()
    assert keys == sorted(keys) and len(set(keys)) == len(values)
    assert len(set(sortable(torch.tensor([0.0, -0.0], dtype=dtype)).tolist())) == 1
    assert len(set(sortable(torch.tensor([NAN, -NAN], dtype=dtype)).tolist())) == 1


def test_a_softmax_over_nothing_is_zero_with_zero_gradient() -> None:
    scores = torch.randn(1, 1, 2, 4, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[False] * 4, [True, False, True, True]])
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way, which who looks for one would be shown
        weights = masked_softmax(scores, mask)
        weights.square().sum().backward()
    assert weights[0, 0, 0].tolist() == [0] * 4
    expected = torch.cat([scores.detach()[0, 0, 1, :1], scores.detach()[0, 0, 1, 2:]]).softmax(0)
    torch.testing.assert_close(weights[0, 0, 1][mask[1]], expected)
    assert scores.grad is not None and bool(scores.grad.isfinite().all())
    assert scores.grad[0, 0, 0].tolist() == [0] * 4 and float(scores.grad[0, 0, 1, 1]) == 0


def test_select_tiles_takes_masks_that_broadcast_and_gives_no_gradient() -> None:
    scores = torch.randn(2, 3, 4, 40).requires_grad_()
    for shape in ((40,), (4, 40), (3, 4, 40), (1, 1, 1, 40), (2, 1, 4, 40), (2, 3, 4, 40)):
        mask = torch.rand(shape) < 0.4
        assert torch.equal(unpack_bits(allowed_bits(mask, 4), 40).expand(scores.shape), mask.expand(scores.shape))
        rule = Rule(name="top_k", value=5)
        chosen = select_tiles(scores, mask, rule, 6)
        full = pack_bits(mask.expand(scores.shape))
        assert isinstance(chosen, Choice) and not any(x.requires_grad for x in chosen)
        assert all(torch.equal(mine, other) for mine, other in zip(chosen, choose(scores.detach(), full, rule, 6)))


@pytest.mark.parametrize("density", [0.2, 1.0, 1e-9])
def test_a_threshold_of_a_number_and_of_a_tensor_are_alike_by_ops_that_inductor_has_on_a_gpu(density: float) -> None:
    scores, mask = torch.randn(2, 3, 4, 50), torch.rand(2, 3, 4, 50) < 0.8
    number = row_threshold(scores, mask, density, (-2, -1))
    tensor = torch.tensor(density, dtype=torch.float64)
    traced = make_fx(lambda x, d: row_threshold(x, mask, d, (-2, -1)))(scores, tensor)
    torch.testing.assert_close(traced(scores, tensor), number, rtol=1e-6, atol=1e-6)
    names = {str(node.target) for node in traced.graph.nodes}
    assert any("erfinv" in name for name in names) and not any("ndtri" in name for name in names)
