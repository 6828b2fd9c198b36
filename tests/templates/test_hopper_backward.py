"""The Hopper kernels of dq, dk and dv, run by the simulator: against float64, and with bugs planted that must be seen."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexsparse.compile_passes.templates import columns as columns_
from flexsparse.compile_passes.templates import (
    hopper_backward,
    hopper_backward_columns,
    hopper_backward_rows,
    hopper_specialized,
    tuned,
)
from flexsparse.compile_passes.templates.attention_common import Blocks
from flexsparse.compile_passes.templates.backward import backward
from flexsparse.compile_passes.templates.forward import forward
from flexsparse.compile_passes.templates.launch import count_launches

from .attention_cases import MEMORY, Case, Problem, build, in_memory
from .gluon_simulator import simulate
from .gluon_values import Hazard
from .hopper_backward_bugs import COLUMN_BUGS, ROW_BUGS
from .hopper_backward_runs import NAMES, SMALL, check, far_below_zero, run, saved
from .hopper_bugs import Bug
from .planted import mutated

BF16, FP16 = torch.bfloat16, torch.float16
ONE, TWO = (Blocks(rows=64, keys=64, num_warps=4, num_stages=stages) for stages in (1, 2))
LONG = Blocks(rows=128, keys=64, num_warps=8, num_stages=2)
TALL = Blocks(rows=64, keys=128, num_warps=8, num_stages=2)

EVERYTHING: dict[str, Any] = {"partial": True, "kv_first": 1, "kv_last": 2, "first": 1, "last": 2, "B": 2}
CASES = [
    (replace(SMALL, B=2, H=2, M=5), ONE, TWO),
    (replace(SMALL, B=2, H=4, G=2, M=33, N=2, density=0.1, D=128), TWO, TWO),
    (replace(SMALL, dtype=FP16, D=128, **EVERYTHING), ONE, ONE),
    (replace(SMALL, H=2, G=1, **EVERYTHING), TWO, TWO),
    (replace(SMALL, H=3, G=1, partial=True, kv_last=1), ONE, ONE),
    (replace(SMALL, M=1, N=2, density=1.0), ONE, ONE),
    (replace(SMALL, M=1, N=1, density=1.0), TWO, TWO),
    (replace(SMALL, M=2, N=2, density=1.0, partial=True), TWO, TWO),
    (replace(SMALL, density=0.0), ONE, ONE),
    (replace(SMALL, density=0.0, partial=True, B=2), TWO, TWO),
    (replace(SMALL, density=0.0, kv_last=1, last=1), ONE, TWO),
    (replace(SMALL, query_rows=128, slots=128, D=128, N=2), LONG, TALL),
    (replace(SMALL, query_rows=128, slots=128, dtype=FP16, **EVERYTHING), LONG, TALL),
    (replace(SMALL, query_rows=128, slots=128, H=2, G=1, **EVERYTHING), ONE, ONE),
    (replace(SMALL, query_rows=128, slots=64, D=128, **EVERYTHING), LONG, TWO),
    (replace(SMALL, query_rows=64, slots=128, D=128, **EVERYTHING), TWO, TALL),
    (replace(SMALL, query_rows=256, slots=256, N=2, M=2, partial=True, first=1, density=0.6), LONG, TALL),
]


@pytest.fixture(autouse=True)
def poison(poisoned: None) -> None:
    """Gradients are NaN until they are written."""


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that only a GPU runs go to the simulator."""
    monkeypatch.setattr(hopper_backward, "launch", simulate)
    yield


@pytest.mark.parametrize(
    ("case", "rows", "columns"),
    CASES,
    ids=lambda x: x.name if isinstance(x, Case) else f"{x.rows}x{x.keys}x{x.num_stages}",
)
def test_as_good_as_float32(case: Case, rows: Blocks, columns: Blocks) -> None:
    check(build(case), rows, columns)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("magnitude", [4.0, 8.0, 16.0])
def test_at_larger_scales(magnitude: float, dtype: torch.dtype) -> None:
    check(build(replace(SMALL, magnitude=magnitude, dtype=dtype, partial=True, kv_last=1, B=2)), ONE, TWO)


