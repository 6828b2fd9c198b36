"""Whole runs on a tiny grid: what they write, and that an interrupted one continues to the same curve."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from flexsparse.demo import run as module
from flexsparse.demo.run import Options, run_demo
from flexsparse.demo.settings import Settings
from flexsparse.training.checkpoint import load_checkpoint
from flexsparse.training.errors import RunError

TINY = {"steps": 6, "frames": 4, "height": 32, "width": 48, "depth": 2, "dim": 32, "eval_every": 2}
QUIET = Console(file=io.StringIO(), width=200)


def _settings(**overrides) -> Settings:
    return Settings(**(TINY | {"compile": False, "sparsity": 0.5, "tile": (2, 2, 2)} | overrides))


def _curves(metrics: dict) -> dict:
    """What must not depend on interruptions: everything but the times."""
    kept = ("loss", "held_out")
    return {method: {name: entry["curves"][name] for name in kept} for method, entry in metrics["methods"].items()}


def _interrupt(at: int):
    def after_step(done: int) -> None:
        if done == at:
            raise KeyboardInterrupt

    return after_step


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    """An uninterrupted run of all three methods."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run_demo(_settings(), Options(folder=folder), QUIET)


def test_a_run_writes_report_metrics_and_checkpoint(finished):
    folder, metrics = finished
    assert sorted(os.listdir(folder)) == ["checkpoint.safetensors", "metrics.json", "report.html"]
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert load_checkpoint(folder / "checkpoint.safetensors").state["step"] == 6
    html = (folder / "report.html").read_text()
    assert "CC-BY 3.0" in html and "http:" not in html and "https:" not in html


def test_metrics_hold_what_the_report_promises(finished):
    _, metrics = finished
    assert list(metrics["methods"]) == ["dense", "vsa", "bsa"]
    for name, entry in metrics["methods"].items():
        assert len(entry["curves"]["loss"]) == 6
        assert [point["step"] for point in entry["curves"]["held_out"]] == [2, 4, 6]
        assert entry["step"]["ratio"] > 0 and entry["attention_time"]["ratio"] > 0
        if name != "dense":
            assert entry["error_to_oracle"] < 1e-5
            assert len(entry["calls"]) == 2 and all(call["sparse"] for call in entry["calls"])
            assert 0 < entry["density"] < 1 and entry["attention_flops_ratio"] < 1
    assert metrics["methods"]["vsa"]["tiles_kept_min"] == metrics["methods"]["vsa"]["tiles_kept_max"] == 6
    assert metrics["methods"]["vsa"]["gate_rms"] > 0, "the gate trains"
    versions = metrics["header"]["versions"]
    assert {"python", "torch", "flexsparse"} <= versions.keys() and metrics["header"]["date"]


def test_hostile_file_name_is_text_in_the_report_and_harmless_on_the_terminal(make_video, tmp_path):
    name = os.fsdecode(b"<script>alert(1)<\\script>\x1b[31m\xff.mp4")
    console = Console(file=io.StringIO(), width=200)
    settings = _settings(methods=("dense",), steps=1)
    run_demo(settings, Options(folder=tmp_path / "run", video=make_video(name)), console)
    html = (tmp_path / "run" / "report.html").read_text()
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "\x1b" not in console.file.getvalue() and "<script>" in console.file.getvalue()


def test_methods_start_equal_and_then_differ(finished):
    _, metrics = finished
    losses = [entry["curves"]["loss"] for entry in metrics["methods"].values()]
    assert losses[0][0] == pytest.approx(losses[1][0]) == pytest.approx(losses[2][0])
    assert len({tuple(loss[2:]) for loss in losses}) == 3


@pytest.mark.parametrize("method", ["dense", "bsa"])
def test_one_method_alone_has_no_ratio_to_dense(tmp_path, method):
    metrics = run_demo(_settings(methods=(method,), steps=2), Options(folder=tmp_path / "run"), QUIET)
    assert "ratio" not in metrics["methods"][method]["step"] or method == "dense"
    html = (tmp_path / "run" / "report.html").read_text()
    assert ("Critical tiles" in html) == (method == "bsa")


@pytest.mark.parametrize("at", [1, 3, 5])
def test_interrupted_and_resumed_run_has_the_same_curve(finished, tmp_path, at):
    options = {"folder": tmp_path / "run", "save_every": 2}
    with pytest.raises(KeyboardInterrupt):
        run_demo(_settings(), Options(**options), QUIET, after_step=_interrupt(at))
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors").state["step"] == at // 2 * 2
    resumed = run_demo(_settings(), Options(**options, resume=True), QUIET)
    assert _curves(resumed) == _curves(finished[1]), "bitwise"


def test_resume_of_a_finished_run_only_writes_the_report(finished, tmp_path):
    folder, metrics = finished
    (folder / "report.html").unlink()
    again = run_demo(_settings(), Options(folder=folder, resume=True), QUIET, after_step=_interrupt(6))
    assert _curves(again) == _curves(metrics) and (folder / "report.html").is_file()


