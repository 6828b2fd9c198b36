"""`flexsparse::coarse_select`: pooling, scores, coarse output and choice, against plain torch in float64.

Shape letters: B batch, H query heads, G KV heads, N query tiles, s slots of one, M KV tiles, t slots of one, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_good, assert_lse, rms
from torch import Tensor

import flexsparse as fs
from flexsparse.ops import coarse_select as module
from flexsparse.ops.choice import Rule, choose
from flexsparse.tile_bits import pack_bits, unpack_bits

pytestmark = pytest.mark.usefixtures("poisoned")

op = torch.ops.flexsparse.coarse_select
K = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A coarse stage."""

    B: int = 2
    H: int = 2
    G: int = 2
    N: int = 4
    s: int = 4
    M: int = 6
    t: int = 3
    D: int = 8
    partial: bool = False  # tiles of fewer tokens
    empty: bool = False  # KV tiles without one
    per_batch: bool = False  # counts [B, n] rather than [n]
    allowed: str = ""  # "heads" [B, H], "one" [1, 1]; the first row allows nothing
    count_bias: bool = False
    dtype: torch.dtype = torch.float64
    magnitude: float = 1.0

    def counts(self, n: int, slots: int, empty: bool) -> Tensor:
        shape = (self.B, n) if self.per_batch else (n,)
        if not self.partial:
            return torch.full(shape, slots, dtype=torch.int32)
        return torch.randint(0 if empty else 1, slots + 1, shape, dtype=torch.int32)

    def tiles(self, heads: int, counts: Tensor, slots: int) -> Tensor:
        counts = counts.expand(self.B, -1)
        x = torch.randn(self.B, heads, counts.shape[1], slots, self.D, dtype=torch.float64) * self.magnitude
        return x.masked_fill((torch.arange(slots) >= counts[:, None, :, None])[..., None], 0).to(self.dtype)

    def inputs(self) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """q, k, v; counts; bool mask of allowed tiles, or None."""
        q_counts, kv_counts = self.counts(self.N, self.s, False), self.counts(self.M, self.t, self.empty)
        qkv = [self.tiles(h, c, n) for h, c, n in ((self.H, q_counts, self.s), *((self.G, kv_counts, self.t),) * 2)]
        mask = None
        if self.allowed:
            mask = torch.rand(*((self.B, self.H) if self.allowed == "heads" else (1, 1)), self.N, self.M) < 0.6
            mask[:, :, 0] = False
            mask[:, :, 1:, 0] = True
        return qkv, [q_counts, kv_counts], mask


