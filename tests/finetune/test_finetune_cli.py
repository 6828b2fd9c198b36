"""`flexsparse finetune` as its user meets it: options, errors on one line, exit codes, kills."""

import inspect
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("typer")
from typer.testing import CliRunner

from finetune.tiny import forget_accelerate
from flexsparse.cli import app as app_module
from flexsparse.cli.app import app
from flexsparse.finetune.settings import Options, Settings
from flexsparse.finetune.state import checkpoints

SIZES = "--frames 4 --height 32 --width 32 --tile 2,4,4 --text-tokens 4 --noise-levels 0.5 --device cpu --threads 1"
RUN = f"{SIZES} --compile off --anneal-every 5 --anneal-step 0.25 --sparsity 0.5 --steps 40 --save-every 3 --eval-every 20"


def _invoke(*arguments: str):
    forget_accelerate()
    return CliRunner().invoke(app, ["finetune", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def _command(folder: Path, *extra: str) -> list[str]:
    place = ["--out", str(folder.parent), "--name", folder.name]
    return [sys.executable, "-m", "flexsparse.cli", "finetune", *RUN.split(), *place, *extra]


def test_help_names_every_option():
    output = _invoke("--help").output
    for parameter in inspect.signature(app_module.finetune).parameters:
        assert f"--{parameter.strip('_').replace('_', '-')}" in output, parameter


def test_defaults_are_those_of_the_settings_and_every_setting_has_an_option():
    names = {"lr": "learning_rate", "lora": "lora_rank", "ema": "ema_decay", "compile_": "compile"}
    fields = {**Settings.__dataclass_fields__, **Options.__dataclass_fields__}
    parameters = inspect.signature(app_module.finetune).parameters
    told = {names.get(name, name): parameter.default for name, parameter in parameters.items()}
    assert set(fields) - set(told) == {"folder", "wrap"}
    assert told["keep_queries"] is None, "whether it was given is asked"
    told["keep_queries"] = app_module.share_of_queries(None, "bsa")
    for name, default in told.items():
        if name in fields:
            wanted = fields[name].default
            assert default == (",".join(map(str, wanted)) if isinstance(wanted, tuple) else wanted), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "--steps 0 is too small: pass at least 1"),
        ("--keep-queries 0.4", "--keep-queries is 0.4, but --method is vsa, which keeps all queries"),
        ("--sparsity 1", "--sparsity 1.0 is outside [0, 1)"),
        ("--method flash", "--method 'flash' is unknown: pass vsa or bsa"),
        ("--lr nan", "--lr nan is no finite number above 0: pass for example 0.0001"),
        ("--tile 4,4", "--tile '4,4' is no tile: pass three sizes"),
        ("--tile 99,99,99", "--tile '99,99,99' has 970299 tokens: pass one of at most 4096"),
        ("--tile 4,4,x", "--tile '4,4,x' is not understood: pass numbers separated by commas"),
        ("--noise-levels 0", "--noise-levels '0.0': pass times in (0, 1]"),
        ("--export ema", "--export 'ema' needs a moving average: pass for example --ema 0.999"),
        ("--steps 100", "--steps 100 is too small: annealing to --sparsity 0.875 takes 1500"),
        ("--method bsa --gates-from x", "--gates-from 'x' without gates: pass --method vsa"),
        ("--compile maybe", "--compile 'maybe' is unknown: pass whole, regional, off"),
        ("--device tpu", "--device 'tpu' is unknown: pass auto, cpu or cuda"),
        ("--save-every 0", "--save-every 0 is too small"),
        ("--batch 3 --micro-batch 2", "--batch 3 is no multiple of 2 (--micro-batch 2 on 1 processes): pass one"),
        ("--name a/b", "--name 'a/b' is no folder name"),
        ("--data nowhere", "--data 'nowhere' does not exist: pass a folder of clips, or 'sample'"),
        ("--model nowhere", "--model 'nowhere' is no folder of a diffusers transformer"),
        ("--dense-layers 7 --frames 4", "--model 'tiny': dense_layers has 7"),
        ("--lora 2 --lora-targets nothing", "--lora-targets 'nothing'"),
        ("--lora 2 --lora-targets to_q,to_kk", "--lora-targets 'to_q,to_kk': no module of the model is called to_kk"),
        ("--lora-targets to_q", "--lora-targets 'to_q' without adapters: pass --lora RANK too"),
        (f"--seed {10**30}", f"--seed {10**30} is negative or too large: pass a number from 0"),
        ("--seed -1", "--seed -1 is negative or too large"),
        (f"--name {'n' * 256}", f"--name '{'n' * 40}...' has names of more than 255 bytes: pass a shorter path"),
        (f"--out {'n/' * 2048}", "--out 'n/n/"),
        (f"--data {'n' * 256}", "--data 'nnn"),
        (f"--model {'n' * 256}", "--model 'nnn"),
        (f"--vae {'n' * 256}", "--vae 'nnn"),
        (f"--gates-from {'n' * 256}", "--gates-from 'nnn"),
        ("--vae nowhere", "--vae 'nowhere' is no folder of an AutoencoderKLWan"),
        ("--resume", "does not exist, there is nothing to resume"),
        ("--resume --force", "--resume and --force exclude each other"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = _invoke("--device", "cpu", *arguments.split())
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "runs").exists(), "the corrected command would be refused"


@pytest.mark.parametrize("option", ["data", "model", "vae", "name"])
def test_an_empty_path_is_no_folder(tmp_path, monkeypatch, option):
    """A variable of the shell that is not set: the folder that the command runs in was trained on."""
    monkeypatch.chdir(tmp_path)
    result = _invoke("--device", "cpu", f"--{option}", "")
    assert result.exit_code == 2 and f"--{option} '' is empty: pass a path, or leave --{option} out" in result.stderr


def test_a_configuration_of_accelerate_that_does_not_fit(tmp_path, monkeypatch):
    for variable, value, message in [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2", "gradient_accumulation_steps is 2: set it to 1"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend is set: set it to 'no'"),
    ]:
        with monkeypatch.context() as patched:
            patched.setenv(variable, value)
            result = _invoke("--device", "cpu", "--out", str(tmp_path))
            assert result.exit_code == 2 and message in result.stderr, result.output


