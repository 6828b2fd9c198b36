"""The backward kernels against float64 gradients and their twin."""

import math
from dataclasses import replace

import pytest
import torch
from tolerance import assert_as_good
from torch import Tensor

from flexsparse.compile_passes.templates.backward import backward, backward_reference
from flexsparse.compile_passes.templates.forward import forward
from flexsparse.compile_passes.templates.launch import count_launches

from .attention_cases import Case, Problem, build, oracle

pytestmark = [  # from slots past a tile's count, whose results are dropped
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
FP16 = torch.float16
CASES = [
    Case(B=2, H=2, M=5, N=3),
    Case(B=2, H=4, G=2, M=33, N=2, density=0.1, D=16),
    Case(partial=True, kv_first=1, kv_last=2, first=1, last=2, B=2, H=2, G=1),
    Case(partial=True, density=0.0, B=2),
    Case(density=0.0, kv_last=1, last=1),
    Case(density=1.0, N=2, M=3, D=96, gated=True),
    Case(query_rows=32, slots=64, partial=True, H=2, gated=True, kv_first=1, first=1, N=2),
    Case(query_rows=16, slots=64, dtype=FP16, D=64, B=2, N=2, partial=True, last=1, gated=True),
    Case(query_rows=64, slots=64, dtype=FP16, D=64, H=2, G=1, N=2, M=3, kv_last=1),
    Case(query_rows=256, slots=256, dtype=FP16, N=2, M=2, partial=True, first=1, density=0.6, gated=True),
    Case(query_rows=128, slots=128, dtype=FP16, N=2, M=2, D=96, density=0.7),
    Case(query_rows=32, slots=32, dtype=FP16, D=40, N=3, M=3),
]
NAMES = ("dq", "dk", "dv", "dcoarse", "dgate")


@pytest.fixture(autouse=True)
def poison(poisoned: None) -> None:
    """Gradients are NaN until they are written."""


def run(problem: Problem, with_lse_gradient: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients by the kernels and by their twin, by name."""
    out, lse = forward(*problem.tensors, **problem.keywords)
    grad_lse = problem.grad_lse if with_lse_gradient else None
    q, k, v, *rest = problem.tensors
    arguments = (problem.grad_out, grad_lse, q, k, v, out, lse, *rest)
    found = backward(*arguments, **problem.keywords)
    reference = backward_reference(*arguments, **problem.keywords)
    return dict(zip(NAMES, found)), dict(zip(NAMES, reference))


def check(problem: Problem, with_lse_gradient: bool = False) -> None:
    found, reference = run(problem, with_lse_gradient)
    expected = oracle(problem, with_lse_gradient).values
    for name in NAMES:
        if name not in expected:
            assert found[name] is None
            continue
        assert_as_good(found[name], reference[name], expected[name], name)
        assert found[name].is_contiguous()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_good_as_float32(case: Case) -> None:
    check(build(case))


@pytest.mark.parametrize("dtype", [torch.float32, FP16], ids=str)
@pytest.mark.parametrize("magnitude", [4.0, 8.0, 16.0])
@pytest.mark.parametrize("gated", [False, True])
def test_at_larger_scales(magnitude: float, dtype: torch.dtype, gated: bool) -> None:
    check(build(Case(magnitude=magnitude, dtype=dtype, D=64, partial=True, kv_last=1, gated=gated, B=2)))


@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[7]], ids=lambda case: case.name)
def test_gradient_of_the_log_sum_exp(case: Case) -> None:
    check(build(case), with_lse_gradient=True)


def test_the_rounding_of_the_log_sum_exp_stays_out_of_delta() -> None:
    problem = build(Case(gated=True, magnitude=4.0))
    q, k, v, *rest = problem.tensors
    out, lse = forward(*problem.tensors, **problem.keywords)
    dq, off = (
        backward(problem.grad_out, None, q, k, v, out, x, *rest, **problem.keywords)[0] for x in (lse, lse + 0.01)
    )
    torch.testing.assert_close(off * math.exp(0.01), dq, rtol=1e-3, atol=1e-3 * float(dq.square().mean().sqrt()))


def test_slots_past_a_count_get_no_gradient() -> None:
    problem = build(CASES[2])
    found, _ = run(problem)
    past = problem.k.isnan()
    assert bool(past.any())
    assert bool((found["dk"][past] == 0).all())
    assert bool((found["dv"][past] == 0).all())


@pytest.mark.parametrize("case", [CASES[2], CASES[7]], ids=lambda case: case.name)
def test_the_same_bits_again(case: Case) -> None:
    problem = build(case)
    first, second = run(problem)[0], run(problem)[0]
    assert all(torch.equal(first[name], second[name]) for name in NAMES if first[name] is not None)


def test_launches() -> None:
    problem = build(replace(CASES[0], gated=True))
    with count_launches() as launches:
        run(problem)
    forward_launches = 2
    columns = ["_count_columns", "_fill_columns", "_pieces"]
    assert launches[forward_launches:] == ["_delta", "_ascending", "_dq", *columns, "_dkdv"]


@pytest.mark.parametrize("case", [CASES[0], CASES[7], replace(CASES[2], gated=True)], ids=lambda case: case.name)
@pytest.mark.parametrize("with_lse_gradient", [False, True])
def test_an_output_that_is_a_bit_off_changes_nothing(case: Case, with_lse_gradient: bool) -> None:
    """What delta lacks is found on dq's walk: in low precision, and with a gate. Float32 alone takes the output as it is."""
    problem = build(case)
    q, k, v, *rest = problem.tensors
    out, lse = forward(*problem.tensors, **problem.keywords)
    grad_lse = problem.grad_lse if with_lse_gradient else None
    exact, found = (
        backward(problem.grad_out, grad_lse, q, k, v, given, lse, *rest, **problem.keywords)
        for given in (out, (out.float() * 1.01).to(out.dtype))
    )
    errors = [float((x - y).float().abs().max() / x.float().abs().max()) for x, y in zip(found[:3], exact[:3])]
    read = case.dtype == torch.float32 and not case.gated
    assert (max(errors[:2]) > 1e-3) == read, errors
    assert errors[2] == 0.0, "dv does not take delta"


def test_strided_gradient() -> None:
    problem = build(Case(B=2, H=2))
    whole, _ = run(problem)
    problem.grad_out = problem.grad_out.transpose(1, 2).contiguous().transpose(1, 2)
    again, _ = run(problem)
    assert torch.equal(whole["dk"], again["dk"])
