"""What the suite compares and counts: the gate, the oracle, samples, overlap, memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from suite_helpers import Recorder, case, dense, of, run

import flexsparse as fs
from bench.suite import (
    attention,
    data,
    fine,
    gate,
    memory,
    oracle,
    overlap,
    rows,
    small,
    timing,
)
from bench.suite.contender import Contender, Expected, training_results
from bench.suite.device import Host
from flexsparse.checking.tolerance import poison


def test_rounds_are_interleaved_and_nobody_always_runs_after_the_same_neighbour() -> None:
    device, order, began = Recorder(), [], []
    functions = {name: (lambda turn, name=name: order.append((turn, name))) for name in "abc"}
    found = timing.samples(device, functions, 0.0, least=24, most=24, alive=began.append)
    assert {name: len(ms) for name, ms in found.items()} == {"a": 24, "b": 24, "c": 24}
    assert device.rounds == [3] * 25 and began == [""] * 25  # the first is not timed
    assert [turn for turn, _ in order[3:]] == [turn for turn in range(24) for _ in range(3)]
    rounds = [[name for _, name in order[3 * n : 3 * n + 3]] for n in range(25)]
    assert all(sorted(one) == list("abc") for one in rounds)
    before = [one[one.index("c") - 1] for one in rounds if one.index("c")]
    assert 0.25 < before.count("a") / len(before) < 0.75


def test_each_is_waited_for_where_one_may_end_the_process() -> None:
    device, began = Recorder(), []
    functions = {name: lambda turn: None for name in "ab"}
    found = timing.samples(device, functions, 0.0, least=2, most=2, alive=began.append, apart=True)
    assert {name: len(ms) for name, ms in found.items()} == {"a": 2, "b": 2} and device.rounds == [1] * 6
    assert sorted(began) == list("aaabbb")


def test_samples_belong_to_their_function() -> None:
    clock = iter(range(10**6))
    times = {"slow": 5, "fast": 1}

    def take(name: str) -> None:
        for _ in range(times[name]):
            next(clock)

    device = Host(clock=lambda: float(next(clock)))
    found = timing.samples(device, {name: lambda turn, name=name: take(name) for name in times}, 0.0)
    assert set(found["slow"]) == {6000.0} and set(found["fast"]) == {2000.0}


BREAKS = {
    "scaled": lambda out: out * 1.001,
    "one tile lost": lambda out: torch.cat([out[:, :, :64] * 0, out[:, :, 64:]], 2),
    "not finite": lambda out: out.index_fill(2, torch.tensor([3]), float("nan")),
    "other shape": lambda out: out[:, :, :-1],
}


@pytest.mark.parametrize("how", list(BREAKS))
def test_our_kernel_is_not_timed_where_it_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    right = fine.ours

    def wrong(problem: Any, training: bool) -> Any:
        attend = right(problem, training)
        return lambda q, k, v: BREAKS[how](attend(q, k, v))

    monkeypatch.setattr(fine, "ours", wrong)
    code, result = run(tmp_path, case("forward", "fine_forward"))
    own = of(result, "fine_forward")
    assert code == 1 and own["ms"] is None and not own["checked"] and own["error"] and own["reason"]
    assert of(result, "fine_forward", "dense_cudnn")["ms"]


def test_a_peer_with_wrong_gradients_is_not_timed(tmp_path: Path) -> None:
    def wrong(problem: Any, training: bool) -> Any:
        attend = dense(problem, training)
        return lambda q, k, v: attend(q * 1.0, k + (k.detach() - k) * 0.1, v)  # dk is 0.9 of what it should be

    code, result = run(tmp_path, case("backward", "fine_backward"), baselines={"dense_cudnn": wrong})
    peer, its_forward = (of(result, op, "dense_cudnn") for op in ("fine_backward", "fine_forward"))
    assert code == 0 and peer["ms"] is None and "dk has relative error" in peer["reason"]
    assert its_forward["ms"] is None and "the whole failed" in its_forward["reason"]
    assert of(result, "fine_backward")["ms"]


def test_what_is_not_written_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that forgets a row finds the right one of the run before in its memory: it is NaN by then."""
    exact = torch.randn(1, 8, 4, dtype=torch.float64)
    memory = exact.float().clone()
    monkeypatch.setattr(gate, "poison", lambda shape, dtype, device: memory.fill_(float("nan")))
    truth = Expected(take=lambda x: x, exact={"out": exact}, reference={"out": exact.float()})

    def verdict(written: slice) -> str | None:
        def kernel() -> dict[str, torch.Tensor]:
            memory[:, written] = exact.float()[:, written]
            return {"out": memory.clone()}

        one = Contender(impl="x", op="y", run=lambda turn: None, results=kernel, expected=lambda: truth, strict=True)
        return gate.verdict(one)[1]

    assert verdict(slice(0, 8)) is None
    assert "not finite" in str(verdict(slice(0, 7)))
    nothing = Contender(impl="x", op="y", run=lambda turn: None, results=dict, expected=lambda: truth)
    assert "gives no out" in str(gate.verdict(nothing)[1])


