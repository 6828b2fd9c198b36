"""A machine whose peaks and shares come from a file of `bench.machine`; what an uncompiled step moves."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("typer")
from typer.testing import CliRunner

import flexsparse as fs
from bench import machine as bench_machine
from bench.timing import both_clocks
from flexsparse.cli.app import app
from flexsparse.planning import PlanError, Settings, evaluate, measure, plan
from flexsparse.planning.counting import fake
from flexsparse.planning.machines import machine_of
from flexsparse.planning.modes import Products
from flexsparse.planning.shares import assumed, shares

GRID = (4, 8, 8)
HEADER = {"suite": "machine", "cpu": "A CPU", "threads": 1, "memory_bytes": 2**34, "date": "2026-01-01T00:00:00+00:00"}
TINY = bench_machine.Sizes(tokens=16, channels=128, heads=2, attended=16, grid=(4, 4, 8), kept=1, copied=2**12)


def _row(op, impl, part=None, dtype="float32", **more):
    return {"case": "x", "op": op, "impl": impl, "part": part, "dtype": dtype, "ms": [1.0, 2.0, 9.0], **more}


ROWS = [
    _row("ceiling", "torch", "copy", dtype=None, bytes=20e6),  # 10 GB/s
    _row("ceiling", "torch", "matmul", flops=100e6),  # 50 GFLOP/s
    _row("ceiling", "torch", "matmul", flops=300e6),  # 150: the median of the two is 100
    _row("ceiling", "torch", "matmul", dtype="bfloat16", flops=400e6),
    _row("elementwise", "torch", "block", bytes=5e6),  # a quarter of the copy's
    _row("fine_forward", "dense_sdpa", D=64, flops=160e6),
    _row("fine_forward", "dense_sdpa", D=128, flops=20e6),
    _row("fine_backward", "flexsparse", D=64, flops=60e6),
    _row("fine_backward", "flexsparse", D=64, dtype="bfloat16", flops=20e6),
    _row("select", "flexsparse", "coarse", dtype="bfloat16", D=64, flops=2e6),
]


@pytest.fixture
def file(tmp_path):
    """A file of a made up CPU."""
    path = tmp_path / "measured" / "mine.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"header": HEADER, "rows": ROWS}))
    return path


def test_peaks_are_medians_of_rows(file):
    found = machine_of("cpu", file.parent)
    assert found == machine_of("cpu", file)
    assert dict(found.products) == pytest.approx({"float32": 100e9, "bfloat16": 200e9})
    assert found.hbm == pytest.approx(10e9) and found.scalar == found.products["float32"]
    assert (found.memory, found.name, found.unit) == (2**34, "A CPU (1 thread)", "CPU")
    assert "mine.json" in found.sources[0] and found.measured


def test_shares_are_of_the_dtype_and_the_nearest_head_dim(file):
    machine = machine_of("cpu", file)
    full = shares(machine, 64, "float32", file)
    assert full.products.value == pytest.approx(1)
    assert full.elementwise.value == pytest.approx(0.25) and full.memory.value == pytest.approx(1)
    assert full.dense_forward.value == pytest.approx(0.8) and full.fine_backward.value == pytest.approx(0.3)
    assert full.dense_forward.origin == "mine.json"
    assert shares(machine, 100, "float32", file).dense_forward.value == pytest.approx(0.1)
    half = shares(machine, 64, "bfloat16", file)
    assert half.fine_backward.value == pytest.approx(0.05)
    assert half.coarse.value == pytest.approx(0.01)  # of float32 products, in which scores are made
    assert set(assumed(full)) == {"dense_backward", "fine_forward", "coarse", "selection"}


def test_everything_that_a_plan_needs_is_measured(tmp_path):
    """The real measurement on tiny problems; times are whatever they are."""
    rows = bench_machine.problems(TINY)
    samples = both_clocks({case: function for case, (function, _) in rows.items()}, 2)
    path = tmp_path / "cpu.json"
    bench_machine.write(path, bench_machine.result_of(rows, samples, repeats=2))
    machine = machine_of("cpu", path)
    assert set(machine.products) == {"float32", "bfloat16"} and machine.memory > 2**28
    for dtype in machine.products:
        assert assumed(shares(machine, 64, dtype, path)) == []
    assert all(len(each.cpu_ms) == len(each.wall_ms) == 2 for each in samples.values())


def test_a_plan_names_the_file_and_no_guess(file, folder):
    how = ("--grid", "4,8,8", "--top-k", "2", "--machine", "cpu", "--dtype", "float32", "--results", str(file))
    result = CliRunner().invoke(app, ["plan", str(folder("wan")), *how], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    for text in ("A CPU (1 thread)", "Peaks, measured", "mine.json, 2026-01-01", "Memory of a CPU"):
        assert text in result.output
    assert "data sheet" not in result.output and "GPU" not in result.output
    assert "the share of dense_backward, fine_forward, coarse, selection reached is an assumption" in result.output


def test_shares_that_are_all_measured_are_said_to_be(file, folder):
    more = [
        _row("fine_backward", "dense_sdpa", D=64, flops=1e6),
        _row("fine_forward", "flexsparse", D=64, flops=1e6),
        _row("select", "flexsparse", "coarse", D=64, flops=1e6),
        _row("select", "flexsparse", "choice", D=64, flops=1e6),
    ]
    file.write_text(json.dumps({"header": HEADER, "rows": ROWS + more}))
    sizes = {"model": str(folder("wan")), "grid": GRID, "builder": fs.VSA(top_k=2)}
    settings = Settings(**sizes, gpu="cpu", dtype="float32", results=file)
    found = evaluate(settings, measure(settings))
    assert "peaks and shares were measured on A CPU (1 thread)" in found.notes[0] and "mine.json" in found.notes[0]
    assert found.sparse.ulysses == found.sparse.beside == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [({"gpus": 2, "ulysses": 2}, "gpus is 2"), ({"dtype": "float16"}, "'float16', which was not measured on A CPU")],
)
def test_what_was_not_measured_is_refused(file, change, match):
    sizes = {"model": "x", "grid": GRID, "builder": fs.VSA(top_k=1), "gpu": "cpu", "results": file}
    with pytest.raises(PlanError, match=match):
        Settings(**{**sizes, **change})


def test_no_file_and_too_many(file, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(PlanError, match=r"holds no measured CPU: run python -m bench.machine"):
        machine_of("cpu", tmp_path / "empty")
    (file.parent / "other.json").write_text(file.read_text())
    with pytest.raises(PlanError, match=r"several measured CPUs: give --results one of mine.json, other.json"):
        machine_of("cpu", file.parent)
    file.write_text(json.dumps({"header": HEADER, "rows": ROWS[1:]}))
    with pytest.raises(PlanError, match=r"mine.json has no rate of float32 products or of copies"):
        machine_of("cpu", file)
    with pytest.raises(PlanError, match="is no folder and no file"):
        machine_of("cpu", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (lambda x, row: x + x, 3),
        (lambda x, row: x.add_(1), 2),
        (lambda x, row: x + row, 2 + 1 / 100),  # a broadcast row is read where it lies
        (lambda x, row: x + row.expand(100, 10), 2 + 1 / 100),
        (lambda x, row: x.t().view(10, 100)[1:].detach(), 0),
        (lambda x, row: torch.ops.aten._unsafe_view(x, [10, 100]), 0),
        (lambda x, row: torch.empty_like(x), 0),
        (lambda x, row: torch.zeros_like(x), 1),
        (lambda x, row: x.t().contiguous(), 2),
        (lambda x, row: x @ x.t(), 0),  # a product, counted elsewhere
    ],
    ids=["sum", "in place", "broadcast", "expanded", "views", "unsafe view", "empty", "zeros", "copy", "product"],
)
def test_what_an_operation_moves(function, tensors):
    with fake(), Products() as products:
        x, row = torch.empty(100, 10), torch.empty(10)
        function(x, row)
    assert products.moved["forward"] == pytest.approx(tensors * 4000)


def test_uncompiled_steps_move_more(folder):
    sizes = {"model": str(folder("wan")), "grid": GRID, "builder": fs.VSA(top_k=2)}
    settings = Settings(**sizes)
    counts = measure(settings)
    fused, alone = (evaluate(dataclasses.replace(settings, compiled=c), counts) for c in (True, False))
    assert alone.sparse.elementwise > 2 * fused.sparse.elementwise
    assert alone.sparse.tiling == fused.sparse.tiling == alone.dense.tiling == 0  # the templates read raster order
    packed = plan(dataclasses.replace(settings, compiled=False, builder=fs.BSA(kv_density=0.5)))
    assert packed.sparse.tiling > 0 == packed.dense.tiling
    for one, other in ((fused.sparse, alone.sparse), (fused.dense, alone.dense)):
        same = [f.name for f in dataclasses.fields(one) if f.name not in ("elementwise", "tiling")]
        assert [getattr(one, name) for name in same] == [getattr(other, name) for name in same]
    assert "fused" in " ".join(fused.notes) and "by itself" in " ".join(alone.notes)
    inner = counts.sparse
    assert inner.moved > 0 and inner.moved_backward > inner.moved  # checkpointed: the forward again, and the backward


def test_one_cpu_is_not_drawn_against_gpus(file, folder, monkeypatch, tmp_path):
    monkeypatch.setattr("flexsparse.planning.measured.build", None)  # called, it would be a TypeError
    how = ["--grid", "4,8,8", "--machine", "cpu", "--results", str(file), "--dtype", "float32"]
    how += ["--plot", str(tmp_path / "x.png"), "--plot-over", "gpus"]
    result = CliRunner().invoke(app, ["plan", str(folder("wan")), *how])
    assert result.exit_code == 2 and "--plot-over is gpus, but --machine is cpu" in result.stderr, result.exception