@pytest.mark.parametrize("missing", ["accelerate", "tensorboard", "peft"])
def test_missing_package_of_the_extra_is_one_line(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    result = _invoke("--out", str(tmp_path), "--lora", "2")
    assert result.exit_code == 2
    assert result.stderr == f"error: the package '{missing}' is missing: run `pip install 'flexsparse[finetune]'`\n"


def _wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any(done >= step for done, _ in checkpoints(folder)):
            return
        time.sleep(0.02)


@pytest.mark.parametrize("saved", [False, True])
def test_ctrl_c_before_training_advises_only_what_can_be_done(tmp_path, monkeypatch, saved):
    def interrupted(*_, **__):
        if saved:
            (tmp_path / "run" / "checkpoints" / "step-1").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("flexsparse.finetune.run.finetune", interrupted)
    result = _invoke("--out", str(tmp_path), "--name", "run", "--device", "cpu")
    assert result.exit_code == 130
    assert ("from its last checkpoint with --resume" in result.stderr) == saved
    assert ("interrupted before anything was saved: there is nothing to resume" in result.stderr) != saved


@pytest.mark.slow
def test_interrupted_and_killed_process_resumes_to_the_same_curve(tmp_path):
    """SIGINT, then SIGKILL, then to the end: the curve of a run that nobody disturbed, bit by bit."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(_command(run), **quiet)
    _wait_for_step(process, run, 3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors.decode()
    interrupted_at = checkpoints(run)[-1][0]
    assert f"interrupted after step {interrupted_at}, saved; continue with --resume" in errors.decode()
    assert "Traceback" not in errors.decode() and not (run / "transformer").exists()
    assert json.loads((run / "metrics.json").read_text())["steps"] == interrupted_at < 40
    process = subprocess.Popen(_command(run, "--resume"), **quiet)
    _wait_for_step(process, run, interrupted_at + 3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    assert interrupted_at < checkpoints(run)[-1][0] < 40
    for folder, extra in ((run, ["--resume"]), (whole, [])):
        result = _invoke(*_command(folder, *extra)[4:])
        assert result.exit_code == 0, result.output
    curves = [json.loads((folder / "metrics.json").read_text())["curves"] for folder in (run, whole)]
    assert curves[0] == curves[1] and len(curves[0]["loss"]) == 40
    weights = [(folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() for folder in (run, whole)]
    assert weights[0] == weights[1]
