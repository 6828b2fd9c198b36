"""The Hopper kernels of the backward with a warp that only copies, run by the simulator.

They are held to float64, to the bits of the kernels without such a warp, to any order of their partitions, and to bugs planted.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexsparse.compile_passes.templates import columns as columns_
from flexsparse.compile_passes.templates import (
    hopper_backward,
    hopper_specialized,
    hopper_specialized_columns,
    hopper_specialized_rows,
)
from flexsparse.compile_passes.templates.attention_common import Blocks

from .attention_cases import Case, Problem, build, in_memory
from .gluon_simulator import simulate
from .gluon_values import Hazard
from .hopper_backward_runs import NAMES, SMALL, check, far_below_zero, run
from .hopper_bugs import Bug
from .hopper_specialized_bugs import COLUMN_BUGS, ROW_BUGS
from .planted import mutated

FP16 = torch.float16
ONE, TWO, THREE, FOUR = (Blocks(rows=64, keys=64, num_warps=4, num_stages=stages) for stages in (1, 2, 3, 4))
LONG = Blocks(rows=128, keys=64, num_warps=8, num_stages=4)
TALL = Blocks(rows=64, keys=128, num_warps=8, num_stages=4)
EVERYTHING = {"partial": True, "kv_first": 1, "kv_last": 2, "first": 1, "last": 2, "B": 2}
CASES = [
    (replace(SMALL, B=2, H=2, M=5), TWO, TWO),
    (replace(SMALL, B=2, H=4, G=2, M=33, N=2, density=0.1, D=128), FOUR, FOUR),
    (replace(SMALL, dtype=FP16, D=128, **EVERYTHING | {"B": 1}), TWO, TWO),
    (replace(SMALL, H=4, G=2, popular=True, **EVERYTHING | {"B": 1}), THREE, THREE),
    (replace(SMALL, H=3, G=1, partial=True, kv_last=1), ONE, ONE),
    (replace(SMALL, M=1, N=1, density=1.0), FOUR, FOUR),
    (replace(SMALL, density=0.0), TWO, TWO),
    (replace(SMALL, density=0.0, kv_last=1, last=1), TWO, THREE),
    (replace(SMALL, query_rows=64, slots=128, **EVERYTHING | {"B": 1}), TWO, TALL),
    (replace(SMALL, query_rows=256, slots=256, N=2, M=2, partial=True, first=1, density=0.6), LONG, TALL),
]
SLOW_CASES = [
    (replace(SMALL, query_rows=128, slots=128, dtype=FP16, **EVERYTHING), LONG, TALL),
    (replace(SMALL, query_rows=128, slots=64, D=128, **EVERYTHING), LONG, TWO),
    (replace(SMALL, H=2, G=1, query_rows=128, slots=128, **EVERYTHING), TWO, TWO),
]


@pytest.fixture(autouse=True)
def poison(poisoned: None) -> None:
    """Gradients are NaN until they are written."""


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that only a GPU runs go to the simulator."""
    monkeypatch.setattr(hopper_backward, "launch", simulate)
    monkeypatch.setattr(hopper_specialized, "launch", simulate)
    yield


def both(problem: Problem, rows: Blocks, columns: Blocks, most: int = 0, with_lse_gradient: bool = False) -> None:
    """As `check`, and the same bits as `hopper_backward`."""
    found = check(problem, rows, columns, most, with_lse_gradient, hopper_specialized)
    plain = [replace(size, num_stages=1) for size in (rows, columns)]
    expected, _ = run(problem, *plain, most, with_lse_gradient)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize(
    ("case", "rows", "columns"),
    CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES],
    ids=lambda x: x.name if isinstance(x, Case) else f"{x.rows}x{x.keys}x{x.num_stages}",
)
def test_the_bits_of_the_kernels_without_a_producer(case: Case, rows: Blocks, columns: Blocks) -> None:
    both(build(case), rows, columns)


