"""Columns in their order and in pieces: against their twins, against float64 gradients, and their bound of memory."""

from dataclasses import replace

import pytest
import torch
from tolerance import assert_as_good
from torch import Tensor

from flexsparse.compile_passes.templates import columns
from flexsparse.compile_passes.templates.backward import backward, backward_reference
from flexsparse.compile_passes.templates.columns import PROGRAMS, SHORTEST, most_pieces, pieces, pieces_reference
from flexsparse.compile_passes.templates.forward import forward
from flexsparse.compile_passes.templates.launch import count_launches
from flexsparse.compile_passes.templates.walks import add_pieces, add_pieces_reference

from .attention_cases import MEMORY, Case, build, moved, oracle

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
NAMES = ("dq", "dk", "dv", "dcoarse", "dgate")
FP16 = torch.float16
POPULAR = Case(popular=True, N=20, M=6, density=0.1)
CASES = [
    replace(POPULAR, H=2),
    replace(POPULAR, B=2, H=2, G=1, N=10, D=16),
    replace(POPULAR, H=2, G=1, N=11, partial=True, kv_first=1, kv_last=2, first=2, last=3, gated=True),
    replace(POPULAR, dtype=FP16, query_rows=32, slots=64, D=64, partial=True),
    replace(POPULAR, dtype=FP16, N=22, M=3, query_rows=16, slots=256, D=40),
]
SIZES = [  # B, H, G, N, M, kv_first, kv_last, extra query tiles, most
    (1, 1, 1, 40, 1, 0, 0, 0, 3),
    (1, 1, 1, 43, 5, 0, 0, 0, 7),
    (2, 4, 2, 33, 70, 0, 0, 0, 30),
    (1, 2, 1, 30, 130, 2, 3, 4, 100),
    (1, 1, 1, 40, 1100, 0, 1, 0, 400),
    (2, 2, 2, 50, 3, 1, 0, 2, 0),
    (1, 1, 1, 5, 4, 0, 0, 0, 4),
]


