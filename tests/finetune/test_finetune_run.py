"""Whole tiny runs: what they write, that they learn, and that an interrupted one continues to the same curve."""

import itertools
import json
import os
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import flexsparse as fs
from finetune.tiny import options, quiet, settings, stop_after, tensors, tuned, write_video
from flexsparse.finetune import saving
from flexsparse.finetune.clips import find_clips
from flexsparse.finetune.families import WAN
from flexsparse.finetune.inputs import Batch
from flexsparse.finetune.model import load_model, prepare_model
from flexsparse.finetune.run import Result
from flexsparse.finetune.samples import Samples
from flexsparse.finetune.state import checkpoints
from flexsparse.finetune.summary import print_summary
from flexsparse.training import flow
from flexsparse.training.errors import RunError
from flexsparse.wrap import state_of

AVERAGED = {"ema_decay": 0.9, "export": "ema"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Result]:
    """An uninterrupted run on the sample clip, that exports its average."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, tuned(folder, **AVERAGED)


def test_a_run_writes_weights_logs_and_what_it_was_told(finished):
    folder, result = finished
    names = ["checkpoints", "gates.safetensors", "metrics.json", "settings.json", "tensorboard", "transformer"]
    assert sorted(os.listdir(folder)) == names
    assert json.loads((folder / "settings.json").read_text())["settings"] == settings(**AVERAGED).as_dict()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["curves"] == asdict(result.curves) and metrics["steps"] == 6 and metrics["processes"] == 1
    assert metrics["attention"] == ["blocks.0.attn1", "blocks.1.attn1"], "what is sparse"
    assert [step for step, _ in checkpoints(folder)] == [4, 6], "two are kept"
    assert not list(folder.rglob(".*")), "nothing half-written is left"


def test_the_loss_falls_in_training_and_on_held_out_frames(finished):
    _, result = finished
    assert result.curves.loss[-1] < 0.85 * result.curves.loss[0]
    first, last = result.curves.held_out
    assert (first["step"], last["step"]) == (3, 6)
    assert len(last["losses"]) == 2 and all(b < a for a, b in zip(first["losses"], last["losses"]))


def test_annealing_goes_from_dense_to_exactly_the_target(finished):
    assert finished[1].curves.sparsity == [0.0, 0.25, 0.5, 0.5, 0.5, 0.5]
    odd = settings(sparsity=0.7, anneal_step=0.3, steps=20).schedules().tiles
    odd.seek(19)
    assert odd.value == 0.7 and odd.tensor.item() == 0.7


def test_tensorboard_has_the_curve(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, result = finished
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"train/loss", "train/lr", "train/sparsity", "held_out/noise 0.3", "held_out/mean"} <= set(
        events.Tags()["scalars"]
    )
    logged = events.Scalars("train/loss")
    assert [event.step for event in logged] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in logged] == pytest.approx(result.curves.loss)


@pytest.mark.parametrize("at", [1, 3, 5])
def test_killed_and_resumed_run_has_the_same_curve_and_weights(finished, tmp_path, at):
    folder, result = finished
    with pytest.raises(InterruptedError):
        tuned(tmp_path / "run", stop_after(at), **AVERAGED)
    assert [step for step, _ in checkpoints(tmp_path / "run")] == {1: [], 3: [2], 5: [2, 4]}[at]
    resumed = tuned(tmp_path / "run", resume=True, **AVERAGED)
    assert resumed.curves == result.curves, "bitwise"
    for kind in ("model", "optimizer", "average"):
        mine, other = tensors(tmp_path / "run", kind), tensors(folder, kind)
        assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine), kind


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_so(finished, tmp_path, number, code):
    def interrupt(done: int) -> None:
        if done == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    result = tuned(tmp_path / "run", interrupt, save_every=100, **AVERAGED)
    assert 128 + result.interrupted == code and result.steps == 3 and result.written == []
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [3]
    assert signal.getsignal(number) == before, "handlers are put back"
    assert tuned(tmp_path / "run", resume=True, **AVERAGED).curves.loss == finished[1].curves.loss


def test_the_average_is_what_is_exported_and_not_the_raw_weights(finished, tmp_path):
    from safetensors.torch import load_file

    folder, _ = finished
    exported = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    raw, average = tensors(folder, "model"), tensors(folder, "average")
    assert exported.keys() == average.keys() == raw.keys()
    assert all(torch.equal(exported[name], average[name]) for name in exported)
    assert all(not torch.equal(raw[name], average[name]) for name in raw if "attn1.to_q" in name)
    tuned(tmp_path / "raw", ema_decay=0.9)
    exported = load_file(tmp_path / "raw" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(exported[name], raw[name]) for name in exported)


def test_the_average_is_the_formula(tmp_path):
    tuned(tmp_path / "run", steps=3, sparsity=0.25, save_every=1, keep=9, ema_decay=0.9)
    name = "blocks.0.attn1.to_q.weight"
    start = load_model(settings(), channels=3, text_dim=None, pixels=True).state_dict()[name]
    for step, (_, path) in enumerate(checkpoints(tmp_path / "run")):
        stored = saving.state.read_part(path, 0, 1).tensors
        decay = min(0.9, (1 + step) / (10 + step))
        start = decay * start + (1 - decay) * stored[f"model.{name}"]
        torch.testing.assert_close(stored[f"average.{name}"], start)


def _filled(folder: Path, **others):
    """The trained model, from the checkpoint."""
    told = settings(**others)
    model = load_model(told, channels=3, text_dim=None, pixels=True)
    prepare_model(model, told, options(folder)).seek(told.steps)
    assert not model.load_state_dict(tensors(folder, "model"), strict=False).unexpected_keys
    return model.eval()


def _sample(model) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    z, text = torch.randn(1, 3, 4, 32, 32, generator=g), torch.randn(1, 4, 64, generator=g)
    batch = Batch(noisy=z, t=torch.tensor([0.5]), text=text, lengths=torch.tensor([4]), pooled=None)
    with torch.no_grad():
        return WAN.velocity(model, model.config, batch)


def test_what_is_written_loads_again_and_gives_the_same_sample(tmp_path):
    from diffusers import WanTransformer3DModel

    folder = tmp_path / "run"
    tuned(folder)
    model = WanTransformer3DModel.from_pretrained(folder / "transformer")
    fs.wrap(model, fs.VSA(sparsity=0.5), tile=(2, 4, 4), gates=True, compile=False)
    without = _sample(model)
    assert len(fs.load_gates(model, folder / "gates.safetensors")) == 2
    wanted = _sample(_filled(folder))
    torch.testing.assert_close(_sample(model), wanted, rtol=0, atol=0)
    assert not torch.equal(without, wanted), "the gates were trained"


def test_lora_trains_adapters_and_gates_only_and_loads_again(tmp_path):
    from diffusers.loaders import WanLoraLoaderMixin

    folder = tmp_path / "run"
    result = tuned(folder, lora_rank=2, learning_rate=2e-2)
    trained = tensors(folder, "model")
    assert all("lora_" in name or "to_gate_compress" in name for name in trained)
    assert {name.split(".")[-2] for name in trained} == {"default", "to_gate_compress"}
    assert all(bool(value.any()) for name, value in trained.items()), "all of them moved from zero"
    assert sorted(p.name for p in result.written) == ["gates.safetensors", "pytorch_lora_weights.safetensors"]
    assert result.curves.loss[-1] < result.curves.loss[0]
    model = load_model(settings(), channels=3, text_dim=None, pixels=True)
    name = "pytorch_lora_weights.safetensors"
    model.load_lora_adapter(str(folder), weight_name=name)
    for_pipelines = WanLoraLoaderMixin.lora_state_dict(str(folder), weight_name=name)
    assert len(for_pipelines) == 32 and all(key.startswith("transformer.blocks.") for key in for_pipelines)
    fs.wrap(model, fs.VSA(sparsity=0.5), tile=(2, 4, 4), gates=True, compile=False)
    fs.load_gates(model, folder / "gates.safetensors")
    base = fs.wrap(
        load_model(settings(), channels=3, text_dim=None, pixels=True), fs.VSA(sparsity=0.5), (2, 4, 4), compile=False
    )
    wanted = _sample(_filled(folder, lora_rank=2))
    torch.testing.assert_close(_sample(model), wanted)
    assert not torch.allclose(_sample(base), wanted, atol=1e-3)


def test_gates_can_be_continued(finished, tmp_path):
    folder, _ = finished
    gates = str(folder / "gates.safetensors")
    model = load_model(settings(), channels=3, text_dim=None, pixels=True)
    prepare_model(model, settings(gates_from=gates), options(tmp_path))
    assert all(bool(parameter.any()) for parameter in fs.gate_parameters(model))
    with pytest.raises(RunError, match=r"--gates-from .*no such file"):
        prepare_model(
            load_model(settings(), channels=3, text_dim=None, pixels=True), settings(gates_from="x"), options(tmp_path)
        )


def test_bsa_anneals_queries_too_and_learns(tmp_path):
    result = tuned(tmp_path / "run", method="bsa", bf16=True, gradient_checkpointing=True)
    assert result.curves.sparsity == [0.0, 0.25, 0.5, 0.5, 0.5, 0.5]
    assert result.curves.loss[-1] < 0.85 * result.curves.loss[0]
    assert [path.name for path in result.written] == ["transformer"], "BSA has no gates"
    told = settings(method="bsa", keep_queries=0.25)
    told.schedules().seek(5)
    schedules = told.schedules()
    schedules.seek(5)
    assert (schedules.tiles.value, schedules.queries.value) == (0.5, 0.25)
    assert settings(method="bsa", anneal_queries=False).schedules().queries is None


def test_builders_are_what_the_settings_say(tmp_path):
    def builder(**others):
        model = load_model(settings(), channels=3, text_dim=None, pixels=True)
        prepare_model(model, settings(**others), options(tmp_path))
        return state_of(model).backend.rules

    assert builder(anneal=False).builders[0].sparsity == 0.5
    found = builder(anneal=False, method="bsa", keep_queries=0.25, sparsity=0.75).builders[0]
    assert (found.kv_density, found.keep_queries) == (0.25, 0.25)
    found = builder(method="bsa", keep_queries=0.25, sparsity=0.75).builders[0]
    assert (found.kv_density.target, found.keep_queries.target) == (0.25, 0.25)
    assert builder(dense_layers=(-1,)).rules[0] == ("blocks.1", None)


def test_a_step_is_the_same_in_one_piece_or_in_several(tmp_path):
    one = tuned(tmp_path / "one", batch=4, micro_batch=4, steps=3, sparsity=0.25)
    several = tuned(tmp_path / "several", batch=4, micro_batch=2, steps=3, sparsity=0.25)
    assert several.curves.loss == pytest.approx(one.curves.loss, rel=1e-5)
    assert several.curves.held_out[0]["losses"] == pytest.approx(one.curves.held_out[0]["losses"], rel=1e-5)


def test_bad_clips_are_skipped_listed_and_remembered(tmp_path):
    data = tmp_path / "clips"
    for index in range(3):
        write_video(data / f"good-{index}.mp4", seed=index)
    write_video(data / "short.mp4", frames=2)
    (data / "sub").mkdir()
    (data / "sub" / "text.mp4").write_text("no video")
    whole = (data / "good-0.mp4").read_bytes()
    (data / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InterruptedError):
        tuned(tmp_path / "run", stop_after(5), data=str(data), batch=2)
    result = tuned(tmp_path / "run", data=str(data), batch=2, resume=True)
    assert sorted(result.bad) == ["cut.mp4", "short.mp4", "sub/text.mp4"]
    assert "2 frame(s)" in result.bad["short.mp4"] and "\n" not in "".join(result.bad.values())
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["skipped_clips"] == result.bad
    assert tuned(tmp_path / "again", data=str(data), batch=2).curves == result.curves
    console = quiet()
    print_summary(result, settings(), tmp_path / "run", console)
    shown = console.file.getvalue()
    assert "skipped clips: 3" in shown and "short.mp4: the file has 2 frame(s)" in shown and "noise 0.7" in shown


def test_a_resumed_run_knows_clips_that_were_skipped_before(tmp_path):
    data = tmp_path / "clips"
    for index in range(10):
        write_video(data / f"{index}.mp4", seed=index)
    told = settings(data=str(data))
    clips = find_clips(told)
    samples = Samples(told, clips)
    before = set(samples.reader._kept)
    samples.sample(0), samples.sample(1), samples.sample(2)
    bad = next(clip for clip in samples.train if clip.name in set(samples.reader._kept) - before)
    bad.path.write_bytes(bad.path.read_bytes()[:300])
    assert Samples(told, clips).reader.bad == {}
    with pytest.raises(InterruptedError):
        tuned(tmp_path / "run", stop_after(4), data=str(data))
    fresh = Samples(told, clips)
    assert all(fresh.sample(number) for number in (4, 5, 6, 7)) and not fresh.reader.bad, "it is not met again"
    assert list(tuned(tmp_path / "run", data=str(data), resume=True).bad) == [bad.name]


def test_folder_with_no_usable_clip(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(RunError, match=r"--data .*none of 1 clips can be used; a\.mp4: the file cannot be decoded"):
        tuned(tmp_path / "run", data=str(tmp_path))
    assert not (tmp_path / "run").exists()


def test_resuming_something_else_is_refused(finished, tmp_path):
    folder, _ = finished
    with pytest.raises(RunError, match=r"--resume with other settings \(--lr is 0.1, the run has 0.002\)"):
        tuned(folder, resume=True, learning_rate=0.1, **AVERAGED)
    with pytest.raises(RunError, match=r"exists: continue with --resume, replace it with --force"):
        tuned(folder, **AVERAGED)
    data = tmp_path / "clips"
    write_video(data / "a.mp4")
    with pytest.raises(InterruptedError):
        tuned(tmp_path / "run", stop_after(2), data=str(data))
    same = str(data.parent / "." / data.name / "..") + "/" + data.name
    with pytest.raises(InterruptedError):
        tuned(tmp_path / "run", stop_after(3), data=same, resume=True)
    write_video(data / "b.mp4")
    with pytest.raises(RunError, match=r"--data .* has other clips than the run began with"):
        tuned(tmp_path / "run", data=str(data), resume=True)


def test_a_corrupt_checkpoint_is_named_and_the_one_before_serves(finished, tmp_path):
    with pytest.raises(InterruptedError):
        tuned(tmp_path / "run", stop_after(4), **AVERAGED)
    _, last = checkpoints(tmp_path / "run")[-1]
    file = last / "part-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(RunError, match=r"step-00000004.*is corrupt.*checksum"):
        tuned(tmp_path / "run", resume=True, **AVERAGED)
    file.unlink()
    with pytest.raises(RunError, match=r"step-00000004' is empty: remove it"):
        tuned(tmp_path / "run", resume=True, **AVERAGED)
    last.rmdir()
    assert tuned(tmp_path / "run", resume=True, **AVERAGED).curves == finished[1].curves


def test_a_full_disk_keeps_the_checkpoint_before(finished, tmp_path, monkeypatch):
    names = saving.state.save_checkpoint.__globals__
    real = names["write_atomically"]

    def full(path, data):
        if "00000004" in str(path):
            raise OSError(28, "No space left on device")
        real(path, data)

    with monkeypatch.context() as patched:
        patched.setitem(names, "write_atomically", full)
        with pytest.raises(RunError, match=r"No space left on device.*--resume"):
            tuned(tmp_path / "run", **AVERAGED)
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [2]
    assert tuned(tmp_path / "run", resume=True, **AVERAGED).curves == finished[1].curves
    assert not list((tmp_path / "run" / "checkpoints").glob(".*")), "what was half-written is gone"


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("flexsparse.training.flow.velocity_loss", lambda v, clean, noise: v.sum() * float("inf"))
    with pytest.raises(
        RunError, match=r"the loss is -?(nan|inf) at step 1, before any update: look at --model's weights"
    ):
        tuned(tmp_path / "run")


def test_a_gradient_that_is_not_finite_reaches_no_weight(tmp_path, monkeypatch):
    """In the last step, where no later loss would show it."""
    told = {"steps": 2, "sparsity": 0.25, "save_every": 1, "ema_decay": 0.9}
    calls, real = itertools.count(1), flow.velocity_loss

    def broken(v, clean, noise):
        if v.requires_grad and next(calls) == 2:
            v.register_hook(lambda grad: grad * float("nan"))
        return real(v, clean, noise)

    with monkeypatch.context() as patched:
        patched.setattr("flexsparse.training.flow.velocity_loss", broken)
        with pytest.raises(RunError, match=r"the gradient's norm is nan at step 2: .*--force .*smaller --lr.*--resume"):
            tuned(tmp_path / "run", **told)
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [1]
    assert not (tmp_path / "run" / "transformer").exists()
    assert tuned(tmp_path / "run", resume=True, **told).steps == 2
    assert all(x.isfinite().all() for kind in ("model", "average") for x in tensors(tmp_path / "run", kind).values())


def test_force_removes_nothing_that_the_run_reads(tmp_path):
    """The weights of the first stage were gone before the second began."""
    folder = tmp_path / "run"
    tuned(folder, steps=3, anneal_step=0.5)
    weights = (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    for told in (
        {"model": str(folder / "transformer")},
        {"model": str(folder)},
        {"model": str(tmp_path / "other"), "gates_from": str(folder / "gates.safetensors")},
        {"data": str(folder / "transformer")},
    ):
        (tmp_path / "other").mkdir(exist_ok=True)
        with pytest.raises(RunError, match=r"--force would remove '.*', where --\S+ '.*' is: pass another --out"):
            tuned(folder, steps=3, force=True, **told)
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    assert (folder / "gates.safetensors").is_file() and checkpoints(folder)


def test_full_disks_are_one_line(tmp_path, monkeypatch):
    """As the result is written, which safetensors reports in a way of its own, and as logs are."""
    from safetensors import SafetensorError

    from flexsparse.finetune import export

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(export, "_write", full)
        with pytest.raises(RunError, match=r"the result in .*No space left on device.*--resume"):
            tuned(tmp_path / "run", steps=3, anneal_step=0.5)
    assert tuned(tmp_path / "run", steps=3, anneal_step=0.5, resume=True).written

    from accelerate import Accelerator

    def no_logs(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Accelerator, "log", no_logs)
        with pytest.warns(UserWarning, match="the logs end before step 1: they cannot be written"):
            assert tuned(tmp_path / "other", steps=3, anneal_step=0.5).steps == 3
    with monkeypatch.context() as patched:
        patched.setattr(Accelerator, "init_trackers", no_logs)
        with pytest.raises(RunError, match=r"the logs in .*tensorboard' cannot be written \(No space left on device\)"):
            tuned(tmp_path / "third", steps=3, anneal_step=0.5)


def test_a_vae_for_latents_is_an_error(tmp_path):
    from safetensors.torch import save_file

    for name in "ab":
        save_file({"latents": torch.zeros(4, 2, 8, 8)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(RunError, match=r"--vae 'somewhere': --data '.*' holds latents already: leave --vae out"):
        tuned(tmp_path / "run", data=str(tmp_path), vae="somewhere", frames=5)


def test_seeds_of_any_size(tmp_path):
    assert tuned(tmp_path / "run", steps=3, anneal_step=0.5, seed=99999999999999).steps == 3


def test_force_replaces_the_run_and_nothing_else(tmp_path):
    folder = tmp_path / "run"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "old").touch()
    (folder / "keep.txt").write_text("mine")
    tuned(folder, steps=3, sparsity=0.25, force=True)
    assert (folder / "keep.txt").read_text() == "mine"
    assert sorted(os.listdir(folder / "transformer")) == ["config.json", "diffusion_pytorch_model.safetensors"]
