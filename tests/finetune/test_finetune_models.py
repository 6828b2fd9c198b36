"""Each class of docs/models.md through a whole run on latents: it learns, gates are trained, what is written loads again."""

import json
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models.zoo import ZOO, Entry
from safetensors.torch import load_file, save_file

import flexsparse as fs
from finetune.tiny import forget_accelerate, options, quiet, settings, stop_after, tensors, tuned, write_video
from flexsparse.finetune.clips import find_clips
from flexsparse.finetune.families import FAMILIES, WAN, family_of
from flexsparse.finetune.inputs import EMBEDDINGS, collate, takes_of
from flexsparse.finetune.model import Encoder
from flexsparse.finetune.objectives import objective_of
from flexsparse.finetune.run import finetune
from flexsparse.finetune.samples import Samples
from flexsparse.training.errors import RunError

RUN: dict[str, Any] = {
    "steps": 8,
    "eval_every": 2,
    "anneal": False,
    "sparsity": 0.5,
    "learning_rate": 1e-2,
    "tile": (2, 4, 4),
    "text_tokens": 8,
}
SMALL = ("hunyuan", "hunyuan15", "ltx", "motif")  # one latent is one token


@dataclass(frozen=True)
class Case:
    """A model of the zoo, with changes to its configuration and to `RUN`."""

    name: str
    others: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, clips: Path) -> tuple[str, str]:
        """Writes the model, and one clip twice with all that it may take."""
        kind, config = ZOO[self.name].make
        model = Entry(make=(kind, {**config, **self.others}), inputs=ZOO[self.name].inputs, sparse=()).model()
        model.save_pretrained(folder)
        takes = takes_of(family_of(type(model), model.config), model.config, RUN["text_tokens"], vae=False)
        side = (4, 8, 8) if self.name in SMALL else (4, 16, 16)
        g = torch.Generator().manual_seed(0)
        colours = torch.randn(takes.latents, 1, 1, 1, generator=g).sign() * 1.5  # what a few steps can learn
        clip = {"latents": colours + 0.1 * torch.randn(takes.latents, *side, generator=g)}
        for name, width in takes.channels.items():
            clip[name] = torch.randn(*([5] * (EMBEDDINGS[name] - 1)), width, generator=g)
        if takes.condition == "clip":
            clip["condition"] = torch.randn(takes.latents, *side, generator=g)
        clips.mkdir()
        for name in ("a", "b"):
            save_file(clip, str(clips / f"{name}.safetensors"))
        return str(folder), str(clips)


CASES = {
    "wan": Case("wan"),
    "wan of image to video": Case("wan", {"in_channels": 12, "image_dim": 6, "added_kv_proj_dim": 32}),
    "skyreels": Case("skyreels"),
    "hunyuan": Case("hunyuan"),
    "hunyuan15": Case("hunyuan15", {"in_channels": 9}),
    "cogvideox": Case("cogvideox"),
    "ltx": Case("ltx"),
    "mochi": Case("mochi", {"max_sequence_length": 8}),
    "allegro": Case("allegro"),
    "chronoedit": Case("chronoedit", {"in_channels": 12, "image_dim": 6, "added_kv_proj_dim": 32}),
    "easyanimate": Case("easyanimate", {"mmdit_layers": 2}),
    "kandinsky5": Case("kandinsky5", {"visual_cond": True}),
    "motif": Case("motif", {"in_channels": 9}),
    "cosmos 1": Case("cosmos", run={"steps": 16, "eval_every": 4}),
    "cosmos predict2": Case("cosmos", {"in_channels": 5, "extra_pos_embed_type": None}),
}


def _held_out(model, model_folder: str, data: str) -> list[float]:
    """The losses of a validation, of a model that was loaded again."""
    told = settings(**RUN, model=model_folder, data=data)
    family = family_of(type(model).__mro__[0], model.config)
    published = None if family.scheduler is None else family.scheduler(model.config)
    objective = objective_of(model_folder, published)
    sample = Samples(told, find_clips(told)).held_out()[0]
    takes = takes_of(family, model.config, told.text_tokens, vae=False)
    clean, noise = sample.clean[None], torch.randn(1, *sample.clean.shape, generator=sample.random)
    condition = {None: None, "clip": sample.given.get("condition"), "latents": sample.clean}[takes.condition]
    losses = []
    for level in told.noise_levels:
        t = objective.told(torch.tensor([level]))
        batch = collate(
            [sample.given],
            objective.noisy(clean, noise, t),
            t,
            takes,
            condition=condition[None] if condition is not None else None,
        )
        with torch.no_grad():
            losses.append(float(objective.loss(family.velocity(model, model.config, batch), clean, noise, t)))
    return losses


