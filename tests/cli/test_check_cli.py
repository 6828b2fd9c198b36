"""`flexsparse check` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
from typer.testing import CliRunner

import flexsparse as fs
from flexsparse.checking import run
from flexsparse.checking.problems import Problem
from flexsparse.cli.app import app
from flexsparse.training.environment import versions

SMALL = Problem(name="small", layout=fs.TileLayout(grid=(3, 5, 6)), builder=fs.VSA(top_k=2), D=16, gated=True)
QUICK = ("--device", "cpu", "--dtype", "float32", "--backend", "gather", "--no-compile")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "problems", lambda: [SMALL])


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["check", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_a_line_for_each_outcome_and_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "check.json"
    result = invoke(*QUICK, "--json", str(path))
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    torch_version = versions()["torch"]  # without +cpu or +cu130
    assert f"torch {torch_version}, triton" in lines[0]
    assert lines[2].split()[:4] == ["ok", "float32", "gather", "small"] and "dgate" in lines[2]
    assert lines[3].startswith("ok") and "wrapped model, uncompiled, training" in lines[3]
    assert lines[4] == "2 of 2 right"
    assert lines[5] == "The Triton templates were not checked: they run on CUDA."
    found = json.loads(path.read_text())
    assert [x["problem"] for x in found["outcomes"]] == ["small", "wrapped model, uncompiled, training"]
    assert found["outcomes"][0]["errors"]["dq"] > 0 and found["versions"]["torch"] == torch_version


def test_exit_code_where_something_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    own = run.sparse_attention

    def wrong(*args: Any, **options: Any) -> Any:
        out, aux = own(*args, **options)
        return out * 1.01, aux

    monkeypatch.setattr(run, "sparse_attention", wrong)
    result = invoke(*QUICK)
    assert result.exit_code == 1
    assert "WRONG   float32   gather  small" in result.output and "out has RMS error" in result.output
    assert "1 of 2 right, 1 WRONG" in result.output


def test_what_cannot_run_here_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrapped model passes, by a backend of its own choice; that says nothing of the named one."""
    own = run.refusal
    monkeypatch.setattr(run, "refusal", lambda name, case: "it runs elsewhere" if name == "flex" else own(name, case))
    result = invoke("--device", "cpu", "--dtype", "float32", "--backend", "flex,gather", "--no-compile")
    assert result.exit_code == 1 and "2 of 3 right, 1 cannot run here" in result.output
    assert "cannot  float32   flex    small" in result.output and "it runs elsewhere" in result.output
    assert "--backend flex passed no attention here" in result.output
    assert "--backend gather" not in result.output
    assert invoke(*QUICK).exit_code == 0


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--device", "gpu"), "--device is 'gpu': give 'cpu', 'cuda' or 'cuda:1'"),
        (("--device", "cuda:99"), "--device is 'cuda:99', and torch finds"),
        (("--dtype", "fp8"), "--dtype has 'fp8': give of bfloat16, float16, float32"),
        (("--backend", "auto"), "--backend has 'auto': give of triton, gather, flex"),
    ],
)
def test_bad_options_are_one_line(arguments: tuple[str, ...], said: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert said in result.stderr and not result.stdout


def test_a_file_that_cannot_be_written_costs_nothing_that_was_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = invoke(*QUICK, "--json", str(tmp_path / "file" / "check.json"))
    assert result.exit_code == 2 and "the outcomes are above" in result.stderr and "ok " in result.stdout
