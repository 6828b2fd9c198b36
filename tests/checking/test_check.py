"""`flexsparse.checking`: right code passes, and whatever is wrong with it is found and named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from oracle import places
from strategies import layouts
from torch import Tensor

import flexsparse as fs
from flexsparse.checking import Outcome, check, problems, run, wrapped
from flexsparse.checking.problems import Problem, membership

VSA = Problem(
    name="VSA",
    layout=fs.TileLayout(grid=(3, 5, 6), tile=(2, 4, 4), text_last=3),
    builder=fs.VSA(top_k=2),
    D=16,
    H=4,
    gated=True,
)
BSA = Problem(
    name="BSA", layout=fs.TileLayout(grid=(3, 5, 6), tile=(2, 4, 4)), builder=fs.BSA(kv_density=0.4), D=16, scale=2.0
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems that take no time."""
    monkeypatch.setattr(run, "problems", lambda: [VSA, BSA])


def of_gather(dtype: torch.dtype = torch.float32) -> list[Outcome]:
    return check("cpu", [dtype], ["gather"], compiled=False)


@given(layout=layouts())
@settings(max_examples=25)
def test_tiles_of_tokens_are_those_of_a_walk_over_the_grid(layout: fs.TileLayout) -> None:
    first = -(-layout.text_first // layout.slots)
    video = range(layout.text_first, layout.text_first + layout.num_tokens)
    tiles = [places(layout)[token].tile - first for token in video]
    member = membership(layout)
    assert member.shape == (layout.num_tiles, layout.seq_len) and int(member.sum()) == layout.num_tokens
    assert member[:, video.start : video.stop].argmax(0).tolist() == tiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_right_passes(small: None, dtype: torch.dtype) -> None:
    outcomes = of_gather(dtype)
    assert [x.wrong for x in outcomes] == [None] * 3 and all(x.passed and x.chosen for x in outcomes)
    vsa, bsa, model = outcomes
    assert list(vsa.errors) == ["out", "dq", "dk", "dv", "dgate"] and list(bsa.errors) == ["out", "dq", "dk", "dv"]
    assert list(model.errors) == ["out", "dx", "dparameters"] and model.backend == "gather"
    assert all(0 < error < 8 * torch.finfo(dtype).eps for error in vsa.errors.values())


def test_the_templates_are_checked_where_they_run(small: None) -> None:
    outcomes = check("cpu", [torch.float16], ["triton"], compiled=False)[:2]
    assert [(x.backend, x.wrong, len(x.errors)) for x in outcomes] == [("triton", None, 5), ("triton", None, 4)]


def test_without_a_backward_outputs_are_compared(small: None) -> None:
    for outcome in check("cpu", [torch.float32], ["flex"], compiled=False)[:2]:
        assert outcome.passed and not outcome.chosen and list(outcome.errors) == ["out"]


def test_all_problems_fit_what_the_templates_take() -> None:
    for problem in problems.problems():
        problem.builder.check(problem.layout, problem.layout)
        case = run.case_of(
            problem.inputs(torch.bfloat16, "cpu")["q"], problem.layout, gradients=True, lse=False, compiled=False
        )
        assert run.refusal("triton", dataclasses.replace(case, device="cuda")) is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_problems_are_right_here(dtype: torch.dtype) -> None:
    outcomes = check("cpu", [dtype], ["gather"])
    assert [x.wrong for x in outcomes] == [None] * (len(problems.problems()) + 2)


Change = Callable[[Tensor, Any], tuple[Tensor, Any]]


def damaged(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, 0, 0] = -x[0, 0, 0]
    return x


class LosesGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 1.001


def other_tiles(aux: Any) -> Any:
    """A tile less in the first row, of which nobody tells the counts."""
    bits = aux.selection.bits.clone()
    bits[0, 0, 0] = 0
    bits[0, 0, 0, 0] = 1
    return dataclasses.replace(aux, selection=dataclasses.replace(aux.selection, bits=bits))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda out, aux: (damaged(out), aux), "out has RMS error"),
        (lambda out, aux: (out + torch.where(out == out.max(), 4e-6, 0.0), aux), "out has maximal error"),
        (lambda out, aux: (torch.where(out == out.max(), torch.nan, out), aux), "out has values that are not finite"),
        (lambda out, aux: (LosesGradient.apply(out), aux), "dq has RMS error"),
        (lambda out, aux: (out, other_tiles(aux)), "the selection keeps 1 tiles in a row where 2 belong"),
        (lambda out, aux: (out.double(), aux), "out is torch.float64"),
    ],
)
def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, small: None, change: Change, said: str) -> None:
    own = run.sparse_attention

    def wrong(*args: Any, **options: Any) -> Any:
        return change(*own(*args, **options))

    monkeypatch.setattr(run, "sparse_attention", wrong)
    if "float64" in said:
        monkeypatch.setattr(run, "gradients", lambda out, leaves: {"out": out.detach()})
    outcome = of_gather()[0]
    assert not outcome.passed and said in str(outcome.wrong)


