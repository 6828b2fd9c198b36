"""Gradients of the coarse output."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_good, rms

from flexsparse.compile_passes.templates.coarse_backward import (
    coarse_backward,
    coarse_backward_reference,
    compilations,
)
from flexsparse.compile_passes.templates.launch import count_launches
from flexsparse.compile_passes.templates.select import select
from flexsparse.tile_bits import pack_bits

pytestmark = pytest.mark.usefixtures("poisoned")


def plain_gradients(d, q, k, v, mask, bias, scale):
    """Autograd of the formula, written once more, in the dtype of the inputs; ``mask`` is bool [B, H, N, M]."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k.repeat_interleave(group, 1)) * scale + bias
    some = mask.any(-1, keepdim=True)
    weights = torch.where(mask | ~some, scores, -math.inf).softmax(-1) * some
    out = torch.einsum("bhnm,bhmd->bhnd", weights, v.repeat_interleave(group, 1))
    return torch.autograd.grad(out, (q, k, v), d)


def check(B=1, H=2, G=2, N=5, M=7, D=32, scale=1.0, mask=None, kv_counts=None, count_bias=False, alive=False):
    """Compare with float64 autograd of the plain formula; the yardstick is the same in float32."""
    q, d = torch.randn(B, H, N, D) * scale, torch.randn(B, H, N, D)
    k, v = torch.randn(B, G, M, D) * scale, torch.randn(B, G, M, D)
    arguments = {
        "allowed": None if mask is None else pack_bits(mask),
        "kv_counts": kv_counts,
        "count_bias": count_bias,
        "alive": alive,
        "scale": D**-0.5,
    }
    coarse, lse = select(q, k, v, rule="all", value=0, min_tiles=1, capacity=M, **arguments)[3:]
    if mask is not None:  # a view of a larger tensor
        arguments["allowed"] = arguments["allowed"].repeat_interleave(2, 0)[::2]
    with count_launches() as names:
        actual = coarse_backward(d, q, k, v, coarse, lse, **arguments)
    assert names == ["coarse_dq_kernel", "coarse_dkv_kernel"]
    again = coarse_backward(d, q, k, v, coarse, lse, **arguments)
    assert all(torch.equal(one, other) for one, other in zip(actual, again))

    full = torch.ones(B, H, N, M, dtype=torch.bool) if mask is None else mask.expand(B, H, N, M)
    bias = torch.zeros(1)
    if kv_counts is not None:
        counts = kv_counts.expand(B, M)[:, None, None]
        full = full & (counts > 0) if alive else full
        bias = counts.clamp_min(1).double().log() if count_bias else bias
    oracle = plain_gradients(d.double(), q.double(), k.double(), v.double(), full, bias.double(), D**-0.5)
    reference = plain_gradients(d, q, k, v, full, bias.float(), D**-0.5)
    # weights come from a log-sum-exp that is rounded like a logit, and a row of one tile cancels to a gradient of zero
    logit = float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) * D**-0.5
    cancelled = rms(d) * rms(v)
    for name, x, ref, want, size in zip(("dq", "dk", "dv"), actual, reference, oracle, (rms(k), rms(q), 0)):
        assert_as_good(x, ref, want, name, noise=3e-8 * (1 + logit) * rms(want) + 1e-7 * cancelled * size)
    twin = coarse_backward_reference(d.double(), q.double(), k.double(), v.double(), **arguments)
    for one, other in zip(twin, oracle):
        torch.testing.assert_close(one, other)
    return full, actual


@pytest.mark.parametrize(
    "B, H, G, N, M, D",
    [(1, 1, 1, 1, 1, 32), (2, 4, 2, 17, 33, 32), (1, 3, 1, 40, 16, 96), (2, 2, 2, 16, 50, 64), (1, 2, 1, 33, 5, 8)],
)
def test_shapes(B, H, G, N, M, D):
    check(B, H, G, N, M, D)


@pytest.mark.parametrize("scale", [1, 4, 8, 16])
def test_scales(scale):
    check(1, 2, 1, 18, 40, 64, scale)


@pytest.mark.parametrize("batch, heads", [(1, 1), (1, 4), pytest.param(2, 1, marks=pytest.mark.slow), (2, 4)])
def test_allowed(batch, heads):
    mask = torch.rand(batch, heads, 18, 40) < 0.5
    mask[:, :, 3] = False
    mask[..., 7] = False
    _, (dq, dk, dv) = check(2, 4, 2, 18, 40, mask=mask)
    assert not bool(dq[:, :, 3].any())
    assert not bool(dk[:, :, 7].any()) and not bool(dv[:, :, 7].any())


def test_no_row_allows_anything():
    _, gradients = check(mask=torch.zeros(1, 1, 5, 7, dtype=torch.bool))
    assert not any(bool(x.any()) for x in gradients)


@pytest.mark.parametrize("count_bias", [False, True])
@pytest.mark.parametrize("alive", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_counts(count_bias, alive, per_sample):
    counts = torch.randint(0, 3, (2, 20), dtype=torch.int32) * 30
    counts[0] = 0
    counts = counts if per_sample else counts[1]
    mask = torch.rand(1, 1, 9, 20) < 0.8
    check(2, 4, 2, 9, 20, mask=mask, kv_counts=counts, count_bias=count_bias, alive=alive)


@settings(max_examples=6)
@given(
    st.integers(0, 2**31), st.integers(1, 2), st.integers(1, 3), st.integers(1, 20), st.integers(1, 40), st.floats(0, 1)
)
def test_any_shape(seed, G, group, N, M, share):
    torch.manual_seed(seed)
    check(1, G * group, G, N, M, 16, mask=torch.rand(1, 1, N, M) < share)


def test_the_short_list_is_part_of_the_long_one_and_all_of_it_for_auto() -> None:
    first = compilations(False)
    assert 0 < len(first) <= 10 and all(c.auto for c in first)
    assert all(c.config in [other.config for other in compilations(True)] for c in first)
