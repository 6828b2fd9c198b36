"""The GPU suite with the CPU in the GPU's place: rows, deadlines, crashes, exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from suite_helpers import BASELINES, Recorder, case, of, run

import flexsparse as fs
from bench import gpu_suite
from bench.suite import (
    cases,
    checks,
    data,
    overlap,
    parts,
    rows,
    supervise,
    timing,
)
from bench.suite.contender import Contender, Missing
from bench.suite.device import Host
from bench.suite.runner import Budget, Run

FIELDS = ["op", "impl", "B", "H", "G", "S", "D", "tile", "density", "dtype", "ms", "tflops", "error", "checked"]
HEADER = ["gpu", "driver", "torch", "triton", "cudnn", "git", "date"]


def test_fine_rows(tmp_path: Path) -> None:
    code, result = run(tmp_path, case("forward", "fine_forward"), case("backward", "fine_backward"))
    assert code == 0
    assert all(name in result["header"] for name in HEADER) and result["header"]["suite"] == "gpu"
    assert all(name in row for row in result["rows"] for name in FIELDS)
    by_case = {
        name: {"header": {}, "rows": [row for row in result["rows"] if row["case"] == name]}
        for name in ("forward", "backward")
    }
    ours, peer = (of(by_case["forward"], "fine_forward", impl) for impl in ("flexsparse", "dense_cudnn"))
    layout = fs.TileLayout(grid=(4, 8, 8))
    assert (ours["B"], ours["H"], ours["G"], ours["S"], ours["D"], ours["tile"]) == (1, 2, 2, 256, 16, [4, 4, 4])
    kept = 2  # ceil(0.4 * 4 tiles)
    assert ours["density"] == kept / layout.num_tiles and peer["density"] == 1.0
    assert ours["flops"] == pytest.approx(4 * 16 * 2 * 4 * kept * 64 * 64, rel=1e-4)
    assert peer["flops"] == pytest.approx(4 * 16 * 2 * 256 * 256, rel=1e-4)
    assert len(ours["ms"]) == len(peer["ms"]) >= timing.LEAST and ours["checked"] and peer["checked"]
    assert ours["tflops"] == pytest.approx(ours["flops"] / (rows.median(ours) * 1e9), rel=1e-4)
    assert 0 < ours["error"]["out"] < 1e-5 and peer["note"] == "stand-in"
    back = of(by_case["backward"], "fine_backward")
    assert back["flops"] == pytest.approx(2.5 * ours["flops"], rel=1e-4) and set(back["error"]) == {
        "out",
        "dq",
        "dk",
        "dv",
    }
    saving = of(by_case["backward"], "fine_forward")
    assert saving["config"] == {"training": True} and len(saving["ms"]) == len(back["ms"])


def test_a_baseline_that_cannot_run_is_a_row_that_says_why(tmp_path: Path) -> None:
    def broken(problem: Any, training: bool) -> Any:
        raise RuntimeError("no kernel image")

    def fails_later(problem: Any, training: bool) -> Any:
        return lambda q, k, v: q + v.nothing

    names = ("fastvideo_tk", "attention_gym", "cudnn_frontend", "nobody")
    baselines = {**BASELINES, "attention_gym": broken, "cudnn_frontend": fails_later}
    code, result = run(tmp_path, case("forward", "fine_forward", baselines=names), baselines=baselines)
    reasons = {row["impl"]: row["reason"] for row in result["rows"]}
    assert code == 0 and of(result, "fine_forward")["ms"]
    assert reasons["fastvideo_tk"] == "its package is not installed: get it somewhere"
    assert "no kernel image" in reasons["attention_gym"] and "suite_helpers" not in reasons["attention_gym"]
    assert (
        "nothing" in reasons["cudnn_frontend"]
        and "fails_later" not in reasons
        and "no such baseline" in reasons["nobody"]
    )
    assert not any(row["ms"] or row["checked"] for row in result["rows"] if row["impl"] != "flexsparse")


def test_whole_attention_and_its_parts(tmp_path: Path) -> None:
    divides = case("whole", "attention_forward", parts=True)
    ragged = case("ragged", "attention_forward", grid=(5, 6, 7), tile="auto", others=((4, 4, 4),))
    training = case("training", "attention_training")
    bsa = case("bsa", "attention_training", method="bsa", tile=(4, 8, 4), kv_tile=(4, 4, 4))
    code, result = run(tmp_path, divides, ragged, training, bsa)
    assert code == 0 and all(row["checked"] and row["ms"] for row in result["rows"] if row["impl"] == "flexsparse")
    first = {"rows": [row for row in result["rows"] if row["case"] == "whole"]}
    assert of(first, "attention_forward")["config"] == {"mode": "eager"}
    for part in ("tiling", "lists", "fine", "untile", "combine"):
        assert of(first, "attention_forward", part=part)["ms"]
    assert of(first, "select")["ms"] and of(first, "select", part="pooling")["ms"]
    tiles = {tuple(row["tile"]) for row in result["rows"] if row["case"] == "ragged" and row["impl"] == "flexsparse"}
    assert (4, 4, 4) in tiles and len(tiles) == 2
    errors = next(row for row in result["rows"] if row["case"] == "training" and row["impl"] == "flexsparse")["error"]
    assert set(errors) == {"out", "dq", "dk", "dv", "dgate"} and max(errors.values()) < 1e-5
    packed = next(row for row in result["rows"] if row["case"] == "bsa" and row["impl"] == "flexsparse")
    assert packed["kv_tile"] == [4, 4, 4] and packed["tile"] == [4, 8, 4] and packed["density"] < 0.4


def test_the_pieces_of_a_call_that_reads_raster_order() -> None:
    """As on CUDA, with the CPU's ops: three pieces are gone, and the fine stage is the whole but for the selection."""
    whole = case("whole", "attention_forward", parts=True, grid=(3, 6, 5))
    host, layout = Host(), whole.layout
    q, k, v, _ = data.tokens(whole, host.torch)
    gate = torch.randn(1, whole.S, whole.H * whole.D)
    selection = whole.builder.select(q, k, layout)
    found = list(parts.in_raster(whole, host, (q, k, v, gate), layout, selection))
    gone = {one.part for one in found if isinstance(one, Missing) and one.reason == rows.NOT_RUN}
    timed = {one.part: one.run(0) for one in found if isinstance(one, Contender)}
    assert gone == {"tiling", "untile", "combine"} and timed.keys() == {"pooling", None, "lists", "fine"}
    heads = gate.unflatten(-1, (whole.H, whole.D)).transpose(1, 2)
    expected = fs.sparse_attention(q, k, v, layout, whole.builder, gate=heads)
    torch.testing.assert_close(timed["fine"][0], expected, atol=1e-5, rtol=1e-4)
    assert timed["pooling"][0].shape == (1, whole.H, layout.num_tiles, whole.D)


