"""The block stack in the suite: the model that is timed is the one that is checked, its gates open, its gradients too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from suite_helpers import case, of, run

import flexsparse as fs
from bench.suite import gate, model, model_check
from bench.suite.contender import Contender, Expected
from bench.suite.device import Host

BOTH = ("flexsparse", "dense_compiled")
SHAPE = model.Shape(heads=2, head_dim=16, ffn=64, layers=2, channels=4, text_dim=16, text_tokens=8)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "shape_of", lambda case: SHAPE)


def change_timed(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    """Change each model that is timed just before its steps are made."""
    steps = model.steps

    def changed(timed: Any, given: Any, part: str) -> Any:
        with torch.no_grad():
            change(timed)
        return steps(timed, given, part)

    monkeypatch.setattr(model, "steps", changed)


def test_dense_against_sparse(tmp_path: Path) -> None:
    code, result = run(tmp_path, case("model", "model_step", layers=2))
    for impl in BOTH:
        forward, training = (of(result, "model_step", impl, part) for part in ("forward", "training"))
        assert forward["ms"] and training["ms"] and set(forward["error"]) == {"out"}
        gates = [name for name in training["error"] if "to_gate_compress" in name]
        assert len(training["error"]) == (14 if impl == "flexsparse" else 12) and len(gates) == 2 * (
            impl == "flexsparse"
        )
        assert max(training["error"].values()) < 1e-4
    assert code == 0


def test_the_compiled_blocks_are_what_is_checked(tmp_path: Path, fresh_dynamo: None) -> None:
    code, result = run(tmp_path, case("model", "model_step", layers=2), device=Host(modes=("compiled",)))
    found = [of(result, "model_step", impl, part) for impl in BOTH for part in ("forward", "training")]
    assert code == 0 and all(row["ms"] and row["config"]["compile"] for row in found)
    assert max(max(row["error"].values()) for row in found) < 1e-4


def test_models_of_nan_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_timed(monkeypatch, lambda timed: [x.fill_(float("nan")) for x in timed.parameters()])
    code, result = run(tmp_path, case("model", "model_step", layers=2))
    for impl in BOTH:
        for part in ("forward", "training"):
            row = of(result, "model_step", impl, part)
            assert row["ms"] is None and not row["checked"] and "not finite" in row["reason"]
    assert code == 1


@pytest.mark.parametrize("what", ["a weight", "the gates", "a gradient"])
def test_what_is_wrong_with_the_timed_model_shows(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(timed: Any) -> None:
        attention = timed.blocks[1].attn1
        if what == "a weight":
            attention.to_v.weight *= 1.1
        elif what == "the gates" and hasattr(attention, "to_gate_compress"):
            attention.to_gate_compress.weight.zero_()
        elif what == "a gradient":
            attention.to_q.weight.register_hook(lambda grad: grad * 1.1)

    change_timed(monkeypatch, change)
    code, result = run(tmp_path, case("model", "model_step", layers=2))
    for impl in BOTH:
        forward, training = (of(result, "model_step", impl, part) for part in ("forward", "training"))
        right = what == "the gates" and impl == "dense_compiled"  # which has none
        assert bool(training["ms"]) == right and bool(forward["ms"]) == (right or what == "a gradient")
        if what == "a gradient":
            assert "d blocks.1.attn1.to_q.weight has relative error" in training["reason"]
    assert code == 1


def test_the_twin_is_of_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled, the same weights and open gates; what is timed computes by the device's own backend."""
    seen: list[dict[str, Any]] = []
    wrap = fs.wrap
    monkeypatch.setattr(model.fs, "wrap", lambda *args, **options: seen.append(options) or wrap(*args, **options))
    one, host = case("model", "model_step", layers=2), Host()
    timed = next(x for x in model.contenders(one, host) if x.impl == "flexsparse")
    assert timed.expected is not None and set(timed.expected().exact) == {"out"}
    assert [options["attention"] for options in seen] == ["gather", "reference", "reference"]  # two precisions
    twin = model.twin_of(one, host, SHAPE, "flexsparse")(torch.float64)
    gates = [x for name, x in twin.named_parameters() if "to_gate_compress.weight" in name]
    assert len(gates) == 2 and all(x.dtype == torch.float64 and bool(x.abs().min() > 0) for x in gates)
    assert model_check.OTHER["triton"] == "gather"


@pytest.mark.parametrize("what", ["fused", "lowered", "sparse"])
def test_attention_that_took_another_way_is_not_timed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = model.results

    def on_a_gpu(device: Host, impl: str, timed: Any, given: Any, part: str) -> Any:
        call = SimpleNamespace(**{"fused": True, "lowered": True, "sparse": True, what: False})
        monkeypatch.setattr(model.fs, "report", lambda timed: SimpleNamespace(calls=[call]))
        return found(Host(modes=("compiled",)), impl, timed, given, part)

    monkeypatch.setattr(model, "results", on_a_gpu)
    for timed in model.contenders(case("model", "model_step", layers=2), Host()):
        if timed.impl == "flexsparse":
            with pytest.raises(RuntimeError, match="not every self-attention was fused and lowered"):
                timed.results()
        else:
            assert timed.results()


def test_a_gradient_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = model.make(SHAPE, torch.device("cpu"), torch.float32)
    stack.blocks[0].attn1.to_q.weight.requires_grad_(False)
    given = model.inputs(SHAPE, (4, 8, 8), torch.device("cpu"), torch.float32)
    with pytest.raises(RuntimeError, match=r"1 of \d+ gradients are missing or not finite: blocks.0.attn1.to_q.weight"):
        model_check.step(stack, given)


@pytest.mark.parametrize(
    ("own", "reference", "right"),
    [
        (1.019, 1.0, True),
        (1.03, 1.0, False),
        (1.03, 0.98, True),
        (1.05, 0.98, False),
        (0.0, 0.0, False),
        (1.03, float("nan"), False),
    ],
)
def test_twice_the_error_of_a_reference_is_allowed(own: float, reference: float, right: bool) -> None:
    """Where that is more than others' kernels may have, and less than what is plainly wrong."""
    exact = torch.ones(64, dtype=torch.float64)
    truth = Expected(take=lambda x: x, exact={"x": exact}, reference={"x": (exact * reference).float()})
    results = {"x": (exact * own).bfloat16()}
    one = Contender(impl="a", op="b", run=lambda turn: None, results=lambda: results, expected=lambda: truth)
    assert (gate.verdict(one)[1] is None) == right
