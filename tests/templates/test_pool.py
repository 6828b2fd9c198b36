"""Pooling of several parts in one launch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_good

from flexsparse.compile_passes.templates.coarse_backward import unpool
from flexsparse.compile_passes.templates.launch import count_launches
from flexsparse.compile_passes.templates.pool import compilations, pool, pool_reference
from flexsparse.masks import coarse

pytestmark = pytest.mark.usefixtures("poisoned")


def make_part(B, X, N, slots, D, masked, dtype=torch.float32, per_sample=False, scale=1.0):
    """A part with counts from 0 to slots; past the count NaN where masked, else zero."""
    counts = torch.randint(0, slots + 1, (B, N) if per_sample else (N,), dtype=torch.int32)
    x = (torch.randn(B, X, N, slots, D) * scale).to(dtype)
    past = torch.arange(slots) >= counts.expand(B, N)[:, None, :, None]
    return x.masked_fill(past[..., None], float("nan") if masked else 0.0), counts, masked


def check(parts):
    with count_launches() as names:
        outs = pool(parts)
    assert names == ["pool_kernel"]
    assert len(outs) == len(parts)
    oracle = pool_reference([(x.double(), counts, masked) for x, counts, masked in parts])
    for i, (out, reference) in enumerate(zip(outs, pool_reference(parts))):
        assert_as_good(out, reference, oracle[i], f"part {i}")


@pytest.mark.parametrize("slots", [1, 2, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("masked", [False, True])
def test_slots(slots, masked):
    check([make_part(2, 2, 5, slots, 32, masked)])


@pytest.mark.parametrize("D", [8, 64, 96, 256])
def test_head_dims(D):
    check([make_part(1, 2, 3, 64, D, True)])


@pytest.mark.parametrize("scale", [1, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype, scale):
    check([make_part(1, 2, 3, 32, 32, True, dtype, scale=scale)])


def test_parts_of_different_shapes():
    q = make_part(2, 4, 7, 16, 32, True, per_sample=True)
    k = make_part(2, 2, 5, 64, 32, False)
    v = make_part(2, 2, 5, 64, 32, True, per_sample=True)
    check([q, k, v])
    check([q, k])
    check([k])


def test_strides():
    """A model's [B, S, H, D] layout, tiles inside of a longer sequence, counts inside of a longer list."""
    x = torch.randn(2, 6 * 16, 3, 32).transpose(1, 2).unflatten(2, (6, 16))[:, :, 1:5]
    counts = torch.randint(0, 17, (2, 6), dtype=torch.int32)[:, 1:5]
    check([(x, counts, True)])
    check([(x.transpose(-1, -2).contiguous().transpose(-1, -2), counts, True)])


def test_same_as_the_builders():
    x, counts, masked = make_part(2, 2, 5, 16, 32, True)
    torch.testing.assert_close(pool([(x, counts, masked)])[0], coarse.pool(x, counts, masked))


def test_number_of_parts():
    with pytest.raises(ValueError, match="give 1 to 3"):
        pool([])


@settings(max_examples=8)
@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from([1, 3, 16, 48]),
    st.sampled_from([16, 40]),
    st.booleans(),
    st.booleans(),
)
def test_any_shape(B, X, N, slots, D, masked, per_sample):
    check([make_part(B, X, N, slots, D, masked, per_sample=per_sample), make_part(B, 1, N + 1, slots, D, masked)])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_unpool_is_the_gradient(masked, per_sample):
    x, counts, _ = make_part(2, 2, 5, 16, 32, False, per_sample=per_sample)
    x = x.double().requires_grad_()
    d = torch.randn(2, 2, 5, 32, dtype=torch.float64)
    (expected,) = torch.autograd.grad(pool_reference([(x, counts, masked)])[0], x, d)
    torch.testing.assert_close(unpool(d, counts, 16, masked, torch.float64), expected)


def test_the_short_list_is_part_of_the_long_one_and_all_of_it_for_auto() -> None:
    first = compilations(False)
    assert 0 < len(first) <= 10 and all(c.auto for c in first)
    assert all(c.config in [other.config for other in compilations(True)] for c in first)
