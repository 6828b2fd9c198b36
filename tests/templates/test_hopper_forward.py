"""The Hopper forward, run by the simulator: against float64, and with bugs planted that must be seen."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerance import assert_as_good, assert_lse

from flexsparse.compile_passes.templates import hopper_forward, hopper_kernels
from flexsparse.compile_passes.templates.attention_common import Blocks
from flexsparse.compile_passes.templates.forward import forward_reference

from .attention_cases import Case, Problem, build, oracle
from .gluon_simulator import simulate
from .gluon_values import Hazard
from .hopper_bugs import BUGS, Bug
from .planted import mutated

BF16, FP16 = torch.bfloat16, torch.float16
SMALL = Case(query_rows=64, slots=64, D=64, dtype=BF16)
ONE, TWO = (Blocks(rows=64, keys=64, num_warps=4, num_stages=stages) for stages in (1, 2))
PIECES = ONE
WIDE = Blocks(rows=64, keys=128, num_warps=4, num_stages=1)
LARGE, LONG = (Blocks(rows=128, keys=keys, num_warps=8, num_stages=2) for keys in (128, 64))

EVERYTHING = {"partial": True, "kv_first": 1, "kv_last": 2, "first": 1, "last": 2, "B": 2, "gated": True}
CASES = [
    (replace(SMALL, B=2, H=2, M=5), ONE),
    (replace(SMALL, B=2, H=4, G=2, M=33, N=2, density=0.1, D=128), ONE),
    (replace(SMALL, dtype=FP16, D=128, **EVERYTHING), ONE),
    (replace(SMALL, **EVERYTHING), TWO),
    (replace(SMALL, H=2, G=1, partial=True, kv_last=1, gated=True), ONE),
    (replace(SMALL, M=1, N=2, density=1.0), ONE),
    (replace(SMALL, M=1, N=2, density=1.0), TWO),
    (replace(SMALL, M=2, N=2, density=1.0, partial=True), TWO),
    (replace(SMALL, density=0.0), ONE),
    (replace(SMALL, density=0.0, partial=True, B=2), TWO),
    (replace(SMALL, density=0.0, kv_last=1, last=1), ONE),
    (replace(SMALL, query_rows=128, slots=128, D=128, gated=True, N=2), LARGE),
    (replace(SMALL, query_rows=128, slots=128, dtype=FP16, **EVERYTHING), LARGE),
    (replace(SMALL, query_rows=128, slots=128, **EVERYTHING), ONE),
    (replace(SMALL, query_rows=128, slots=128, **EVERYTHING), TWO),
    (replace(SMALL, query_rows=128, slots=64, **EVERYTHING), LONG),
    (replace(SMALL, query_rows=64, slots=128, D=128, **EVERYTHING), WIDE),
    (replace(SMALL, query_rows=256, slots=256, N=2, M=2, partial=True, first=1, density=0.6), LARGE),
]


@pytest.fixture(autouse=True)
def poison(poisoned: None) -> None:
    """Outputs are NaN until they are written."""


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that only a GPU runs go to the simulator."""
    monkeypatch.setattr(hopper_forward, "launch", simulate)
    yield


def check(problem: Problem, size: Blocks) -> None:
    expected = oracle(problem)
    out, lse = hopper_forward.forward(*problem.tensors, size=size, **problem.keywords)
    reference, _ = forward_reference(*problem.tensors, **problem.keywords)
    assert_as_good(out, reference, expected.values["out"], "out")
    assert_lse(lse, expected.values["lse"], expected.largest_logit)
    if not problem.case.gated:
        assert bool((out[expected.values["lse"] == -math.inf] == 0).all())


@pytest.mark.parametrize(
    ("case", "size"), CASES, ids=lambda x: x.name if isinstance(x, Case) else f"{x.rows}x{x.keys}x{x.num_stages}"
)
def test_as_good_as_float32(case: Case, size: Blocks) -> None:
    check(build(case), size)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("magnitude", [4.0, 8.0, 16.0])
def test_at_larger_scales(magnitude: float, dtype: torch.dtype) -> None:
    check(build(replace(SMALL, magnitude=magnitude, dtype=dtype, partial=True, kv_last=1, gated=True, B=2)), ONE)


def test_strided_and_unaligned_inputs() -> None:
    problem = build(replace(SMALL, B=2, H=2, G=2))
    expected = hopper_forward.forward(*problem.tensors, size=ONE, **problem.keywords)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (problem.q, problem.k, problem.v)]
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (problem.q, problem.k, problem.v)]
    for given in (turned, shifted):
        found = hopper_forward.forward(*given, *problem.tensors[3:], size=ONE, **problem.keywords)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_batch_of_no_samples() -> None:
    problem = build(SMALL)
    none = [None if x is None else x[:0] for x in problem.tensors]
    out, lse = hopper_forward.forward(*none, size=ONE, **problem.keywords)
    assert out.shape == (0, *problem.q.shape[1:]) and lse.shape == (0, *problem.q.shape[1:3])


@pytest.mark.parametrize(
    ("changes", "size", "scale", "words"),
    [
        ({"dtype": torch.float32}, ONE, 1.0, "bf16 and fp16"),
        ({"D": 96}, ONE, 1.0, "head dim 64 and 128, not torch.bfloat16 of 96"),
        ({"query_rows": 32}, ONE, 1.0, "do not divide tiles of 32 rows"),
        ({"slots": 64}, WIDE, 1.0, "do not divide tiles of 64 rows and 64 slots"),
        ({}, replace(ONE, num_warps=8), 1.0, "16 rows to a warp"),
        ({}, replace(ONE, num_stages=3), 1.0, "1 or 2 stages"),
        ({}, ONE, -0.125, "positive, not -0.125"),
    ],
)
def test_refusals_say_why(changes: dict[str, object], size: Blocks, scale: float, words: str) -> None:
    problem = build(replace(SMALL, N=1, M=1, density=1.0, **changes))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        hopper_forward.forward(*problem.tensors, size=size, **problem.keywords | {"scale": scale})


PLANTED = [
    pytest.param(bug, id=bug.name, marks=pytest.mark.slow if i % 4 else ())  # most: they take their time
    for i, bug in enumerate(BUGS)
]


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_seen(bug: Bug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_forward, "hopper_kernels", mutated(tmp_path, hopper_kernels, bug.old, bug.new))
    with pytest.raises((Hazard, AssertionError), match=bug.complaint):
        for case in (replace(SMALL, H=2, G=1, M=5, N=2, magnitude=2.0, **EVERYTHING), replace(SMALL, density=0.0)):
            check(build(case), ONE)