def arguments(size: tuple[int, ...]) -> tuple[Tensor, dict[str, int]]:
    """Column lengths of which some are popular, some empty, many alike; and the keywords of `pieces`."""
    B, H, G, N, M, kv_first, kv_last, extra, most = size
    counts = (torch.rand(B, H, M).pow(8) * (N + 1)).int()
    counts[:, -1, M // 2 :] = 0
    counts[..., 0] = counts[..., M // 3] = N
    U = kv_first + M + kv_last
    return counts, {"group": H // G, "kv_first": kv_first, "U": U, "query_tiles": N + extra, "N": N, "most": most}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pieces_as_their_twin(size: tuple[int, ...]) -> None:
    counts, how = arguments(size)
    with count_launches() as launches:
        found = pieces(counts, **how)
    assert launches == ["_pieces"]
    assert found.dtype == torch.int32 and torch.equal(found, pieces_reference(counts, **how))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pieces_by_their_definition(size: tuple[int, ...]) -> None:
    counts, how = arguments(size)
    _, H, G, N, M, kv_first, _, extra, most = size
    found = pieces(counts, **how)
    for b, g in [(0, 0), (-1, -1)]:
        heads = counts[b].unflatten(0, (G, H // G))[g].sum(0)
        lengths = [N * (H // G) + extra * (H // G)] * how["U"]
        lengths[kv_first : kv_first + M] = (heads + extra * (H // G)).tolist()
        limit = max(-(-sum(lengths) // most), SHORTEST) if most else 1 << 30
        taken: dict[int, list[tuple[int, int]]] = {}
        for row, (u, begin, end, parts) in enumerate(found[b, g].tolist()):
            if u >= 0:
                taken.setdefault(u, []).append((begin, end))
                assert parts == 0 or row < most, "a split column's piece has no room"
                assert parts != 1 and (parts == 0) == (lengths[u] < 2 * limit)
                assert end - begin < 2 * limit
        assert list(taken) == sorted(range(how["U"]), key=lambda u: (-lengths[u], u)), (
            "the longest first, ties in order"
        )
        for u, parts_of_u in taken.items():
            ends = [0, *(end for _, end in parts_of_u)]
            assert [begin for begin, _ in parts_of_u] == ends[:-1] and ends[-1] == lengths[u]
            assert len({end - begin for begin, end in parts_of_u} - {0}) <= 2 and len(parts_of_u) in (
                1,
                lengths[u] // limit,
            )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_some_are_split(size: tuple[int, ...]) -> None:
    counts, how = arguments(size)
    found = pieces(counts, **how)[..., 3]
    assert bool((found[..., : size[-1]] > 1).any(-1).all()) == (size not in SIZES[-2:]), "in each head"


def gradients(case: Case, how: str | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Gradients by the kernels and by their twin, by name, and what was launched for dk and dv."""
    problem = build(case)
    problem = problem if how is None else moved(problem, how)
    out, lse = forward(*problem.tensors, **problem.keywords)
    q, k, v, *rest = problem.tensors
    given = (problem.grad_out, problem.grad_lse, q, k, v, out, lse, *rest)
    with count_launches() as launches:
        found = backward(*given, **problem.keywords)
    reference = backward_reference(*given, **problem.keywords)
    return dict(zip(NAMES, found)), dict(zip(NAMES, reference)), launches[-2:]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_of_split_columns(case: Case) -> None:
    found, reference, launches = gradients(case)
    assert launches == ["_dkdv", "_add_pieces"]
    torch.manual_seed(0)
    problem = build(case)
    expected = oracle(problem, with_lse_gradient=True).values
    for name in ("dq", "dk", "dv"):
        assert_as_good(found[name], reference[name], expected[name], name)
    if not (case.kv_first or case.partial or case.first):
        unseen = slice(2 * case.slots, 3 * case.slots)
        assert not problem.keep[..., 2].any() and not found["dk"][:, :, unseen].any()


def test_split_columns_at_any_strides_and_the_same_bits_again() -> None:
    first, _, _ = gradients(CASES[2])
    for how in MEMORY[1:2]:
        torch.manual_seed(0)
        again, _, _ = gradients(CASES[2], how)
        assert all(torch.equal(first[name], again[name]) for name in NAMES), how


def test_split_or_whole_differ_by_roundings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    split, _, launches = gradients(CASES[0])
    assert launches[-1] == "_add_pieces"
    torch.manual_seed(0)
    monkeypatch.setattr(columns, "PROGRAMS", 0)
    whole, _, launches = gradients(CASES[0])
    assert launches[-1] == "_dkdv"
    assert not torch.equal(split["dk"], whole["dk"]), "nothing was split"
    for name in ("dq", "dk", "dv"):
        torch.testing.assert_close(split[name], whole[name])


@pytest.mark.parametrize("slots", [16, 64])
def test_sums_of_pieces_as_their_twin(slots: int) -> None:
    B, G, U, most, D = 2, 2, 5, 4, 24
    workspace = torch.randn(2, B, G, most, slots, D)
    work = torch.zeros(B, G, U + most, 4, dtype=torch.int32)
    work[..., 0] = -1
    rows = [[3, 0, 9, 2], [3, 9, 18, 2], [1, 0, 16, 2], [1, 16, 32, 2], [0, 0, 5, 0], [2, 0, 4, 0], [4, 0, 0, 0]]
    work[0, 0, :7], work[1, 1, :5] = torch.tensor(rows), torch.tensor([rows[0], rows[1], *rows[4:]])
    dk, dv = torch.full((2, B, G, U * slots, D), 7.0, dtype=FP16).unbind()
    expected = dk.clone(), dv.clone()
    add_pieces_reference(work, workspace, *expected, 0.3)
    add_pieces(work, workspace, dk, dv, 0.3)
    assert torch.equal(dk, expected[0]) and torch.equal(dv, expected[1])
    assert bool((dk[0, 1] == 7).all()) and not bool((dk[1, 1, 3 * slots : 4 * slots] == 7).any())


def test_splitting_where_it_pays() -> None:
    def most(heads: int, tiles: int, kept: int, halves: int = 1) -> int:
        return most_pieces(heads, halves, tiles, tiles * kept, tiles)

    assert most(40, 1200, 120) == 0, "the last head of 40 is a small part of the work"
    assert most(5, 1200, 120) > 0, "a column that all keep takes half as long as all the work"
    assert most(1, 64, 8) >= 64, "fewer columns than programs"
    assert most(1, 1200, 1200) == 0, "columns are alike where all is kept, and fill the machine"
    assert most_pieces(1, 1, 0, 0, 30) == 0 and most_pieces(1, 1, 8, 0, 30) == 0
    assert most_pieces(0, 1, 10, 100, 100) == 0  # an empty batch


def test_the_bound_of_memory() -> None:
    draw = torch.Generator().manual_seed(1)
    split = 0
    for _ in range(2000):
        heads, halves, U, tiles, kept = (int(2 ** (torch.rand((), generator=draw) * n)) for n in (7, 2.99, 12, 12, 10))
        most = most_pieces(heads, halves, U, tiles * min(kept, U), tiles)
        split += most > 0
        assert heads * most <= max(heads * U / 2, 2 * PROGRAMS / halves)
    assert split > 300
