"""The command line as a user meets it: help, exit codes, one-line errors."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
from typer.testing import CliRunner

from flexsparse import cli
from flexsparse.cli import app as app_module
from flexsparse.cli import info
from flexsparse.cli.app import app
from flexsparse.demo import run


def _invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1"})


def _one_line_error(result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    return result.stderr


def test_help_lists_the_commands():
    result = _invoke("--help")
    assert result.exit_code == 0
    assert "demo" in result.output and "info" in result.output


def test_demo_help_names_every_option_and_its_default():
    output = _invoke("demo", "--help").output
    for option in (
        "video",
        "name",
        "out",
        "methods",
        "steps",
        "frames",
        "height",
        "width",
        "sparsity",
        "top-k",
    ):
        assert f"--{option}" in output
    for option in ("seed", "device", "resume", "force", "save-every", "no-compile"):
        assert f"--{option}" in output
    assert "0.875" in output and "Big Buck Bunny" in output


def test_defaults_are_those_of_the_settings():
    import inspect

    from flexsparse.demo.settings import Settings

    names = {"lr": "learning_rate", "compile_": "compile"}
    for parameter in inspect.signature(app_module.demo).parameters.values():
        field = names.get(parameter.name, parameter.name)
        if field in Settings.__dataclass_fields__ and field != "methods":
            assert parameter.default == getattr(Settings(), field), field


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--video", "nowhere.mp4"], "--video 'nowhere.mp4' does not exist: check the path"),
        (["--steps", "0"], "--steps 0 is too small: pass at least 1"),
        (["--top-k", "1000"], "--top-k 1000 is outside [1, 112]"),
        (["--sparsity", "1.5"], "--sparsity 1.5 is outside [0, 1)"),
        (["--methods", "dense,flash"], "--methods 'dense,flash' is not understood"),
        (["--name", "a/b"], "--name 'a/b' is no folder name"),
        (["--name", ".."], "--name '..' is no folder name"),
        (["--resume"], "does not exist, there is nothing to resume"),
        (["--resume", "--force"], "--resume and --force exclude each other"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in _one_line_error(_invoke("demo", *arguments))
    assert list(tmp_path.iterdir()) == [], "nothing is written before the input is checked"


def test_bad_file_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("no video")
    assert "cannot be decoded" in _one_line_error(_invoke("demo", "--video", "notes.txt"))
    assert not Path("runs").exists()


def test_existing_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/demo").mkdir(parents=True)
    assert "exists: continue with --resume, replace it with --force" in _one_line_error(_invoke("demo"))


def test_cuda_without_cuda(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--device cuda" in _one_line_error(_invoke("demo", "--device", "cuda"))


@pytest.mark.parametrize("saved", [False, True])
def test_interrupt_says_how_to_continue(tmp_path, monkeypatch, saved):
    def interrupted(*_, **__):
        if saved:
            (tmp_path / "demo").mkdir()
            (tmp_path / "demo" / "checkpoint.safetensors").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_demo", interrupted)
    result = _invoke("demo", "--out", str(tmp_path))
    assert result.exit_code == 130
    assert ("with --resume" if saved else "before anything was saved: there is nothing to resume") in result.stderr


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(run, "run_demo", broken)
    result = _invoke("demo", "--out", str(tmp_path))
    assert isinstance(result.exception, RuntimeError)


def test_missing_package_of_the_extra_is_one_line(tmp_path):
    code = (  # forks: the library is imported once
        "import os, sys, flexsparse\n"
        "for missing in ('typer', 'rich', 'av', 'safetensors'):\n"
        "    if child := os.fork():\n"
        "        print(missing, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr, flush=True)\n"
        "        continue\n"
        "    sys.modules[missing] = None\n"
        "    from flexsparse.cli import main\n"
        "    main()\n"
        "    sys.exit()\n"
    )
    command = [sys.executable, "-c", code, "demo", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    said = "error: the package '{0}' is missing: run `pip install 'flexsparse[demo]'`\n{0} 2\n"
    assert result.stderr == "".join(map(said.format, ("typer", "rich", "av", "safetensors")))


def test_library_and_help_import_no_more_than_they_need():
    code = (
        "import sys, flexsparse\n"
        "commands = tuple(f'flexsparse.{name}' for name in ('cli', 'demo', 'finetune', 'training'))\n"
        "print([m for m in sys.modules if m.startswith(commands)])\n"
        "from flexsparse.cli import main\nsys.argv = ['flexsparse', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'av', 'matplotlib', 'safetensors'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.startswith("[]\n") and result.stdout.endswith("[]\n")


def test_info_lists_versions_devices_and_backends(monkeypatch):
    def fake(backend: str, device: str) -> info.Usability:
        reason = None if backend == "reference" else f"{backend} is away"
        return info.Usability(backend=backend, device=device, inference=None, training=reason)

    monkeypatch.setattr(info, "probe", fake)
    result = _invoke("info")
    assert result.exit_code == 0, result.output
    for text in ("python", "torch", "einops", "versions", "devices", "backends", "reference on cpu"):
        assert text in result.output
    assert "inference and training" in result.output
    assert "inference only; training: gather is away" in result.output


def test_probe_of_working_and_unknown_backends():
    assert info.probe("reference", "cpu").describe() == "inference and training"
    assert info.probe("gather", "cpu").describe() == "inference and training"
    unknown = info.probe("abacus", "cpu").describe()
    assert unknown.startswith("not usable: ") and "abacus" in unknown and "\n" not in unknown


def test_main_is_the_console_script():
    assert callable(cli.main)