@pytest.mark.parametrize("magnitude", [8.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_gradient_of_the_log_sum_exp(magnitude: float) -> None:
    both(build(replace(SMALL, magnitude=magnitude, density=0.0, **EVERYTHING)), TWO, TWO, with_lse_gradient=True)


@pytest.mark.parametrize(
    ("case", "columns"),
    [
        (replace(SMALL, N=5, H=2, G=1, popular=True, **EVERYTHING | {"B": 1}), TWO),
        (replace(SMALL, query_rows=128, slots=128, D=128, N=4, partial=True, popular=True), TALL),
    ],
    ids=lambda x: x.name if isinstance(x, Case) else "",
)
def test_columns_in_pieces(case: Case, columns: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns_, "SHORTEST", 1)
    both(build(case), TWO, columns, most=16)


def test_weights_past_a_count_may_be_infinite() -> None:
    both(far_below_zero(), TWO, TWO)


@pytest.mark.parametrize("stages", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4))])
def test_the_same_bits_in_any_order_of_events(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = build(replace(SMALL, H=2, G=1, M=5, **EVERYTHING | {"B": 1}))
    size = replace(TWO, num_stages=stages)
    found = []
    for seed in range(4):
        monkeypatch.setattr(hopper_specialized, "launch", functools.partial(simulate, seed=1000 * seed))
        found.append(run(problem, size, size, kernels=hopper_specialized)[0])
    assert all(torch.equal(one[name], found[0][name]) for one in found[1:] for name in NAMES)


def test_strided_and_unaligned_inputs() -> None:
    problem = build(replace(SMALL, B=2, H=2, G=2, partial=True, kv_last=1))
    expected, _ = run(problem, TWO, TWO, kernels=hopper_specialized)
    names = ("q", "k", "v", "grad_out")
    turned = {name: in_memory(getattr(problem, name), "heads inside") for name in names}
    shifted = {
        name: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        for name, x in ((name, getattr(problem, name)) for name in (*names, "kv_counts"))
    }
    for given in (turned, shifted):
        found, _ = run(replace(problem, **given), TWO, TWO, kernels=hopper_specialized)
        assert all(torch.equal(found[name], expected[name]) for name in NAMES)


def test_batch_of_no_samples() -> None:
    problem = build(SMALL)
    none = {name: getattr(problem, name)[:0] for name in ("q", "k", "v", "bits", "counts", "kv_counts", "grad_out")}
    given = problem.keywords
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Problem, "keywords", given)
        found, _ = run(replace(problem, **none), TWO, TWO, kernels=hopper_specialized)
    assert found["dq"].shape == (0, *problem.q.shape[1:]) and found["dv"].shape == (0, *problem.v.shape[1:])


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        (replace(TWO, num_stages=5), TWO, "of dq takes 1 to 4 stages, not 5"),
        (TWO, replace(TWO, num_stages=5), "of dk and dv takes 1 to 4 stages, not 5"),
        (replace(TWO, num_warps=8), TWO, "of dq takes 64 or 128 rows, 16 to a warp"),
        (TWO, TALL, "of dk and dv blocks of 64 rows and 128 slots do not divide"),
    ],
)
def test_refusals_say_why(rows: Blocks, columns: Blocks, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(build(replace(SMALL, N=1, M=1, density=1.0)), rows, columns, kernels=hopper_specialized)


PLANTED = [
    pytest.param(name, bug, id=f"{name}-{bug.name}", marks=pytest.mark.slow if i % 4 else ())  # most: a second each
    for name, bugs in (("rows", ROW_BUGS), ("columns", COLUMN_BUGS))
    for i, bug in enumerate(bugs)
]


@pytest.mark.parametrize(("name", "bug"), PLANTED)
def test_planted_bugs_are_seen(name: str, bug: Bug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {"rows": hopper_specialized_rows, "columns": hopper_specialized_columns}
    changed = mutated(tmp_path, kernels[name], bug.old, bug.new)
    monkeypatch.setattr(hopper_specialized, f"hopper_specialized_{name}", changed)
    monkeypatch.setattr(columns_, "SHORTEST", 1)
    with pytest.raises((Hazard, AssertionError), match=bug.complaint):
        problem = build(replace(SMALL, H=4, G=2, M=5, N=3, magnitude=2.0, popular=True, **EVERYTHING))
        for seed, (size, most) in enumerate(((TWO, 0), (ONE, 24))):
            monkeypatch.setattr(hopper_specialized, "launch", functools.partial(simulate, seed=1000 * seed))
            check(problem, size, size, most, kernels=hopper_specialized)
        tall = build(replace(SMALL, N=2, M=9, density=1.0, query_rows=128, slots=128, partial=True))
        check(tall, TWO, TWO, kernels=hopper_specialized)