@pytest.mark.parametrize("magnitude", [1.0, 8.0])
def test_gradient_of_the_log_sum_exp(magnitude: float) -> None:
    check(build(replace(SMALL, magnitude=magnitude, density=0.0, **EVERYTHING)), TWO, ONE, with_lse_gradient=True)


@pytest.mark.parametrize(
    ("case", "columns"),
    [
        (replace(SMALL, N=5, H=3, G=1, popular=True, **EVERYTHING), TWO),
        (replace(SMALL, query_rows=128, slots=128, D=128, N=4, partial=True, popular=True), TALL),
        (replace(SMALL, query_rows=128, N=4, H=2, popular=True), ONE),
    ],
    ids=lambda x: x.name if isinstance(x, Case) else "",
)
def test_columns_in_pieces(case: Case, columns: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns_, "SHORTEST", 1)
    check(build(case), ONE, columns, most=16)


def test_weights_past_a_count_may_be_infinite() -> None:
    problem = far_below_zero()
    assert bool((-saved(problem)[1]).exp2().isinf().any())
    check(problem, ONE, TWO)
    check(problem, TWO, ONE)


@pytest.mark.parametrize("how", MEMORY)
def test_gradients_have_the_memory_format_of_their_inputs(how: str) -> None:
    problem = build(replace(SMALL, B=2, H=2, G=2))
    expected, _ = run(problem, ONE, TWO)
    moved = replace(problem, **{name: in_memory(getattr(problem, name), how) for name in ("q", "k", "v", "grad_out")})
    found, _ = run(moved, ONE, TWO)
    for name, x in zip(NAMES, (moved.q, moved.k, moved.v)):
        assert torch.equal(found[name], expected[name])
        assert found[name].stride() == torch.empty_like(x).stride()


def test_unaligned_inputs() -> None:
    problem = build(replace(SMALL, B=2, H=2, G=2))
    expected, _ = run(problem, ONE, TWO)
    for name in ("q", "k", "v", "grad_out"):
        x = getattr(problem, name)
        setattr(problem, name, torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape))
    found, _ = run(problem, ONE, TWO)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


def test_stages_change_no_bit() -> None:
    problem = build(replace(SMALL, H=2, G=1, **EVERYTHING))
    first, second = run(problem, ONE, ONE)[0], run(problem, TWO, TWO)[0]
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_negative_scale() -> None:
    problem = build(replace(SMALL, M=2, N=2))
    found, _ = run(problem, ONE, TWO)
    problem.q = -problem.q
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Problem, "keywords", property(lambda self, f=Problem.keywords.fget: f(self) | {"scale": -0.125}))
        again, _ = run(problem, ONE, TWO)
    assert torch.equal(again["dq"], -found["dq"]) and torch.equal(again["dk"], found["dk"])


def test_batch_of_no_samples() -> None:
    problem = build(SMALL)
    none = {name: getattr(problem, name)[:0] for name in ("q", "k", "v", "bits", "counts", "kv_counts", "grad_out")}
    given = problem.keywords
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Problem, "keywords", given)
        found, _ = run(replace(problem, **none), ONE, TWO)
    assert found["dq"].shape == (0, *problem.q.shape[1:]) and found["dv"].shape == (0, *problem.v.shape[1:])


@pytest.mark.parametrize(
    ("changes", "rows", "columns", "words"),
    [
        ({"dtype": torch.float32}, ONE, None, "dq computes bf16 and fp16"),
        ({"D": 96}, None, TWO, "dk and dv computes .* head dim 64 and 128, not torch.bfloat16 of 96"),
        ({"query_rows": 32}, ONE, None, "do not divide tiles of 32 rows"),
        ({"slots": 64}, None, TALL, "do not divide tiles of 64 rows and 64 slots"),
        ({}, replace(ONE, num_warps=8), None, "16 to a warp, and 64 slots, not 64 x 64 on 8 warps"),
        ({"query_rows": 128, "slots": 128}, None, LONG, "takes 64 rows and 64 or 128 slots, .*, not 128 x 64"),
        ({"slots": 128}, Blocks(rows=64, keys=128, num_warps=4, num_stages=1), None, "and 64 slots, not 64 x 128"),
        ({}, replace(ONE, num_stages=3), None, "1 to 2 stages, not 3"),
        ({}, None, replace(ONE, num_stages=3), "1 to 2 stages, not 3"),
    ],
)
def test_refusals_say_why(changes: dict[str, Any], rows: Blocks | None, columns: Blocks | None, words: str) -> None:
    problem = build(replace(SMALL, N=1, M=1, density=1.0, **changes))
    fit = Blocks(rows=64, keys=64, num_warps=4, num_stages=1)
    with pytest.MonkeyPatch.context() as patch:
        if rows is None:  # the other kernel does not get to refuse first
            patch.setattr(hopper_backward, "dq", lambda *args, **given: problem.q)
        with pytest.raises(ValueError, match=words):
            run(problem, rows or fit, columns or fit)


