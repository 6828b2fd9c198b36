"""The CPU benchmark on tiny cases: the file's format, and that nothing wrong is ever timed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import breakdown, cases, check, cpu, measure, memory, problem
from bench.cases import Case, Entry, attention

TINY = {"grid": (4, 8, 8), "H": 2, "G": 1, "D": 16}
FORWARD = Case(name="f", kind="forward", entries=(*attention("forward", "gather", target=5.0), *cases.PARTS), **TINY)
TRAINING = Case(name="t", kind="training", entries=attention("training", "gather"), **TINY)
PARTIAL = Case(
    name="p", kind="training", entries=attention("training", "gather"), grid=(3, 5, 6), tile="auto", H=2, G=2, D=16
)
BSA = Case(name="b", kind="training", method="bsa", entries=attention("training", "gather"), **TINY)
BFLOAT16 = Case(name="h", kind="forward", dtype="bfloat16", entries=attention("forward", "gather"), **TINY)
MEMORY = Case(name="m", kind="memory", entries=(Entry(op="peak_memory", impl="flexsparse_gather"),), **TINY)

TYPES: dict[str, Any] = {
    **dict.fromkeys(("case", "op", "impl", "dtype"), str),
    **dict.fromkeys(("B", "H", "G", "S", "D", "threads"), int),
    **dict.fromkeys(("grid", "tile", "checked_on"), list),
    **dict.fromkeys(("part", "method", "reason"), (str, type(None))),
    **dict.fromkeys(("density", "ratio_to_dense", "target"), (float, int, type(None))),
    **dict.fromkeys(("ms", "dense_ms", "mib", "dense_mib"), (list, type(None))),
    "error": dict,
    "checked": bool,
}
HEADER = {"cpu", "threads", "gpu", "driver", "cudnn", "torch", "triton", "python", "flexsparse"}
HEADER |= {"git_revision", "git_dirty", "date", "repeats"}


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *chosen: Case, **options: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(cases, "standard", lambda: list(chosen))
    monkeypatch.setattr(cases, "further", list)
    monkeypatch.setattr(cpu, "standard", lambda: list(chosen))
    more = [f"--{name}" for name in options]
    code = cpu.main(["--quick", "--repeats", "2", "--out", str(out / "cpu.json"), *more])
    return code, json.loads((out / "cpu.json").read_text())


def test_a_run_writes_rows_of_the_format(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, result = run(monkeypatch, tmp_path, FORWARD, TRAINING, PARTIAL, BSA, BFLOAT16)
    assert code == 0
    assert set(result["header"]) >= HEADER
    assert result["header"]["gpu"] is result["header"]["driver"] is result["header"]["cudnn"] is None
    assert len(result["rows"]) == 2 + len(cases.PARTS) + 4 * 2
    for row in result["rows"]:
        assert set(row) == set(TYPES)
        for name, kind in TYPES.items():
            assert isinstance(row[name], kind), (name, row[name])
        assert row["op"] in cases.OPS and row["impl"] in cases.IMPLS
        assert row["checked"] and row["reason"] is None and row["checked_on"]
        assert len(row["ms"]) == len(row["dense_ms"]) == 2 and row["ratio_to_dense"] > 0
        names = {"attention_forward": {"out"}, "attention_training": {"out", "dq", "dk", "dv"}}
        assert row["op"] not in names or set(row["error"]) == names[row["op"]]
    by_case = {row["case"]: row for row in result["rows"] if row["impl"] == "flexsparse_gather" and not row["part"]}
    assert by_case["f"]["density"] == 0.25  # ceil(0.125 * 4 tiles) = 1 of 4
    assert by_case["b"]["density"] < 0.3 and by_case["b"]["method"] == "bsa"


def test_both_checks_are_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, result = run(monkeypatch, tmp_path, TRAINING)
    assert all(len(row["checked_on"]) == 2 for row in result["rows"])
    room = iter((True, False))
    monkeypatch.setattr(check, "affordable", lambda length, heads: next(room))
    _, result = run(monkeypatch, tmp_path, TRAINING)
    assert all(row["checked_on"] == ["a small problem"] for row in result["rows"])


def wrong_everywhere(out: torch.Tensor) -> torch.Tensor:
    return out * (1 + 1e-4)


def wrong_at_one_token(out: torch.Tensor) -> torch.Tensor:
    return torch.cat([out[:, :, :1] * 1.001, out[:, :, 1:]], 2)


@pytest.mark.parametrize("spoil", (wrong_everywhere, wrong_at_one_token, lambda out: out * 0, lambda out: out / 0))
@pytest.mark.parametrize("case", (FORWARD, pytest.param(TRAINING, marks=pytest.mark.slow)))
def test_a_wrong_result_is_never_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: Case, spoil: Any) -> None:
    right = problem.ATTENTION["flexsparse_gather"]
    monkeypatch.setitem(problem.ATTENTION, "flexsparse_gather", lambda *a: spoil(right(*a)))
    code, result = run(monkeypatch, tmp_path, case)
    assert code == 1
    dense, wrong, *rest = result["rows"]
    assert wrong["checked"] is False and wrong["reason"].startswith("out has ")
    assert wrong["ms"] is wrong["dense_ms"] is wrong["ratio_to_dense"] is None
    assert dense["checked"] and all(row["checked"] and row["ms"] for row in rest)


def test_a_wrong_gradient_is_never_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = problem.ATTENTION["flexsparse_gather"]

    def detached(q: Any, k: Any, *rest: Any) -> Any:
        return right(q, k, *rest) + 1e-3 * (k.sum() - k.sum().detach())

    monkeypatch.setitem(problem.ATTENTION, "flexsparse_gather", detached)
    code, result = run(monkeypatch, tmp_path, TRAINING)
    assert code == 1 and result["rows"][1]["ms"] is None
    assert result["rows"][1]["reason"].startswith("dk has ")


def test_an_error_is_a_failed_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("no such thing\nmore")

    monkeypatch.setitem(problem.ATTENTION, "flexsparse_gather", fail)
    code, result = run(monkeypatch, tmp_path, TRAINING)
    assert code == 1 and result["rows"][0]["ms"] and result["rows"][1]["ms"] is None
    assert result["rows"][1]["reason"] == "raised ValueError: no such thing, on a small problem"


def test_without_a_dense_result_nothing_is_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(problem.ATTENTION, "dense_sdpa", lambda q, *_: q)
    code, result = run(monkeypatch, tmp_path, FORWARD)
    assert code == 1
    assert not any(row["checked"] or row["ms"] for row in result["rows"])


def test_a_wrong_layout_or_selection_is_never_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "naive_tiles", lambda x, layout: layout.to_tiles(x).flip(-2))
    code, result = run(monkeypatch, tmp_path, FORWARD)
    assert code == 1
    parts = [row for row in result["rows"] if row["part"]]
    assert parts and all(row["checked"] is False and row["ms"] is None for row in parts)


@pytest.mark.slow
def test_peak_memory_is_measured_in_fresh_processes() -> None:
    hog = torch.ones(2**26)  # 256 MiB of this process must not show in the figure
    small, large = (
        memory.peak_memory(Case(name="m", kind="memory", entries=(), **size), "dense_sdpa", 1, 1)[0]
        for size in ({**TINY, "tile": (2, 2, 2)}, {"grid": (8, 16, 16), "tile": (2, 2, 2), "H": 16, "G": 16, "D": 256})
    )
    assert hog.sum() and small < 8
    assert 64 < large < 256  # out and three gradients of 32 MiB, and what the backward needs


@pytest.mark.slow
def test_a_failing_memory_process_says_why_and_stops_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(case: Case, impl: str, threads: int) -> list[float]:
        if impl != "dense_sdpa":
            raise RuntimeError("it failed:\nKeyError: 1")
        return [30.0, 31.0]

    with pytest.raises(RuntimeError, match="no_such_impl"):
        memory.peak_memory(MEMORY, "no_such_impl", 1, 1)
    monkeypatch.setattr(measure, "peak_memory", fail)
    code, result = run(monkeypatch, tmp_path, MEMORY, TRAINING)
    dense, failed, *rest = result["rows"]
    assert code == 1 and dense["mib"] == dense["dense_mib"] == [30.0, 31.0]
    assert failed["mib"] is None and failed["reason"] == "KeyError: 1"
    assert len(rest) == 2 and all(row["checked"] for row in rest)


def test_the_breakdown_adds_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = Case(name="forward", kind="forward", entries=(), grid=(4, 8, 8), H=2, G=2, D=16)
    code, result = run(monkeypatch, tmp_path, case, profile="")
    (part,) = result["profile"]
    assert code == 0 and set(part["pieces_ms"]) == set(breakdown.PIECES)
    assert part["other_ms"] == pytest.approx(part["forward_ms"] - sum(part["pieces_ms"].values()), abs=1e-3)


def test_a_breakdown_of_a_case_that_it_does_not_stand_for_is_refused() -> None:
    with pytest.raises(ValueError, match="needs VSA"):
        breakdown.breakdown(BSA, 1, 1)


def test_cases_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    names = [case.name for case in cases.choose(False, [])]
    assert len(names) == len(set(names))
    assert [case.name for case in cases.choose(True, ["d64"])] == ["memory-d64", "forward-d64", "training-d64"]
    assert not any(case.extra for case in cases.choose(True, []))
    assert cpu.main(["--only", "nothing"]) == 2
    assert "matches no case" in capsys.readouterr().err
    assert cpu.main(["--list", "--only", "bsa"]) == 0
    assert capsys.readouterr().out == "bsa-training\n"


def test_the_standard_problem_is_the_one_that_has_targets() -> None:
    for case in cases.standard():
        assert (case.S, case.H, case.layout.slots, case.dtype, case.threads) == (8192, 4, 64, "float32", None)
        assert case.D in (64, 128)
        assert problem.make(Case(**{**vars(case), "entries": ()}), case.small_grid).layout.num_tiles == 18
