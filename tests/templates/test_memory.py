"""Rows at any strides: the same results as from contiguous tensors, in the inputs' memory formats, without a copy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexsparse.compile_passes.templates import backward as backward_module
from flexsparse.compile_passes.templates import forward as forward_module
from flexsparse.compile_passes.templates import hopper_forward, hopper_pairs, walks
from flexsparse.compile_passes.templates.rows import strides

from .attention_cases import MEMORY, Case, Problem, build, in_memory, moved
from .gluon_simulator import simulate
from .test_backward import CASES
from .test_hopper_forward import ONE, SMALL, TWO

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
GROUPED = Case(B=2, H=4, G=2, N=2, M=3, kv_first=1, last=1, partial=True, gated=True)
LIKE = {"out": "q", "dq": "q", "dk": "k", "dv": "v", "dgate": "gate"}
SLOW = pytest.mark.slow
READ = ("q", "k", "v", "gate", "grad_out")


def run(problem: Problem) -> dict[str, Tensor]:
    """Results and gradients by name."""
    out, lse = forward_module.forward(*problem.tensors, **problem.keywords)
    q, k, v, *rest = problem.tensors
    found = backward_module.backward(problem.grad_out, problem.grad_lse, q, k, v, out, lse, *rest, **problem.keywords)
    names = ("dq", "dk", "dv", "dcoarse", "dgate")
    return {"out": out, "lse": lse, **{name: x for name, x in zip(names, found) if x is not None}}


def check(found: dict[str, Tensor], problem: Problem, expected: dict[str, Tensor]) -> None:
    """The same bits, in the memory formats of what they belong to."""
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name
        same = getattr(problem, LIKE[name]) if name in LIKE else x.contiguous()
        assert x.stride() == torch.empty_like(same).stride(), name


@pytest.mark.parametrize(
    ("case", "how"),
    [
        *(pytest.param(case, MEMORY[i % 2], id=case.name, marks=SLOW if i % 3 else ()) for i, case in enumerate(CASES)),
        *(pytest.param(GROUPED, how, id=f"grouped, {how}", marks=SLOW if i else ()) for i, how in enumerate(MEMORY)),
    ],
)
def test_any_strides(case: Case, how: str) -> None:
    problem = build(case)
    there = moved(problem, how)
    check(run(there), there, run(problem))


@pytest.mark.parametrize("turn", [0, 2])
def test_each_array_has_strides_of_its_own(turn: int) -> None:
    problem = build(GROUPED)
    expected = run(problem)
    for i, name in enumerate(READ):  # five arrays, four formats and contiguous: no two have the same strides
        x = getattr(problem, name)
        how = [*MEMORY, None][(i + turn) % len(READ)]
        setattr(problem, name, x if how is None else in_memory(x, how))
    check(run(problem), problem, expected)


@pytest.mark.parametrize("how", ["transposed", "strided", "expanded"])
def test_counts_at_any_strides(how: str) -> None:
    """The forward read past them, where the backward made them contiguous: gradients of another output."""
    problem = build(GROUPED)
    of = [i for i, x in enumerate(problem.tensors) if x is not None and x.dtype == torch.int32][-1]
    counts = problem.tensors[of]
    if how == "expanded":
        counts = counts.amin(0, keepdim=True).expand_as(counts)  # what lies past a count is NaN
    results = []
    for there in (
        counts.contiguous(),
        {"transposed": counts.t().contiguous().t(), "strided": torch.stack([counts, counts + 1], -1)[..., 0]}.get(
            how, counts
        ),
    ):
        given = [*problem.tensors[:of], there, *problem.tensors[of + 1 :]]
        out, lse = forward_module.forward(*given, **problem.keywords)
        q, k, v, *rest = given
        results.append(
            [out, lse, *backward_module.backward(problem.grad_out, None, q, k, v, out, lse, *rest, **problem.keywords)]
        )
    assert all(x is y or torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_slices_of_one_tensor() -> None:
    problem = build(Case(B=2, H=2, G=2, N=3, M=3))
    expected = run(problem)
    fused = torch.stack([x.transpose(1, 2) for x in (problem.q, problem.k, problem.v)], 2)
    problem.q, problem.k, problem.v = (x.transpose(1, 2) for x in fused.unbind(2))
    check(run(problem), problem, expected)


def test_an_expanded_batch() -> None:
    problem = build(Case(B=2, H=2, G=2, gated=True))
    for name in ("q", "k", "v", "gate"):
        setattr(problem, name, getattr(problem, name)[:1].expand(2, -1, -1, -1))
    found = run(problem)
    for name in ("q", "k", "v", "gate"):
        setattr(problem, name, getattr(problem, name).contiguous())
    check(found, problem, run(problem))


def test_values_of_a_row_apart_are_copied() -> None:
    problem = build(GROUPED)
    expected = run(problem)
    for name in READ:
        setattr(problem, name, getattr(problem, name).transpose(2, 3).contiguous().transpose(2, 3))
    for name, x in run(problem).items():
        assert torch.equal(x, expected[name]) and x.is_contiguous(), name


def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = moved(build(GROUPED), "one of a fused three")
    owners = {name: getattr(problem, name) for name in READ}
    read: dict[str, set[str]] = {}
    launch = forward_module.launch

    def watched(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        for name, x in zip(kernel.arg_names, args):
            if name in owners and x is not None:
                assert x.data_ptr() == owners[name].data_ptr() and x.stride() == owners[name].stride()
                read.setdefault(kernel.__name__, set()).add(name)
        launch(kernel, grid, *args, **meta)

    for module in (forward_module, backward_module, walks):
        monkeypatch.setattr(module, "launch", watched)
    run(problem)
    assert {name: read[name] for name in ("_forward", "_delta", "_dq", "_dkdv")} == {
        "_forward": {"q", "k", "v", "gate"},
        "_delta": {"grad_out", "gate"},
        "_dq": {"q", "k", "v", "grad_out"},
        "_dkdv": {"q", "k", "v", "grad_out"},
    }


@pytest.mark.parametrize("how", [None, *MEMORY])
def test_an_output_whose_heads_lie_side_by_side(how: str | None) -> None:
    problem = build(GROUPED)
    expected = forward_module.forward(*problem.tensors, **problem.keywords)
    problem = problem if how is None else moved(problem, how)
    found = forward_module.forward(*problem.tensors, **problem.keywords, token_major=True)
    assert found[0].transpose(1, 2).is_contiguous() and not found[0].is_contiguous()
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


def test_alignment_and_absent_arrays() -> None:
    x = torch.empty(2, 3, 4, 40)
    assert strides(q=x, gate=None) == {
        "ALIGN": 8, "q_b": 60, "q_h": 20, "q_ROW": 40, "gate_b": 0, "gate_h": 0, "gate_ROW": 0
    }  # fmt: skip
    assert strides(q=x[..., :37])["ALIGN"] == 8 and strides(q=in_memory(x, "odd rows"))["ALIGN"] == 1
    of_one = torch.empty(64).as_strided((1, 1, 2, 16), (3, 5, 16, 1))
    assert strides(q=of_one) == {"ALIGN": 16, "q_b": 0, "q_h": 0, "q_ROW": 16}


def test_what_cannot_be_counted_is_refused() -> None:
    whole = torch.empty_strided((2, 1, 16, 16), (1 << 35, 16, 16, 1), device="meta")
    far = torch.empty_strided((1, 1, 16, 16), (16, 16, 1 << 23, 1), device="meta")
    for x in (whole, far):
        with pytest.raises(ValueError, match=r"k spans more memory than the kernel counts.*make it contiguous"):
            strides(k=x)
    assert strides(k=torch.empty_strided((2, 1, 16, 16), ((1 << 35) - 256, 16, 16, 1), device="meta"))["ALIGN"] == 16


class TestHopper:
    """The Hopper forward, simulated."""

    @pytest.fixture(autouse=True)
    def bases(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """What the kernel is given, by name; kernels that only a GPU runs go to the simulator."""
        found: dict[str, Any] = {}

        def watched(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
            found.update(zip(kernel.arg_names, args))
            simulate(kernel, grid, *args, **meta)

        monkeypatch.setattr(hopper_forward, "launch", watched)
        return found

    def run(self, problem: Problem, size: Any = ONE) -> tuple[Tensor, Tensor]:
        return hopper_forward.forward(*problem.tensors, size=size, **problem.keywords)

    def copied(self, problem: Problem, bases: dict[str, Any]) -> set[str]:
        given = {"q": "queries", "k": "keys", "v": "values", "gate": "gates"}
        return {name for name, its in given.items() if bases[its].base.data_ptr() != getattr(problem, name).data_ptr()}

    @pytest.mark.parametrize("how", [how for how in MEMORY if how != "odd rows"])
    @pytest.mark.parametrize("size", [ONE, TWO], ids=["one stage", "two stages"])
    def test_any_strides_without_a_copy(self, how: str, size: Any, bases: dict[str, Any]) -> None:
        problem = build(replace(SMALL, B=2, H=4, G=2, N=2, kv_first=1, last=1, partial=True, gated=True))
        expected = dict(zip(("out", "lse"), self.run(problem, size)))
        there = moved(problem, how)
        check(dict(zip(("out", "lse"), self.run(there, size))), there, expected)
        assert not self.copied(there, bases)

    @pytest.mark.parametrize("kernel", [hopper_forward, hopper_pairs], ids=["one", "pairs"])
    def test_an_output_whose_heads_lie_side_by_side(self, kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernel, "launch", simulate)
        problem = build(replace(SMALL, B=2, H=2, N=2, gated=True))
        size = ONE if kernel is hopper_forward else hopper_pairs.sizes(SMALL.D, SMALL.query_rows, SMALL.slots)[0]
        plain, found = (
            kernel.forward(*problem.tensors, size=size, **problem.keywords, token_major=each) for each in (False, True)
        )
        assert found[0].transpose(1, 2).is_contiguous() and not found[0].is_contiguous()
        assert all(torch.equal(mine, other) for mine, other in zip(found, plain, strict=True))

    def test_what_the_copy_engine_does_not_take_is_copied(self, bases: dict[str, Any]) -> None:
        problem = build(replace(SMALL, B=2, gated=True))
        problem.k = problem.k[:1].expand(2, -1, -1, -1)
        expected = dict(zip(("out", "lse"), self.run(problem)))
        assert self.copied(problem, bases) == {"k"}, "a stride of 0"
        problem.k = problem.k.contiguous()
        problem.q = in_memory(problem.q, "odd rows")
        shifted = problem.v.new_empty(problem.v.numel() + 1)[1:].view(problem.v.shape)
        problem.v = shifted.copy_(problem.v)
        check(dict(zip(("out", "lse"), self.run(problem))), problem, expected)
        assert self.copied(problem, bases) == {"q", "v"}, "odd strides and an odd address"

    def test_strides_over_one_sample_and_one_head_may_be_any(self, bases: dict[str, Any]) -> None:
        problem = build(replace(SMALL, gated=True))
        expected = dict(zip(("out", "lse"), self.run(problem)))
        for name in ("q", "k", "v", "gate"):
            x = getattr(problem, name)
            setattr(problem, name, x.as_strided(x.shape, (3, 5, *x.stride()[2:])))
        found = dict(zip(("out", "lse"), self.run(problem)))
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert not self.copied(problem, bases)