def test_poison_is_what_an_allocator_hands_out() -> None:
    kept: list[torch.Tensor] = []
    full = torch.full

    def spy(*arguments: Any, **options: Any) -> torch.Tensor:
        kept.append(full(*arguments, **options))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "full", spy)
        poison(torch.Size([3, 5]), torch.bfloat16, torch.device("cpu"))
    assert [(x.shape, x.dtype) for x in kept] == [(torch.Size([3, 5]), torch.bfloat16)] * 3
    assert all(bool(x.isnan().all()) for x in kept)


def test_the_oracle_is_the_reference_backend() -> None:
    layout = fs.TileLayout(grid=(5, 6, 7))
    q, k, v, grad = (torch.randn(1, 1, layout.seq_len, 8, dtype=torch.float64) for _ in range(4))
    keep = torch.rand(1, 1, layout.num_tiles, layout.num_tiles) < 0.4
    keep[0, 0, 0] = False
    selection = fs.TileSelection.from_mask(keep, layout)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = fs.sparse_attention(*leaves, layout, selection, backend="reference")
    expected = training_results(out, tuple(leaves), ("dq", "dk", "dv"), grad)
    tiles = [layout.to_tiles(x)[0, 0] for x in (q, k, v, grad)]
    found = oracle.fine(*tiles[:3], keep[0, 0], layout.tile_counts, 8**-0.5, tiles[3], torch.float64)
    for name, exact in expected.items():
        torch.testing.assert_close(layout.to_raster(found[name][None, None]), exact, msg=name)


def test_overlap_is_counted() -> None:
    keep = torch.zeros(1, 1, 4, 8, dtype=torch.bool)
    keep[..., 0, :4] = keep[..., 1, 2:6] = keep[..., 2, :4] = keep[..., 3, :4] = True
    assert overlap.overlap(keep) == pytest.approx((2 + 2 + 4) / 12)
    assert overlap.shared(keep, 2) == pytest.approx(16 / (6 + 4))
    assert overlap.shared(keep, 3) == pytest.approx(12 / 6)


def test_smooth_tokens_share_more_than_independent_ones(tmp_path: Path) -> None:
    one = case("overlap", "overlap", grid=(8, 16, 16), density=0.2)
    code, result = run(tmp_path, one)
    rho = [row["overlap"]["rho"] for row in result["rows"]]
    assert code == 0 and len(rho) == len(overlap.FIELDS) and all(row["ms"] is None for row in result["rows"])
    assert abs(rho[0] - 0.2) < 0.1 and max(rho[1:]) > rho[0] + 0.2


def test_video_tokens_share_along_time_what_trained_models_share(tmp_path: Path) -> None:
    """As measured (bench/STUDY.md, question 5): 0.71 to 0.82 along t, 0.26 to 0.53 along h and w."""
    one = case("overlap", "overlap", grid=(16, 32, 32), density=0.1, D=128, H=2)
    _, result = run(tmp_path, one)
    *_, row = result["rows"]
    assert row["config"]["field_tokens"] == list(data.CELLS["video"])
    found = row["overlap"]
    assert 0.65 < found["t"] < 0.85 and 0.2 < found["h"] < 0.55 and 0.2 < found["w"] < 0.55


def test_overlap_along_each_axis() -> None:
    layout = fs.TileLayout(grid=(4, 2, 6), tile=(2, 2, 2), slots=16)
    keep = torch.zeros(1, 1, *layout.tiles, 6, dtype=torch.bool)
    for t in range(2):
        for w in range(3):
            keep[0, 0, t, 0, w, w : w + 2] = True  # the same at all times, half of it one tile further
    assert overlap.along(keep.flatten(2, 4), layout) == pytest.approx({"t": 1.0, "w": 0.5})


def test_memory_counts_storages_once(tmp_path: Path) -> None:
    x = torch.randn(1000, requires_grad=True)
    gated = torch.randn(1000)
    assert memory.saved_bytes(lambda: x * gated, without=()) == 4000
    assert memory.saved_bytes(lambda: x * gated + x * gated, without=()) == 4000
    assert memory.saved_bytes(lambda: x * gated, without=(gated,)) == 0
    _, result = run(tmp_path, case("memory", "memory"))
    saved, index = result["rows"]
    assert saved["needed_mib"] == pytest.approx(2 * 256 * (4 * 16 * 4 + 4) / 2**20, rel=1e-4) and saved["mib"][0] > 0
    assert index["needed_mib"] == pytest.approx(12 * 2 * 4 * 2 / 2**20, rel=1e-4)


def test_the_small_script_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "DIMS", (64,))
    assert small.main() == 0 and capsys.readouterr().out == "small: done\n"


def test_what_is_in_a_row_that_is_not_finite_stays_json(tmp_path: Path) -> None:
    rows.write(tmp_path / "x.json", {"a": float("inf")}, [{"ms": [float("nan"), 1.23456789]}])
    assert json.loads((tmp_path / "x.json").read_text()) == {"header": {"a": None}, "rows": [{"ms": [None, 1.23457]}]}
    (tmp_path / "y.json").write_text("[]")
    with pytest.raises(ValueError, match="no header"):
        rows.load(tmp_path / "y.json")


def test_a_compiled_call_that_is_not_lowered_is_refused() -> None:
    class Report:
        calls = (type("Call", (), {"sparse": True, "lowered": False, "reason": "not lowered: no templates"})(),)

    backend = type("Backend", (), {"report": lambda self: Report()})()
    assert "no templates" in str(attention.not_lowered(backend))