@pytest.mark.parametrize(("case", "method"), [*((name, "vsa") for name in CASES), ("cogvideox", "bsa")])
def test_a_model_learns_and_what_is_written_loads_again(tmp_path, case, method):
    model_folder, data = CASES[case].save(tmp_path / "model", tmp_path / "clips")
    folder = tmp_path / "run"
    if case == "cogvideox":  # as in its pipeline's folder
        (tmp_path / "scheduler").mkdir()
        said = {
            **FAMILIES["CogVideoXTransformer3DModel"].scheduler({"use_rotary_positional_embeddings": True}),
            "snr_shift_scale": 2.0,
        }
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(said))
    told = RUN | CASES[case].run
    result = tuned(folder, model=model_folder, data=data, method=method, save_every=told["steps"], **told)
    first, *_, last = (point["mean"] for point in result.curves.held_out)
    assert last < 0.97 * first, "held out is the very latents that were trained"
    assert not result.bad
    sparse = json.loads((folder / "metrics.json").read_text())["attention"]
    assert sorted(sparse) == sorted(ZOO[CASES[case].name].sparse)
    stepped = {name.rpartition(".")[0] for name in tensors(folder, "optimizer")}
    assert stepped == tensors(folder, "model").keys(), "DDP waits for the gradient of every trained parameter"
    kind = type(ZOO[CASES[case].name].model())
    model = kind.from_pretrained(folder / "transformer").train()
    builder = fs.VSA(sparsity=0.5) if method == "vsa" else fs.BSA(keep_queries=0.5, kv_density=0.5)
    fs.wrap(model, builder, tile=RUN["tile"], gates=method == "vsa", compile=False)
    if method == "vsa":
        gates = load_file(folder / "gates.safetensors")
        assert len(gates) == 2 * len(sparse) and all(bool(value.any()) for value in gates.values())
        assert _held_out(model, model_folder, data) != result.curves.held_out[-1]["losses"], "the gates matter"
        fs.load_gates(model, folder / "gates.safetensors")
    kept = folder / "scheduler" / "scheduler_config.json"
    assert kept.is_file() == (case == "cogvideox") and (not kept.is_file() or json.loads(kept.read_text()) == said)
    assert _held_out(model, model_folder, data) == pytest.approx(result.curves.held_out[-1]["losses"], rel=1e-6)