@pytest.mark.parametrize(("kernel", "split"), [("hopper", False), ("hopper", True), ("hopper_specialized", True)])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_the_backward_goes_to_the_kernels_that_are_chosen(
    kernel: str, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(SMALL, dtype=FP16, H=2, G=1, popular=True, partial=True, kv_last=1, first=1, gated=True)
    problem = build(case)
    out, lse = forward(*problem.tensors, **problem.keywords)
    q, k, v, *rest = problem.tensors
    arguments = (problem.grad_out, problem.grad_lse, q, k, v, out, lse, *rest)
    plain = backward(*arguments, **problem.keywords)
    launched: list[str] = []

    def simulated_launch(kernel: Any, *args: Any, **meta: Any) -> None:
        launched.append(f"{kernel.__name__} {meta['STAGES']} {meta.get('SPLIT')}")
        simulate(kernel, *args, **meta)

    monkeypatch.setattr(hopper_backward, "launch", simulated_launch)
    monkeypatch.setattr(hopper_specialized, "launch", simulated_launch)
    monkeypatch.setattr(tuned, "arch_of", lambda x: "sm_90a")
    if split:
        monkeypatch.setattr(columns_, "SHORTEST", 1)
    every = [tuned.candidates("sm_90a", FP16, 64, 64, 64, op) for op in ("dq", "dkdv")]
    choices = [next(choice for choice in found if choice.kernel == kernel) for found in every]
    for used in ([choices[0]], [choices[1]], choices):
        launched.clear()
        with contextlib.ExitStack() as stack, count_launches() as names:
            for choice in used:
                stack.enter_context(tuned.using(choice))
            found = backward(*arguments, **problem.keywords)
        assert launched == [f"{kernel}_{x.op} {x.num_stages} {split if x.op == 'dkdv' else None}" for x in used]
        assert ("_dq" in names) == (choices[0] not in used) and ("_dkdv" in names) == (choices[1] not in used)
        assert ("_add_pieces" in names) == split
        for one, other in zip(found, plain):
            assert one is not None and other is not None
            torch.testing.assert_close(one, other, atol=2e-2, rtol=4e-3)


PLANTED = [
    pytest.param(name, bug, id=f"{name}-{bug.name}", marks=pytest.mark.slow if i % 4 else ())  # most: they take minutes
    for name, bugs in (("rows", ROW_BUGS), ("columns", COLUMN_BUGS))
    for i, bug in enumerate(bugs)
]


@pytest.mark.parametrize(("name", "bug"), PLANTED)
def test_planted_bugs_are_seen(name: str, bug: Bug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {"rows": hopper_backward_rows, "columns": hopper_backward_columns}
    monkeypatch.setattr(hopper_backward, f"hopper_backward_{name}", mutated(tmp_path, kernels[name], bug.old, bug.new))
    monkeypatch.setattr(columns_, "SHORTEST", 1)
    with pytest.raises((Hazard, AssertionError), match=bug.complaint):
        problem = build(replace(SMALL, H=4, G=2, M=5, N=3, magnitude=2.0, popular=True, **EVERYTHING))
        for size, most in ((ONE, 0), (TWO, 24)):
            check(problem, size, size, most)
        check(far_below_zero(), TWO, ONE)
        check(build(replace(SMALL, H=2, G=1)), TWO, TWO)
        check(build(replace(SMALL, H=2, M=3, N=2, magnitude=8.0, density=1.0)), ONE, ONE, with_lse_gradient=True)