def test_resume_with_other_settings_names_them(finished):
    folder, _ = finished
    with pytest.raises(RunError, match=r"--resume with other settings \(--seed is 5, the run has 0\)"):
        run_demo(_settings(seed=5), Options(folder=folder, resume=True), QUIET)


def test_resume_with_another_clip_is_refused(finished, make_video):
    folder, _ = finished
    with pytest.raises(RunError, match=r"--video \(SHA-256\)"):
        run_demo(_settings(), Options(folder=folder, resume=True, video=make_video()), QUIET)


def test_existing_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(RunError, match=r"output folder .* exists: continue with --resume, replace it with --force"):
        run_demo(_settings(), Options(folder=tmp_path), QUIET)
    assert os.listdir(tmp_path) == ["keep.txt"]


def test_force_replaces_the_run_and_nothing_else(tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    (tmp_path / "report.html").write_text("old")
    settings = _settings(methods=("dense",), steps=1)
    run_demo(settings, Options(folder=tmp_path, force=True), QUIET)
    assert (tmp_path / "keep.txt").read_text() == "mine"
    assert (tmp_path / "report.html").read_text() != "old"


def test_folder_errors(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for options, message in [
        (Options(folder=tmp_path, resume=True, force=True), "--resume and --force exclude each other"),
        (Options(folder=tmp_path / "none", resume=True), "does not exist, there is nothing to resume"),
        (Options(folder=file), "is a file"),
        (Options(folder=file / "below"), "cannot be made"),
        (Options(folder=tmp_path / "x", save_every=0), "--save-every 0 is too small"),
        (Options(folder=tmp_path / "x", threads=0), "--threads 0 is too small"),
        (Options(folder=tmp_path / "x", threads=100_000), "--threads 100000 is too large: pass at most 1024"),
    ]:
        with pytest.raises(RunError, match=message):
            run_demo(_settings(), options, QUIET)
    assert not (tmp_path / "x").exists()


def test_corrupt_checkpoint(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"broken" * 20)
    with pytest.raises(RunError, match=r"checkpoint .* is corrupt .*--force"):
        run_demo(_settings(), Options(folder=tmp_path, resume=True), QUIET)


def test_full_disk_in_the_middle_keeps_the_last_checkpoint(finished, tmp_path, monkeypatch):
    options = {"folder": tmp_path / "run", "save_every": 2}
    real, calls = module.save_checkpoint.__globals__["write_atomically"], []

    def sometimes_full(path, data):
        calls.append(path)
        if len(calls) == 3:  # the start, step 2, step 4
            raise OSError(28, "No space left on device")
        real(path, data)

    with monkeypatch.context() as patched:
        patched.setitem(module.save_checkpoint.__globals__, "write_atomically", sometimes_full)
        with pytest.raises(RunError, match=r"No space left on device.*previous checkpoint is intact"):
            run_demo(_settings(), Options(**options), QUIET)
    resumed = run_demo(_settings(), Options(**options, resume=True), QUIET)
    assert _curves(resumed) == _curves(finished[1])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(RunError, match=r"dense: the loss is nan at step .*--lr"):
        run_demo(_settings(learning_rate=float("nan"), methods=("dense",)), Options(folder=tmp_path / "x"), QUIET)


def _cli(folder: Path, *extra: str) -> list[str]:
    sizes = "--no-compile --steps 30 --save-every 3 --eval-every 10 --frames 4 --height 64 --width 64"
    place = ["--out", str(folder.parent), "--name", folder.name, "--methods", "vsa", "--threads", "1"]
    return [sys.executable, "-m", "flexsparse.cli", "demo", *sizes.split(), *place, *extra]


@pytest.mark.slow
def test_killed_process_resumes_to_the_same_curve(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    uninterrupted = subprocess.Popen(_cli(whole), **quiet)
    process = subprocess.Popen(_cli(killed), **quiet)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        path = killed / "checkpoint.safetensors"
        if path.is_file() and load_checkpoint(path).state["step"] >= 6:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    resumed = subprocess.run(_cli(killed, "--resume"), **quiet, timeout=120)
    assert resumed.returncode == 0, resumed.stderr.decode()
    _, errors = uninterrupted.communicate(timeout=120)
    assert uninterrupted.returncode == 0, errors.decode()
    curves = [_curves(json.loads((folder / "metrics.json").read_text())) for folder in (killed, whole)]
    assert curves[0] == curves[1], "bitwise"


@pytest.mark.slow
def test_compiled_run_resumes_to_the_same_curve(tmp_path):
    settings = _settings(compile=True)
    whole = run_demo(settings, Options(folder=tmp_path / "whole"), QUIET)
    options = {"folder": tmp_path / "run", "save_every": 2}
    with pytest.raises(KeyboardInterrupt):
        run_demo(settings, Options(**options), QUIET, after_step=_interrupt(3))
    resumed = run_demo(settings, Options(**options, resume=True), QUIET)
    assert _curves(resumed) == _curves(whole)
    eager = run_demo(_settings(), Options(folder=tmp_path / "eager"), QUIET)
    for method, entry in _curves(eager).items():
        assert entry["loss"][:3] == pytest.approx(_curves(whole)[method]["loss"][:3], rel=1e-3)