@pytest.mark.parametrize("case", ["cogvideox", pytest.param("hunyuan15", marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_same_curve(tmp_path, case):
    model_folder, data = CASES[case].save(tmp_path / "pipe" / "transformer", tmp_path / "clips")
    told = {**RUN, "model": model_folder, "data": data, "steps": 5, "save_every": 2}
    whole = tuned(tmp_path / "whole", **told)
    with pytest.raises(InterruptedError):
        tuned(tmp_path / "run", stop_after(3), **told)
    if case == "cogvideox":
        other = tmp_path / "pipe" / "scheduler" / "scheduler_config.json"
        other.parent.mkdir()
        other.write_text(json.dumps({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}))
        with pytest.raises(RunError, match="has another scheduler than the run began with"):
            tuned(tmp_path / "run", resume=True, **told)
        other.unlink()
    resumed = tuned(tmp_path / "run", resume=True, **told)
    assert resumed.curves == whole.curves, "bitwise"
    for kind in ("model", "optimizer"):
        mine, theirs = tensors(tmp_path / "run", kind), tensors(tmp_path / "whole", kind)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine), kind


@pytest.mark.slow
@pytest.mark.parametrize("case", ["hunyuan15", "cogvideox", "hunyuan"])
def test_compiled_blocks_with_joint_text_give_the_curve_of_the_uncompiled_run(tmp_path, fresh_dynamo, case):
    model_folder, data = CASES[case].save(tmp_path / "model", tmp_path / "clips")
    told = {**RUN, "model": model_folder, "data": data, "steps": 4}
    compiled = tuned(tmp_path / "compiled", compile="regional", wrap={"inner": "aot_eager"}, **told)
    torch._dynamo.reset()
    eager = tuned(tmp_path / "eager", **told)
    assert compiled.curves.loss == pytest.approx(eager.curves.loss, rel=1e-4)


@pytest.mark.parametrize(
    ("case", "others", "message"),
    [
        ("mochi", {"compile": "whole"}, r"--compile 'whole': .* breaks such a graph: pass --compile off"),
        ("hunyuan15", {"compile": "whole"}, r"pass --compile regional"),
        ("cogvideox", {"time_shift": 2.0}, r"--time-shift 2: "),
        ("cogvideox", {"text_tokens": 9}, r"--text-tokens 9: "),
    ],
)
def test_what_a_model_cannot_do_is_said_before_anything_is_written(tmp_path, case, others, message):
    model_folder, data = CASES[case].save(tmp_path / "model", tmp_path / "clips")
    with pytest.raises(RunError, match=message):
        tuned(tmp_path / "run", **{**RUN, "model": model_folder, "data": data, **others})
    assert not (tmp_path / "run").exists()


def test_latents_that_no_patch_fits_and_clips_without_text(tmp_path):
    model_folder, data = CASES["cogvideox"].save(tmp_path / "model", tmp_path / "clips")
    for name in ("a", "b"):
        save_file({"latents": torch.randn(4, 2, 8, 8)}, str(tmp_path / "clips" / f"{name}.safetensors"))
    console = quiet()
    tuned(tmp_path / "run", console=console, **{**RUN, "model": model_folder, "data": data, "steps": 1})
    shown = console.file.getvalue()
    assert "learns v_prediction on the schedule of a CogVideoXDDIMScheduler" in shown
    assert "the first clip brings no text: zeros are given" in shown
    for name in ("a", "b"):
        save_file({"latents": torch.randn(4, 2, 7, 8)}, str(tmp_path / "clips" / f"{name}.safetensors"))
    with pytest.raises(RunError, match=r"latents have 7 rows, and its patches take multiples of 2: pass others"):
        tuned(tmp_path / "odd", **{**RUN, "model": model_folder, "data": data})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"sample_height": 6}, "latents have 8 rows, and its learned positions are of 6: pass others"),
        ({"sample_frames": 17}, "latents have 4 frames, and its learned positions are of 5: pass others"),
        ({}, None),
    ],
)
def test_positions_that_were_learned_at_another_size(tmp_path, sizes, message):
    """diffusers raises for rows and columns, and takes other positions for frames."""
    learned = {"use_learned_positional_embeddings": True, "use_rotary_positional_embeddings": True}
    fits = {"sample_frames": 13, "sample_height": 8, "sample_width": 8, "temporal_compression_ratio": 4}
    model_folder, data = Case("cogvideox", {**learned, **fits, **sizes}).save(tmp_path / "model", tmp_path / "clips")
    for name in ("a", "b"):
        save_file({"latents": torch.randn(4, 4, 8, 8)}, str(tmp_path / "clips" / f"{name}.safetensors"))
    with nullcontext() if message is None else pytest.raises(RunError, match=message):
        tuned(tmp_path / "run", **{**RUN, "model": model_folder, "data": data, "steps": 1})


def test_a_model_of_image_to_video_sees_the_first_frame_of_videos(tmp_path, vae):
    """With a VAE, the condition is the window's own first frame, encoded with zeros after it."""
    model_folder, _ = Case("wan", {"in_channels": 12}).save(tmp_path / "model", tmp_path / "unused")
    write_video(tmp_path / "clips" / "a.mp4", frames=12)
    told = {
        **RUN,
        "model": model_folder,
        "data": str(tmp_path / "clips"),
        "vae": str(vae),
        "frames": 5,
        "tile": (2, 2, 2),
    }
    seen = []

    def velocity(model, config, batch):
        seen.append(batch.condition)
        return WAN.velocity(model, config, batch)

    forget_accelerate()
    options_, settings_ = options(tmp_path / "run"), settings(**{**told, "steps": 1})
    finetune(settings_, options_, quiet(), family=replace(WAN, velocity=velocity))
    window = Samples(settings_, find_clips(settings_)).sample(0).clean[None]
    encoder = Encoder(settings_)
    assert torch.equal(seen[0], encoder.first_frame(window)), "the first call is the first training sample"
    torch.testing.assert_close(seen[0][:, :, 0], encoder(window)[:, :, 0], msg="a first frame is encoded by itself")
    assert not torch.equal(seen[0][:, :, 1], encoder(window)[:, :, 1])