def test_the_compiled_form_is_what_a_wrapped_model_runs(tmp_path: Path, fresh_dynamo: None) -> None:
    code, result = run(tmp_path, case("training", "attention_training"), device=Host(modes=("compiled",)))
    row = of(result, "attention_training")
    assert code == 0 and row["config"] == {"mode": "compiled"} and row["ms"]
    assert row["error"]["dgate"] < 1e-5  # the gate is in the graph, and its gradient comes out


def test_a_case_that_raises_loses_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def boom(*_: Any) -> Any:
        raise KeyError("unexpected")

    monkeypatch.setattr(overlap, "rows", boom)
    code, result = run(tmp_path, case("a", "fine_forward"), case("b", "overlap"), case("c", "memory"))
    by_case = {row["case"]: row for row in result["rows"] if row["impl"] == "flexsparse"}
    assert code == 0 or by_case["b"]["error"] == {}
    assert by_case["a"]["ms"] and by_case["c"]["mib"] and "KeyError" in by_case["b"]["reason"]
    assert "test_gpu_suite.py" in by_case["b"]["reason"]  # where it was raised


def test_a_run_cut_short_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(overlap, "rows", cut)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, case("a", "fine_forward"), case("b", "overlap"), case("c", "memory"))
    header, found = rows.load(tmp_path / "bench.json")
    assert {row["case"] for row in found} == {"a"} and header["stage"] == "bench"
    assert list(tmp_path.glob("*.partial")) == []


def test_a_lost_gpu_ends_the_process_and_keeps_the_rows(tmp_path: Path) -> None:
    def lost(problem: Any, training: bool) -> Any:
        def attend(q: Any, k: Any, v: Any) -> Any:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return attend

    baselines = {**BASELINES, "cudnn_frontend": lost}
    names = ("dense_cudnn", "cudnn_frontend")
    code, result = run(
        tmp_path, case("a", "fine_forward"), case("b", "fine_forward", baselines=names), baselines=baselines
    )
    assert code == supervise.LOST and {row["case"] for row in result["rows"]} == {"a"}


def test_no_case_begins_that_does_not_fit(tmp_path: Path) -> None:
    clock = [0.0]
    device = Recorder()
    said: list[str] = []
    head = {"date": "now"}
    run_ = Run(
        device=device, out=tmp_path, head=head, budget=Budget(until=30.0, clock=lambda: clock[0]), baselines=BASELINES
    )
    run_.say = said.append
    run_.beat = lambda name, contender, limit: clock.__setitem__(0, clock[0] + 4.0)
    long = case("long", "model_step", layers=30)
    run_.run_bench([case("first", "fine_forward", baselines=()), long, case("last", "overlap")])
    _, found = rows.load(tmp_path / "bench.json")
    by_case = {row["case"]: row for row in found}
    assert by_case["first"]["ms"] and "time was over" in by_case["long"]["reason"]
    assert clock[0] > 20 and "time was over" in by_case["last"]["reason"] and by_case["last"]["error"] == {}


def test_estimates_learn() -> None:
    budget = Budget(until=100.0, clock=lambda: 0.0)
    assert budget.allows(99) and not budget.allows(101)
    for _ in range(20):
        budget.learn(10.0, 20.0)
    assert budget.factor == pytest.approx(2.0, rel=0.05) and not budget.allows(60)
    budget.learn(1.0, 1000.0)
    assert budget.factor == 3.0