def test_tiles_that_should_not_have_been_selected_are_found(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    own = fs.VSA.select
    monkeypatch.setattr(
        run, "sparse_attention", _given(lambda problem, q, k: own(problem.builder, -q, k, problem.layout))
    )
    outcome = of_gather()[0]
    assert "the selection keeps a tile whose score is" in str(outcome.wrong) and "too low" in str(outcome.wrong)
    monkeypatch.setattr(
        run, "sparse_attention", _given(lambda problem, q, k: own(problem.builder, q, k, problem.layout))
    )
    assert of_gather()[0].passed


def _given(select: Callable[..., Any]) -> Callable[..., Any]:
    """Attention with tiles that somebody else selects."""

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: Any, builder: Any, gate: Tensor | None, **options: Any) -> Any:
        problem = VSA if gate is not None else BSA
        selection = select(problem, q.detach(), k.detach()) if gate is not None else builder
        out, aux = fs.sparse_attention(q, k, v, layout, selection, **options)
        if gate is not None:
            leaves = {"q": q, "k": k, "v": v}
            out = out + gate * problems.coarse(layout, leaves)
        return out, aux

    return attend


def test_what_raises_is_an_outcome(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Triton Error [CUDA]:\n out of resource")

    monkeypatch.setattr(run, "sparse_attention", broken)
    monkeypatch.setattr(wrapped, "step", broken)
    assert [x.wrong for x in of_gather()] == ["RuntimeError: Triton Error [CUDA]: out of resource"] * 3


@pytest.mark.parametrize(
    "change, said",
    [
        ({"builder": fs.VSA(top_k=4)}, "out has RMS error"),
        ({"dense_layers": [1]}, "1 of 2 attentions became sparse (blocks.1: "),
    ],
)
def test_a_wrapped_model_that_computes_something_else_is_found(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    own = wrapped.wrap

    def wrong(model: Any, builder: Any, **options: Any) -> Any:
        if options.get("attention") == "reference":
            return own(model, builder, **options)
        return own(model, **{"builder": builder, **options, **change})

    monkeypatch.setattr(wrapped, "wrap", wrong)
    _, found, _ = wrapped.compare("cpu", torch.float32, False)
    assert said in str(found)


def test_bits_that_change_from_run_to_run_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own, runs = wrapped.step, []

    def unsteady(*args: Any) -> dict[str, Tensor]:
        found = own(*args)
        runs.append(None)
        found["dx"] = found["dx"] * (1 + 2e-7 * len(runs))
        return found

    monkeypatch.setattr(wrapped, "step", unsteady)
    _, wrong, _ = wrapped.compare("cpu", torch.float32, False)
    assert wrong == "dx differs from one run to the next"


@pytest.mark.parametrize(
    "given_, said",
    [
        ({"device": "gpu"}, "device is 'gpu': give 'cpu'"),
        ({"device": "cuda:x"}, "device is 'cuda:x': give"),
        ({"device": "cuda:77"}, "device is 'cuda:77', and torch finds"),
        ({"dtypes": [torch.float64]}, "dtypes has torch.float64: give of torch.bfloat16"),
        ({"backends": ["reference"]}, "backends has 'reference': give of triton"),
    ],
)
def test_unknown_arguments_are_refused(given_: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(**{"device": "cpu", **given_})


def test_outcomes_are_told_as_they_are_found_and_can_be_written(small: None) -> None:
    told: list[Outcome] = []
    assert check("cpu", [torch.float32], compiled=False, told=told.append) == told
    assert [x.backend for x in told] == ["gather"] * 3  # what auto takes, and gather: once
    assert json.loads(json.dumps([dataclasses.asdict(x) for x in told]))[0]["problem"] == "VSA"