def plain(
    q: Tensor, k: Tensor, v: Tensor, counts: list[Tensor], mask: Tensor | None, scale: float, count_bias: bool
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Coarse output, log-sum-exp, pooled vectors, scores; at least float32, written out token by token."""
    dtype = torch.promote_types(q.dtype, torch.float32)

    def pool(x: Tensor, counts: Tensor) -> Tensor:
        counts = counts.expand(x.shape[0], -1)[:, None, :, None]
        return x.to(dtype).sum(3) / counts.clamp_min(1).to(dtype)

    pooled = [pool(q, counts[0]), pool(k, counts[1]), pool(v, counts[1])]
    H, G = q.shape[1], k.shape[1]
    k_c, v_c = (torch.stack([x[:, h // (H // G)] for h in range(H)], 1) for x in pooled[1:])
    scores = torch.einsum("bhnd,bhmd->bhnm", pooled[0], k_c) * scale
    if count_bias:
        scores = scores + counts[1].expand(q.shape[0], -1).clamp_min(1).to(dtype).log()[:, None, None]
    visible = scores if mask is None else scores.masked_fill(~mask, -1e300 if dtype == torch.float64 else -1e38)
    weights = (visible - visible.amax(-1, keepdim=True).detach()).exp()
    weights = weights if mask is None else weights * mask
    total = weights.sum(-1, keepdim=True)
    lse = (total.log() + visible.amax(-1, keepdim=True))[..., 0].masked_fill(total[..., 0] == 0, -math.inf)
    return torch.einsum("bhnm,bhmd->bhnd", weights / total.clamp_min(1e-30), v_c), lse, pooled, scores


def run(case: Case, qkv: Any, counts: Any, mask: Tensor | None, rule: Rule | None = None, **changes: Any) -> Any:
    rule = rule or Rule(name="top_k", value=K)
    given_ = {"scale": case.D**-0.5, "capacity": case.M, "count_bias": case.count_bias, **changes}
    bits = None if mask is None else pack_bits(mask)
    return op(
        *qkv,
        *counts,
        bits,
        rule.now,
        rule.name,
        rule.value,
        rule.min_tiles,
        given_["capacity"],
        given_["scale"],
        given_["count_bias"],
    )


CASES = {
    "plain": Case(),
    "grouped queries": Case(H=4, G=2),
    "one KV head": Case(H=3, G=1),
    "partial tiles": Case(partial=True),
    "partial tiles of each sample": Case(partial=True, per_batch=True),
    "empty tiles": Case(partial=True, empty=True),
    "count bias": Case(partial=True, count_bias=True),
    "count bias of each sample, empty tiles": Case(partial=True, empty=True, per_batch=True, count_bias=True),
    "allowed of every head": Case(allowed="heads"),
    "allowed of all heads": Case(allowed="one", H=4, G=2),
    "everything": Case(H=4, G=2, partial=True, per_batch=True, count_bias=True, allowed="heads"),
    "more than one word": Case(M=70, N=2, allowed="heads"),
    "pooled before": Case(s=1, t=1),
    "one tile": Case(N=1, M=1),
}
named = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@named
def test_forward_is_the_definition(case: Case) -> None:
    qkv, counts, mask = case.inputs()
    coarse, lse, q_c, k_c, v_c, bits, kept, wanted = run(case, qkv, counts, mask)
    expected, expected_lse, pooled, scores = plain(*qkv, counts, mask, case.D**-0.5, case.count_bias)
    for mine, other in ((coarse, expected), (q_c, pooled[0]), (k_c, pooled[1]), (v_c, pooled[2]), (lse, expected_lse)):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-12)
    chosen = choose(scores, None if mask is None else pack_bits(mask), Rule(name="top_k", value=K), case.M)
    for one, two in zip((bits, kept, wanted), chosen):
        assert one.dtype == torch.int32 and torch.equal(one, two)


@named
def test_backward_is_that_of_autograd_through_the_definition(case: Case) -> None:
    qkv, counts, mask = case.inputs()
    grad = torch.randn(case.B, case.H, case.N, case.D, dtype=torch.float64)
    mine, other = ([x.clone().requires_grad_() for x in qkv] for _ in range(2))
    (run(case, mine, counts, mask)[0] * grad).sum().backward()
    (plain(*other, counts, mask, case.D**-0.5, case.count_bias)[0] * grad).sum().backward()
    valid = [
        torch.arange(x.shape[3]) < c.expand(case.B, -1)[:, None, :, None] for x, c in zip(qkv, (*counts, counts[1]))
    ]
    for name, one, two, where in zip("qkv", mine, other, valid):
        assert one.grad is not None and two.grad is not None
        torch.testing.assert_close(
            one.grad * where[..., None],
            two.grad * where[..., None],
            atol=1e-12,
            rtol=1e-11,
            msg=lambda t, n=name: f"d{n}: {t}",
        )
        assert bool(one.grad.isfinite().all())


def test_a_gradient_has_memory_for_a_row_of_each_tile() -> None:
    """All tokens of a tile have the same one, and at real sizes three of them are gigabytes."""
    case = Case()
    qkv, counts, mask = case.inputs()
    leaves = [x.requires_grad_() for x in qkv]
    grads = torch.autograd.grad(run(case, leaves, counts, mask)[0].sum(), leaves)
    assert [grad.stride(3) for grad in grads] == [0, 0, 0]


def test_gradients_are_those_of_finite_differences() -> None:
    case = Case(N=2, M=3, D=2, s=2, t=2, H=2, G=1, partial=True, count_bias=True, allowed="heads")
    qkv, counts, mask = case.inputs()
    leaves = [x.requires_grad_() for x in qkv]
    assert torch.autograd.gradcheck(lambda *qkv: run(case, qkv, counts, mask)[0], leaves, fast_mode=True)


@pytest.mark.parametrize("magnitude", (1.0, 4.0, 8.0, 16.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("name", ("plain", "everything"))
def test_low_precision_is_as_good_as_plain_torch(name: str, dtype: torch.dtype, magnitude: float) -> None:
    base = CASES[name]
    case = Case(**{**base.__dict__, "dtype": dtype, "magnitude": magnitude, "M": 20, "N": 8, "s": 16, "t": 16, "D": 32})
    qkv, counts, mask = case.inputs()
    arguments = (counts, mask, case.D**-0.5, case.count_bias)
    grad = torch.randn(case.B, case.H, case.N, case.D) / magnitude
    results = []
    for function, given_ in (
        (lambda *x: run(case, x, counts, mask), qkv),
        (lambda *x: plain(*x, *arguments), qkv),
        (lambda *x: plain(*x, *arguments), [x.double() for x in qkv]),
    ):
        leaves = [x.clone().requires_grad_() for x in given_]
        coarse, lse, *_ = function(*leaves)
        coarse.backward(grad.to(coarse.dtype))
        results.append((coarse.detach(), lse.detach(), *(x.grad for x in leaves)))
    mine, _, oracle = results
    assert mine[0].dtype == torch.float32 and mine[2].dtype == dtype
    largest = float(plain(*(x.double() for x in qkv), *arguments)[3].abs().max())
    assert_lse(mine[1], oracle[1], largest)
    eps = torch.finfo(torch.float32).eps
    floor = 4 * eps * (1 + largest) * rms(grad) * rms(qkv[2]) / case.s
    for label, one, two, three in zip(("coarse", "dq", "dk", "dv"), *((r[0], *r[2:]) for r in results)):
        assert_as_good(one, two, three, label, 0.0 if label == "coarse" else floor)


@pytest.mark.parametrize(
    "rule",
    (
        Rule(name="top_k", value=2),
        Rule(name="sparsity", value=0.6),
        Rule(name="normal", value=0.3, min_tiles=2),
        Rule(name="probability", value=0.3),
        Rule(name="mass", value=0.7),
        Rule(name="all"),
    ),
    ids=lambda rule: rule.name,
)
def test_every_rule_chooses_from_the_scores(rule: Rule) -> None:
    case = CASES["everything"]
    qkv, counts, mask = case.inputs()
    assert mask is not None
    scores = plain(*qkv, counts, mask, case.D**-0.5, case.count_bias)[3]
    *_, bits, kept, wanted = run(case, qkv, counts, mask, rule, capacity=4)
    for mine, other in zip((bits, kept, wanted), choose(scores, pack_bits(mask), rule, 4)):
        assert torch.equal(mine, other)
    number = torch.tensor(rule.value, dtype=torch.float64)
    now = Rule(name=rule.name, now=number, value=77.0, min_tiles=rule.min_tiles)
    for mine, other in zip(run(case, qkv, counts, mask, now, capacity=4)[5:], (bits, kept, wanted)):
        assert torch.equal(mine, other)


def test_a_new_number_at_run_time_recompiles_nothing(fresh_dynamo: None) -> None:
    case = CASES["plain"]
    qkv, counts, _ = case.inputs()
    compiled = torch.compile(
        lambda now, *x: op(*x, *counts, None, now, "sparsity", 0.0, 1, 6, 0.3, False), backend="aot_eager"
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        kept = [
            int(compiled(torch.tensor(value, dtype=torch.float64), *qkv)[6].max()) for value in (0.0, 0.5, 0.9, 1.0)
        ]
    assert kept == [6, 3, 1, 1]


@given(step=st.sampled_from((1, 7, 13, 1 << 20)), name=st.sampled_from(list(CASES)))
def test_chunks_of_any_size_compute_the_same(step: int, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    qkv, counts, mask = case.inputs()
    grad = torch.randn(case.B, case.H, case.N, case.D, dtype=torch.float64)
    found = []
    for size in (step, module.CHUNK_SCORES):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "CHUNK_SCORES", size)
            leaves = [x.clone().requires_grad_() for x in qkv]
            results = run(case, leaves, counts, mask)
            found.append([*(x.detach() for x in results), *torch.autograd.grad(results[0], leaves, grad)])
    for mine, other in zip(*found):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-12)


def test_a_gpu_that_no_template_serves_is_given_chunks_that_fill_it() -> None:
    """The CPU's chunks, which fit its cache, were millions of launches there."""
    M, H = module.ops.MOST_TILES + 1, 40
    q_c = torch.empty(1, H, M, 128, device="meta")
    counts = torch.empty(M, dtype=torch.int32, device="meta")
    places = [at for at, _, _ in module._score_chunks(q_c, q_c, counts, None, 0.1, False)]
    assert len(places) <= 5 * H and all(at[2].stop - at[2].start <= module.GPU_CHUNK_SCORES // M for at in places)


def test_head_dims_that_no_template_of_the_gradient_fits_are_plain_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take more shared memory than there is, or spill (compiled for sm_86 and sm_90a)."""
    monkeypatch.setattr(module.ops, "on_gpu", lambda x: True)
    for D, taken in ((128, True), (256, True), (257, False), (512, False)):
        assert module.ops.templates_select(torch.empty(1, 1, 1, D), 100, D) == taken
    case = Case(D=260)
    qkv, counts, mask = case.inputs()
    leaves = [x.float().requires_grad_() for x in qkv]
    from flexsparse.compile_passes.templates import coarse_backward, selection

    for place, name in ((module, "_on_gpu"), (coarse_backward, "coarse_backward"), (selection, "select_scores")):
        monkeypatch.setattr(place, name, lambda *_, name=name, **__: pytest.fail(f"{name} runs"))
    found = run(case, leaves, counts, mask)
    assert torch.autograd.grad(found[0].sum(), leaves)[0].isfinite().all()


def test_counts_given_for_each_row_survive_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(N=7)
    qkv, counts, _ = case.inputs()
    n = torch.randint(0, case.M + 1, (case.B, case.H, case.N, 1))
    monkeypatch.setattr(module, "CHUNK_SCORES", 3 * case.M)
    kept = run(case, qkv, counts, None, Rule(name="top_k", now=n, min_tiles=0))[6]
    assert torch.equal(kept, n[..., 0].int())


def test_a_row_that_allows_nothing_is_zero_and_moves_nothing() -> None:
    case = CASES["allowed of every head"]
    qkv, counts, mask = case.inputs()
    leaves = [x.requires_grad_() for x in qkv]
    coarse, lse, *_, bits, kept, wanted = run(case, leaves, counts, mask)
    assert bool((coarse[:, :, 0] == 0).all()) and bool((lse[:, :, 0] == -math.inf).all())
    assert not bool(bits[:, :, 0].any() | kept[:, :, 0].any() | wanted[:, :, 0].any())
    coarse[:, :, 0].sum().backward()
    assert all(bool((x.grad == 0).all()) for x in leaves)


def test_what_may_not_be_chosen_is_not_in_the_coarse_output_either() -> None:
    """No leak from the future: tokens of other tiles may be anything but NaN."""
    case = CASES["allowed of every head"]
    qkv, counts, mask = case.inputs()
    assert mask is not None
    mask[..., 5] = False
    before = run(case, qkv, counts, mask)
    changed = [qkv[0], qkv[1].clone(), qkv[2].clone()]
    changed[1][:, :, 5] += 3
    changed[2][:, :, 5] -= 5
    after = run(case, changed, counts, mask)
    for i in (0, 1, 5, 6, 7):
        assert torch.equal(before[i], after[i])


def test_without_values_there_is_no_coarse_output_and_the_same_choice() -> None:
    case = CASES["everything"]
    qkv, counts, mask = case.inputs()
    whole, without = run(case, qkv, counts, mask), run(case, [*qkv[:2], None], counts, mask)
    assert [without[i].numel() for i in (0, 1, 4)] == [0, 0, 0]
    for i in (2, 3, 5, 6, 7):
        assert torch.equal(whole[i], without[i])


def test_only_the_coarse_output_has_a_gradient() -> None:
    case = CASES["plain"]
    qkv, counts, _ = case.inputs()
    results = run(case, [x.requires_grad_() for x in qkv], counts, None)
    assert [x.requires_grad for x in results] == [True] + [False] * 7


def test_low_precision_tokens_are_pooled_in_float32() -> None:
    """A sum in bfloat16 would stop growing at 256, one that is rounded to it would be 1000."""
    x = torch.ones(1, 1, 1, 1024, 8, dtype=torch.bfloat16)
    x[:, :, :, 1001:] = 0
    counts = torch.tensor([1001], dtype=torch.int32)
    _, _, q_c, k_c, v_c, *_ = op(x, x, x, counts, counts, None, None, "all", 0.0, 1, 1, 1.0, False)
    for pooled in (q_c, k_c, v_c):
        assert pooled.dtype == torch.float32 and bool((pooled == 1).all())


def test_nan_tokens_show_in_what_is_chosen() -> None:
    case = Case(dtype=torch.float32, H=1, G=1, B=1, M=40)
    qkv, counts, _ = case.inputs()
    qkv[1][0, 0, 33, 0, 0] = math.nan
    bits = run(case, qkv, counts, None)[5]
    assert bool(unpack_bits(bits, 40)[..., 33].all())


def test_the_builders_use_it_uncompiled() -> None:
    """`VSA.select` is this op on the tiles of a layout."""
    layout = fs.TileLayout(grid=(3, 5, 4), tile=(2, 2, 2))
    q, k = torch.randn(2, 1, 2, layout.seq_len, 8).unbind()
    selection = fs.VSA(top_k=3).select(q, k, layout)
    tiles = [layout.video(layout.to_tiles(x)) for x in (q, k)]
    counts = layout.index("cpu")[2]
    bits = op(*tiles, None, counts, counts, None, None, "top_k", 3.0, 1, 3, 8**-0.5, False)[5]
    assert torch.equal(selection.bits, bits)
