"""The fine stage's forward kernel against float64, its twin, and the `gather` backend."""

import math
from dataclasses import replace

import pytest
import torch
from tolerance import assert_as_good, assert_lse

import flexsparse.backends.gather  # noqa: F401  (registers the op)
from flexsparse.compile_passes.templates.forward import forward, forward_reference
from flexsparse.compile_passes.templates.launch import count_launches

from .attention_cases import Case, Problem, build, oracle

FP16 = torch.float16
CASES = [
    Case(B=2, H=2, M=5, N=3),
    Case(B=2, H=4, G=2, M=33, N=2, density=0.1, D=16),
    Case(partial=True, kv_first=1, kv_last=2, first=1, last=2, B=2),
    Case(partial=True, density=0.0, B=2),
    Case(density=0.0, kv_last=1, last=1),
    Case(density=1.0, N=2, M=3, D=96, gated=True),
    Case(query_rows=32, slots=64, partial=True, H=2, gated=True, kv_first=1, N=2),
    Case(query_rows=16, slots=64, dtype=FP16, D=64, B=2, N=2, partial=True, last=1, gated=True),
    Case(query_rows=64, slots=64, dtype=FP16, D=64, H=2, G=1, N=2, M=3, kv_last=1),
    Case(query_rows=256, slots=256, dtype=FP16, N=2, M=2, partial=True, first=1, density=0.6),
    Case(query_rows=128, slots=128, dtype=FP16, N=2, M=2, D=96, gated=True, density=0.7),
    Case(query_rows=32, slots=32, dtype=FP16, D=40, N=3, M=3),
]


@pytest.fixture(autouse=True)
def poison(poisoned: None) -> None:
    """Outputs are NaN until they are written."""


def run(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return forward(*problem.tensors, **problem.keywords)


def check(problem: Problem) -> None:
    expected = oracle(problem)
    out, lse = run(problem)
    reference, reference_lse = forward_reference(*problem.tensors, **problem.keywords)
    assert_as_good(out, reference, expected.values["out"], "out")
    assert_lse(lse, expected.values["lse"], expected.largest_logit)
    assert_lse(reference_lse, expected.values["lse"], expected.largest_logit)
    blank = expected.values["lse"] == -math.inf
    if not problem.case.gated:
        assert bool((out[blank] == 0).all())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_good_as_float32(case: Case) -> None:
    check(build(case))


@pytest.mark.parametrize("dtype", [torch.float32, FP16], ids=str)
@pytest.mark.parametrize("magnitude", [4.0, 8.0, 16.0])
def test_at_larger_scales(magnitude: float, dtype: torch.dtype) -> None:
    check(build(Case(magnitude=magnitude, dtype=dtype, D=64, partial=True, kv_last=1, gated=True, B=2)))


@pytest.mark.parametrize("case", [CASES[2], replace(CASES[8], partial=True)], ids=lambda case: case.name)
def test_equals_gather(case: Case) -> None:
    problem = build(case)
    keywords = problem.keywords
    fixed = [keywords[n] for n in ("query_rows", "first_rows", "kv_first", "kv_video", "slots", "scale")]
    q, k, v, bits, counts, kv_counts, _, _ = problem.tensors
    k, v = k.nan_to_num(0), v.nan_to_num(0)
    other, other_lse = torch.ops.flexsparse.gather_attention(q, k, v, bits, counts, kv_counts, *fixed, True)
    out, lse = run(problem)
    eps = torch.finfo(case.dtype).eps
    torch.testing.assert_close(out, other, atol=4 * eps, rtol=4 * eps)
    torch.testing.assert_close(lse, other_lse, atol=1e-5, rtol=1e-5)


def test_two_launches_and_the_same_bits_again() -> None:
    problem = build(Case(B=2, H=2, partial=True, gated=True, kv_first=1, last=1))
    with count_launches() as launches:
        first = run(problem)
    assert len(launches) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, run(problem)))


def test_strided_inputs() -> None:
    problem = build(Case(B=2, H=2, G=2))
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (problem.q, problem.k, problem.v)]
    found = forward(*turned, *problem.tensors[3:], **problem.keywords)
    assert all(torch.equal(a, b) for a, b in zip(found, run(problem)))
