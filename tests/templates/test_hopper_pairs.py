"""The Hopper forward by pairs, run by the simulator: against float64, in any order of its partitions, and with bugs planted."""

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerance import assert_as_good, assert_lse

from flexsparse.compile_passes.templates import hopper_pair_kernels, hopper_pairs
from flexsparse.compile_passes.templates.attention_common import Blocks
from flexsparse.compile_passes.templates.forward import forward_reference
from flexsparse.compile_passes.templates.launch import count_launches
from flexsparse.tile_bits import pack_bits

from .attention_cases import Case, Problem, build, oracle
from .gluon_simulator import simulate
from .gluon_values import Hazard
from .hopper_bugs import Bug
from .hopper_pair_bugs import BUGS
from .planted import mutated

BF16, FP16 = torch.bfloat16, torch.float16
SMALL = Case(query_rows=64, slots=64, D=64, dtype=BF16)
SIX, EIGHT = (Blocks(rows=64, keys=64, num_warps=4, num_stages=stages) for stages in (6, 8))
EVERYTHING = {"partial": True, "kv_first": 1, "kv_last": 2, "first": 1, "last": 2, "B": 2, "gated": True}

CASES = [
    (replace(SMALL, B=2, H=2, N=4, M=5), 2, SIX),
    (replace(SMALL, B=2, H=2, N=4, M=5), 1, EIGHT),
    (replace(SMALL, H=4, G=2, N=6, M=33, density=0.3, D=128), 2, SIX),
    (replace(SMALL, N=6, M=40, density=0.9), 3, SIX),
    (replace(SMALL, N=5, M=9), 5, SIX),
    (replace(SMALL, N=9, M=9), 3, EIGHT),
    (replace(SMALL, N=1, M=20, density=1.0), 1, SIX),
    (replace(SMALL, N=4, density=0.0), 2, SIX),
    (replace(SMALL, N=4, density=0.0, partial=True, B=2, kv_last=1), 2, SIX),
    (replace(SMALL, dtype=FP16, D=128, N=4, **EVERYTHING), 2, SIX),
    (replace(SMALL, N=5, M=20, **EVERYTHING), 2, EIGHT),
    (replace(SMALL, H=2, G=1, N=2, partial=True, kv_last=1, gated=True), 1, SIX),
    (replace(SMALL, N=3, first=2, kv_first=1), 1, SIX),
    (replace(SMALL, N=4, slots=128, **EVERYTHING), 2, SIX),
    (replace(SMALL, N=4, slots=256, M=5, partial=True), 2, SIX),
    (replace(SMALL, query_rows=128, slots=128, D=128, gated=True, N=2), 1, SIX),
    (replace(SMALL, query_rows=128, slots=128, dtype=FP16, **EVERYTHING), 1, SIX),
    (replace(SMALL, query_rows=128, N=3, M=19, density=0.2), 1, EIGHT),
]


@pytest.fixture(autouse=True)
def poison(poisoned: None) -> None:
    """Outputs are NaN until they are written."""


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that only a GPU runs go to the simulator."""
    monkeypatch.setattr(hopper_pairs, "launch", simulate)
    yield


def check(problem: Problem, frame_tiles: int, size: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    expected = oracle(problem)
    out, lse = hopper_pairs.forward(*problem.tensors, size=size, frame_tiles=frame_tiles, **problem.keywords)
    reference, _ = forward_reference(*problem.tensors, **problem.keywords)
    assert_as_good(out, reference, expected.values["out"], "out")
    assert_lse(lse, expected.values["lse"], expected.largest_logit)
    if not problem.case.gated:
        assert bool((out[expected.values["lse"] == -math.inf] == 0).all())
    return out, lse


@pytest.mark.parametrize(
    ("case", "frame_tiles", "size"), CASES, ids=lambda x: x.name if isinstance(x, Case) else getattr(x, "num_stages", x)
)
def test_as_good_as_float32(case: Case, frame_tiles: int, size: Blocks) -> None:
    check(build(case), frame_tiles, size)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("magnitude", [4.0, 8.0, 16.0])
def test_at_larger_scales(magnitude: float, dtype: torch.dtype) -> None:
    case = replace(SMALL, magnitude=magnitude, dtype=dtype, partial=True, kv_last=1, gated=True, B=2, N=4)
    check(build(case), 2, SIX)


def uneven(first: int, second: int, both: int, size: int) -> Problem:
    """Two query tiles that keep so many KV tiles alone, and so many in common."""
    problem = build(replace(SMALL, N=2, M=size, density=1.0))
    keep = torch.zeros(1, 1, 2, size, dtype=torch.bool)
    order = torch.randperm(size)
    keep[0, 0, :, order[:both]] = True
    keep[0, 0, 0, order[both : both + first]] = True
    keep[0, 0, 1, order[both + first : both + first + second]] = True
    return replace(problem, keep=keep, bits=pack_bits(keep), counts=keep.sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("size", [SIX, pytest.param(EIGHT, marks=pytest.mark.slow)], ids=lambda x: x.num_stages)
@pytest.mark.parametrize(
    ("first", "second", "both"), [(0, 0, 9), (12, 0, 0), (0, 12, 1), (1, 13, 3), (14, 2, 0), (7, 7, 0), (6, 7, 8)]
)
def test_whatever_two_tiles_share_in_any_order_of_events(
    first: int, second: int, both: int, size: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = uneven(first, second, both, 25)
    found = []
    for seed in range(6):
        monkeypatch.setattr(hopper_pairs, "launch", functools.partial(simulate, seed=100 * seed))
        found.append(check(problem, 1, size))
    assert all(torch.equal(a, b) for out in found[1:] for a, b in zip(out, found[0])), "the same bits whoever is first"


def test_four_buffers_would_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of buffers that the kernel's own reasoning asks for is needed."""
    monkeypatch.setattr(hopper_pairs, "refuses", lambda *args: None)
    problem = uneven(7, 7, 3, 20)
    for stages, hangs in ((4, True), (6, False)):
        try:
            check(problem, 1, replace(SIX, num_stages=stages))
            assert not hangs
        except Hazard as error:
            assert hangs and "every partition waits" in str(error)