def test_every_case_has_a_name_of_its_own_and_an_estimate() -> None:
    every = cases.all_cases() + cases.tuned_cases()
    assert len({one.name for one in every}) == len(every)
    assert all(0 < one.estimate() < 300 for one in every)
    assert all(one.builder is not None and one.layout.seq_len == one.S for one in every)


def test_words_choose_stages_and_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--list", "--only", "bench", "bsa"]) == 0
    assert capsys.readouterr().out.split() == ["bench", "bsa-training", "bsa-forward"]
    assert gpu_suite.main(["--list", "--only", "tune"]) == 0
    assert "tune" in capsys.readouterr().out.split()
    assert gpu_suite.main(["--list", "--only", "nothing"]) == 2
    assert "matches nothing" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and "CUDA" in said.err and not said.out
    assert not (tmp_path / "out").exists()


def test_what_a_process_died_of_is_left_out(tmp_path: Path) -> None:
    run_ = Run(device=Recorder(), out=tmp_path, head={}, budget=Budget(until=1e18), baselines=BASELINES)
    run_.say = lambda text: None
    run_.skip = {("a", "preparing dense_cudnn"): "it hung", ("b", ""): "signal 11"}
    run_.skip["c", "flexsparse/fine_forward///"] = "it hung"  # the name that `beat` is told
    told: list[tuple[str, str]] = []
    run_.beat = lambda name, contender, limit: told.append((name, contender))
    run_.run_bench([case("a", "fine_forward"), case("b", "fine_forward"), case("c", "fine_forward", baselines=())])
    _, found = rows.load(tmp_path / "bench.json")
    a, peer, _, b, c = found
    assert ("c", "flexsparse/fine_forward///") in told and c["reason"] == c["error"] == "it hung" and not c["ms"]
    assert a["ms"] and peer["impl"] == "dense_cudnn" and peer["reason"] == "it hung" and not peer["ms"]
    assert b["reason"] == "signal 11" and b["error"] and b["ms"] is None


def test_one_that_ends_the_process_while_all_are_timed_is_left_out_alone(tmp_path: Path) -> None:
    device = Recorder()
    run_ = Run(device=device, out=tmp_path, head={}, budget=Budget(until=1e18), baselines=BASELINES)
    run_.say = lambda text: None
    told: list[str] = []
    run_.beat = lambda name, contender, limit: told.append(contender)
    names = ("dense_cudnn",)
    run_.run_bench([case("a", "fine_forward", baselines=names)])
    assert set(device.rounds) == {2} and told[-1] == "timing", "all in one round, which has one name"
    run_.skip = {("b", "timing"): "signal 11", ("c", "timing"): "signal 11"}
    ours = "flexsparse/fine_forward///"
    run_.skip["c", f"timing {ours}"] = "signal 11"
    run_.run_bench([case(name, "fine_forward", baselines=names) for name in "bc"])
    _, found = rows.load(tmp_path / "bench.json")
    by_case = {(row["case"], row["impl"]): row for row in found}
    assert by_case["b", "flexsparse"]["ms"] and by_case["b", "dense_cudnn"]["ms"] and f"timing {ours}" in told
    assert by_case["c", "flexsparse"]["reason"] == "signal 11" and by_case["c", "dense_cudnn"]["ms"]


def test_what_a_later_check_finds_wrong_is_taken_back(tmp_path: Path) -> None:
    some = [case("a", "fine_forward"), case("b", "fine_forward", D=32)]
    run_ = Run(device=Recorder(), out=tmp_path, head={}, budget=Budget(until=1e18), baselines=BASELINES)
    run_.say = lambda text: None
    run_.run_bench(some)
    run_.checked = [checks.check_row("test_it[32]", "failed", "it is wrong", guards=["fine_forward"], D=32)]
    run_.recheck(some)
    _, found = rows.load(tmp_path / "bench.json")
    by_case = {(row["case"], row["impl"]): row for row in found}
    assert by_case["a", "flexsparse"]["ms"] and by_case["b", "dense_cudnn"]["ms"]
    taken = by_case["b", "flexsparse"]
    assert taken["ms"] is taken["tflops"] is None and not taken["checked"] and "test_it[32] failed" in taken["reason"]


def test_no_more_is_checked_once_it_is_time_to_time(tmp_path: Path) -> None:
    clock = [0.0]
    run_ = Run(
        device=Recorder(),
        out=tmp_path,
        head={},
        budget=Budget(until=100.0, clock=lambda: clock[0]),
        baselines={"dense_cudnn": BASELINES["dense_cudnn"], "dense_fa2": BASELINES["dense_cudnn"]},
    )
    run_.say = lambda text: None
    run_.beat = lambda name, contender, limit: clock.__setitem__(0, clock[0] + 46.0 * ("/" in contender))
    run_.run_bench([case("a", "fine_forward", seconds=10.0, baselines=("dense_cudnn", "dense_fa2"))])
    ours, peer, late = rows.load(tmp_path / "bench.json")[1]
    assert ours["ms"] and len(peer["ms"]) == len(ours["ms"])
    assert late["ms"] is None and "time was over" in late["reason"] and late["error"] == {}
