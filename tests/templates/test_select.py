"""The choice of tiles: from given scores, and with scores and the coarse output in one launch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_good, assert_lse

from flexsparse.compile_passes.templates import select as select_module
from flexsparse.compile_passes.templates import selection
from flexsparse.compile_passes.templates.launch import count_launches
from flexsparse.compile_passes.templates.select import select, select_reference
from flexsparse.compile_passes.templates.selection import RULES, choice_config, select_scores, select_scores_reference
from flexsparse.masks import keep_top
from flexsparse.tile_bits import pack_bits, unpack_bits

VALUES = {"top_k": 5, "normal": 0.2, "probability": 0.3, "mass": 0.7, "all": 0}


@pytest.fixture(autouse=True, scope="module")
def garbage():
    """Uninitialised memory holds NaN, or integers with bits all over."""

    def poisoned(allocate):
        def empty(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(math.nan if out.is_floating_point() else 0x5A)

        return empty

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


def random_allowed(B, H, N, M, share=0.6):
    """A bitmask whose first row allows nothing, whose second allows all, and whose unused bits are set."""
    mask = torch.rand(B, H, N, M) < share
    mask[:, :, 0] = False
    mask[:, :, 1:2] = True
    words = pack_bits(torch.nn.functional.pad(mask, (0, -M % 32), value=True))
    return words


def check_scores(scores, rule, value, allowed=None, min_tiles=1, capacity=10**6):
    """Compare with the twin, and with what holds for any rule."""
    arguments = {"allowed": allowed, "rule": rule, "value": value, "min_tiles": min_tiles, "capacity": capacity}
    with count_launches() as names:
        bits, counts, wanted = select_scores(scores, **arguments)
    assert names == ["select_scores_kernel"]
    expected = select_scores_reference(scores, **arguments)
    assert torch.equal(wanted, expected[2]), "wanted"
    assert torch.equal(counts, expected[1]), "counts"
    assert torch.equal(bits, expected[0]), "bits"
    M = scores.shape[-1]
    keep = unpack_bits(bits, M)
    assert torch.equal(keep.sum(-1), counts.long())
    assert torch.equal(pack_bits(keep), bits), "unused bits are set"
    mask = torch.ones_like(keep) if allowed is None else unpack_bits(allowed, M).expand(keep.shape)
    assert not bool((keep & ~mask).any()), "a tile is chosen that is not allowed"
    assert bool((wanted <= mask.sum(-1)).all())
    assert bool((wanted >= mask.sum(-1).clamp_max(min_tiles)).all())
    assert torch.equal(counts, wanted.clamp_max(capacity))
    return keep, counts, wanted


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("M", [1, 7, 32, 45, 64, 130])
def test_random_scores(rule, M):
    scores = torch.randn(2, 2, 5, M)
    check_scores(scores, rule, VALUES[rule])
    check_scores(scores, rule, VALUES[rule], random_allowed(2, 2, 5, M), min_tiles=3, capacity=4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_ties(rule, levels):
    scores = torch.randint(-levels, levels, (1, 2, 6, 70)) / 8
    value = 0.71 if rule == "mass" else VALUES[rule]
    check_scores(scores, rule, value)
    check_scores(scores, rule, value, random_allowed(1, 1, 6, 70), min_tiles=9)


@pytest.mark.parametrize("rule", RULES)
def test_equal_scores_keep_the_first(rule):
    keep, counts, _ = check_scores(torch.full((1, 1, 3, 40), -0.25), rule, VALUES[rule], min_tiles=2)
    assert torch.equal(keep, torch.arange(40) < counts[..., None])


@pytest.mark.parametrize("rule", RULES)
def test_nan_is_chosen_first(rule):
    scores = torch.randn(1, 2, 8, 50)
    scores[..., 1, 17] = math.nan
    scores[..., 2, 3::5] = math.nan
    scores[..., 3, :] = math.nan
    scores[..., 4, 17] = -torch.tensor(math.nan)
    scores[..., 5, 8] = math.inf
    scores[..., 5, 30] = math.nan
    keep, _, _ = check_scores(scores, rule, VALUES[rule])
    for row, column in ((1, 17), (2, 3), (3, 0), (4, 17), (5, 30)):
        assert bool(keep[..., row, column].all())


@pytest.mark.parametrize("rule", RULES)
def test_infinite_scores(rule):
    scores = torch.randn(1, 1, 4, 40)
    scores[..., 1, :30] = -math.inf
    scores[..., 2, :] = -math.inf
    scores[..., 3, 20] = math.inf
    check_scores(scores, rule, VALUES[rule])
    check_scores(scores, rule, VALUES[rule], random_allowed(1, 1, 4, 40), min_tiles=20)


def test_allowed_at_minus_infinity_comes_before_what_is_not_allowed():
    scores = torch.full((1, 1, 1, 8), -math.inf)
    mask = torch.arange(8) >= 5
    keep, _, _ = check_scores(scores, "top_k", 2, pack_bits(mask.expand(1, 1, 1, 8)))
    assert keep.flatten().nonzero().flatten().tolist() == [5, 6]


def test_zeros_of_both_signs_are_equal():
    scores = torch.tensor([-0.0, 0.0, -0.0, 0.0, -1e-45, 1e-45]).expand(1, 1, 1, 6)
    keep, _, _ = check_scores(scores, "top_k", 3)
    assert keep.flatten().nonzero().flatten().tolist() == [0, 1, 5]


def test_same_as_the_builders():
    scores = (torch.randn(2, 3, 4, 90) * 4).round()
    assert torch.equal(check_scores(scores, "top_k", 13)[0], keep_top(scores, 13))


@pytest.mark.parametrize("rule", ["normal", "probability", "mass"])
def test_a_value_of_one_keeps_all(rule):
    scores = torch.randn(1, 2, 4, 40)
    scores[0, 0, 0] = 1.0
    scores[0, 1, 2, 9] = 1000.0  # its weight is 1, all others' are 0
    allowed = random_allowed(1, 1, 4, 40)
    assert bool(check_scores(scores, rule, 1.0)[0].all())
    keep = check_scores(scores, rule, torch.tensor(1.0, dtype=torch.float64), allowed)[0]
    assert torch.equal(keep, unpack_bits(allowed, 40).expand(keep.shape))


@pytest.mark.parametrize("rule", ["top_k", "normal", "probability", "mass"])
def test_values_in_tensors(rule):
    scores = torch.randn(2, 2, 5, 40)
    dtype = torch.int64 if rule == "top_k" else torch.float64
    one = torch.tensor(VALUES[rule], dtype=dtype)
    plain = check_scores(scores, rule, VALUES[rule])[0]
    assert torch.equal(check_scores(scores, rule, one)[0], plain)
    assert torch.equal(check_scores(scores, rule, one[None])[0], plain)  # more than 0-d: the kernel reads it
    values = torch.randint(1, 40, (2, 2, 5, 1))
    check_scores(scores, rule, values if rule == "top_k" else values.double() / 40)
    check_scores(scores, rule, values[:1, :, :1] if rule == "top_k" else values[:1, :, :1].double() / 40)


def test_probability_is_not_the_score():
    scores = torch.tensor([3.0, 2.0, 1.5, 1.0, 0.5, 0.0, -4.0, -4.0]).expand(1, 1, 1, 8)
    wanted = [int(check_scores(scores, rule, 0.5)[2]) for rule in ("normal", "probability")]
    assert wanted == [5, 2]  # those above the mean


def test_many_tiles():
    check_scores(torch.randn(1, 1, 2, 3000), "mass", 0.5)
    check_scores(torch.randint(0, 9, (1, 1, 3, 4100)).float(), "top_k", 700)


def test_too_many_tiles():
    with pytest.raises(ValueError, match="at most 16384"):
        select_scores(torch.zeros(1, 1, 1, 16385), allowed=None, rule="all", value=0, min_tiles=1, capacity=1)


def test_unknown_rule():
    with pytest.raises(ValueError, match="rule is 'top'"):
        select_scores(torch.zeros(1, 1, 1, 4), allowed=None, rule="top", value=0, min_tiles=1, capacity=1)


@settings(max_examples=15)
@given(
    st.integers(1, 100),
    st.sampled_from(RULES),
    st.integers(0, 2**31),
    st.integers(1, 9),
    st.integers(1, 60),
    st.booleans(),
    st.sampled_from([None, 0.0, 0.3, 1.0]),
)
def test_any_choice(M, rule, seed, min_tiles, capacity, quantised, share):
    torch.manual_seed(seed)
    scores = torch.randn(1, 2, 4, M)
    if quantised and rule in ("top_k", "all"):
        scores = scores.round()
    allowed = None if share is None else random_allowed(1, 2, 4, M, share)
    check_scores(scores, rule, VALUES[rule], allowed, min_tiles, capacity)


@settings(max_examples=8)
@given(st.integers(0, 2**31), st.integers(2, 80))
def test_more_is_a_superset(seed, M):
    torch.manual_seed(seed)
    scores = torch.randn(1, 1, 3, M).mul(3).round()
    fewer, more = (check_scores(scores, "top_k", n)[0] for n in (M // 2, M // 2 + 1))
    assert not bool((fewer & ~more).any())


def make_inputs(B=1, H=2, G=2, N=5, M=7, D=32, scale=1.0):
    """Pooled q, k, v."""
    return torch.randn(B, H, N, D) * scale, torch.randn(B, G, M, D) * scale, torch.randn(B, G, M, D) * scale


def check(q, k, v, **changes):
    """Compare with the twin; the coarse output with float64."""
    arguments = {
        "allowed": None,
        "kv_counts": None,
        "count_bias": False,
        "alive": False,
        "scale": q.shape[-1] ** -0.5,
        "rule": "top_k",
        "value": 3,
        "min_tiles": 1,
        "capacity": 10**6,
    } | changes
    with count_launches() as names:
        bits, counts, wanted, coarse, lse = select(q, k, v, **arguments)
    assert names == ["select_kernel"]
    expected = select_reference(q, k, v, **arguments)
    assert torch.equal(wanted, expected[2]), "wanted"
    assert torch.equal(counts, expected[1]), "counts"
    assert torch.equal(bits, expected[0]), "bits"
    if v is None:
        assert coarse is None and lse is None
        return bits, counts, wanted, coarse, lse
    oracle = select_reference(*(x.double() for x in (q, k, v)), **arguments)
    # where a few weights carry the row, the twin's error is that of its scores only: allow the rounding of a score
    logit = float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) * arguments["scale"]
    assert_as_good(coarse, expected[3], oracle[3], "coarse", noise=2e-8 * (1 + logit))
    assert_lse(lse, oracle[4], logit)
    return bits, counts, wanted, coarse, lse


@pytest.mark.parametrize("rule", RULES)
def test_select_rules(rule):
    q, k, v = make_inputs(N=18, M=41)
    check(q, k, v, rule=rule, value=VALUES[rule], min_tiles=2, capacity=9)
    check(q, k, None, rule=rule, value=VALUES[rule])


@pytest.mark.parametrize(
    "B, H, G, N, M, D",
    [(1, 1, 1, 1, 1, 32), (2, 4, 2, 17, 33, 32), (1, 3, 1, 50, 64, 96), (2, 2, 2, 16, 70, 64), (1, 1, 1, 3, 5, 8)],
)
def test_select_shapes(B, H, G, N, M, D):
    check(*make_inputs(B, H, G, N, M, D), value=min(M, 4))


@pytest.mark.parametrize("scale", [1, 4, 8, 16])
def test_select_scales(scale):
    check(*make_inputs(1, 2, 1, 9, 40, 64, scale))


@pytest.mark.parametrize("heads", [1, 4])
def test_select_allowed(heads):
    q, k, v = make_inputs(2, 4, 2, 18, 40)
    for batch in (1, 2):
        coarse, lse = check(q, k, v, allowed=random_allowed(batch, heads, 18, 40), value=9)[3:]
        assert not bool(coarse[:, :, 0].any()) and bool((lse[:, :, 0] == -math.inf).all())


@pytest.mark.parametrize("count_bias", [False, True])
@pytest.mark.parametrize("alive", [False, True])
def test_select_counts(count_bias, alive):
    q, k, v = make_inputs(2, 4, 2, 6, 40)
    counts = torch.randint(0, 3, (2, 40), dtype=torch.int32) * 20
    allowed = random_allowed(1, 1, 6, 40)
    flags = {"count_bias": count_bias, "alive": alive}
    check(q, k, v, kv_counts=counts, **flags)
    check(q, k, v, kv_counts=counts[0], allowed=allowed, value=30, **flags)
    counts[1] = 0  # a sample without tokens
    check(q, k, v, kv_counts=counts, allowed=allowed, **flags)


def test_select_blocks_of_many_programs(monkeypatch):
    """Programs that take several blocks give the same as one program a block."""
    q, k, v = make_inputs(1, 2, 1, 33, 40)
    few = check(q, k, v)
    monkeypatch.setattr(select_module, "_programs", lambda device: 1000)
    for one, other in zip(few, check(q, k, v)):
        assert torch.equal(one, other)


def test_select_nan():
    q, k, _ = make_inputs(1, 2, 1, 20, 40)
    k[..., 13, :] = math.nan
    bits = check(q, k, None)[0]
    assert bool(unpack_bits(bits, 40)[..., 13].all())
    q[..., 5, 0] = math.nan
    check(q, k, None)


def test_select_ties_are_exact():
    q, k = torch.randint(-1, 2, (1, 2, 17, 32)).float(), torch.randint(-1, 2, (1, 2, 70, 32)).float()
    check(q, k, None, scale=0.125, value=11)


def test_choice_config():
    for M in (1, 32, 33, 256, 2048, 5000, 16384):
        M_BLOCK, rows, warps = choice_config(M)
        assert max(M, 32) <= M_BLOCK and 16 % rows == 0 and rows * M_BLOCK <= 64 * 32 * warps


def test_the_short_list_is_part_of_the_long_one_and_all_of_it_for_auto() -> None:
    for module in (select_module, selection):
        first = module.compilations(False)
        assert 0 < len(first) <= 10 and all(c.auto for c in first)
        assert all(c.config in [other.config for other in module.compilations(True)] for c in first)