def test_lists_are_one_launch() -> None:
    problem = build(replace(SMALL, N=4))
    for case in (problem, build(replace(SMALL, query_rows=128, slots=128))):
        with count_launches() as launches:
            hopper_pairs.forward(*case.tensors, size=SIX, frame_tiles=2, **case.keywords)
        assert len(launches) == 1, "the simulated kernel is not among them"


def test_strided_and_unaligned_inputs() -> None:
    problem = build(replace(SMALL, B=2, H=2, G=2))
    expected = hopper_pairs.forward(*problem.tensors, size=SIX, **problem.keywords)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (problem.q, problem.k, problem.v)]
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (problem.q, problem.k, problem.v)]
    for given in (turned, shifted):
        found = hopper_pairs.forward(*given, *problem.tensors[3:], size=SIX, **problem.keywords)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_batch_of_no_samples() -> None:
    problem = build(SMALL)
    none = [None if x is None else x[:0] for x in problem.tensors]
    out, lse = hopper_pairs.forward(*none, size=SIX, **problem.keywords)
    assert out.shape == (0, *problem.q.shape[1:]) and lse.shape == (0, *problem.q.shape[1:3])


@pytest.mark.parametrize(
    ("changes", "size", "scale", "words"),
    [
        ({"dtype": torch.float32}, SIX, 1.0, "bf16 and fp16"),
        ({"D": 96}, SIX, 1.0, "head dim 64 and 128, not torch.bfloat16 of 96"),
        ({"query_rows": 32}, SIX, 1.0, "not tiles of 32 rows and 64 slots"),
        ({"query_rows": 256}, SIX, 1.0, "not tiles of 256 rows and 64 slots"),
        ({"slots": 32}, SIX, 1.0, "not tiles of 64 rows and 32 slots"),
        ({}, replace(SIX, num_warps=8), 1.0, "4 warps a block, not 64, 64 and 8"),
        ({}, replace(SIX, num_stages=4), 1.0, "an even number of stages, at least 6, not 4"),
        ({}, replace(SIX, num_stages=7), 1.0, "an even number of stages, at least 6, not 7"),
        ({}, SIX, -0.125, "positive, not -0.125"),
    ],
)
def test_refusals_say_why(changes: dict[str, object], size: Blocks, scale: float, words: str) -> None:
    problem = build(replace(SMALL, N=1, M=1, density=1.0, **changes))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        hopper_pairs.forward(*problem.tensors, size=size, **problem.keywords | {"scale": scale})


PLANTED = [
    pytest.param(bug, id=bug.name, marks=pytest.mark.slow if i % 4 else ())  # most: they take their time
    for i, bug in enumerate(BUGS)
]


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_seen(bug: Bug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_pairs, "hopper_pair_kernels", mutated(tmp_path, hopper_pair_kernels, bug.old, bug.new))
    problems = [
        (build(replace(SMALL, H=2, G=2, M=5, N=5, magnitude=2.0, **EVERYTHING | {"last": 3})), 2),
        (uneven(7, 2, 8, 20), 1),
        (uneven(0, 5, 0, 20), 1),
        (uneven(0, 12, 6, 20), 1),
        (build(replace(SMALL, query_rows=128, slots=128, M=9, first=1)), 1),
    ]
    with pytest.raises((Hazard, AssertionError), match=bug.complaint):
        for seed in range(4):
            monkeypatch.setattr(hopper_pairs, "launch", functools.partial(simulate, seed=100 * seed))
            for problem, frame_tiles in problems:
                check(problem, frame_tiles, SIX)
