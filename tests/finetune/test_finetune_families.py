"""Each family calls its model as the pipeline of diffusers does: the same arguments, and so the same output."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models.zoo import (
    ALLEGRO,
    COGVIDEOX,
    EASYANIMATE,
    HUNYUAN,
    HUNYUAN15,
    KANDINSKY5,
    LTX,
    MOCHI,
    MOTIF,
    WAN,
    ZOO,
    Entry,
)
from torch import Tensor, nn

from finetune.pipelines import LENGTH, Recorder, Step, Vae, masked, pipeline_step, text
from finetune.tiny import settings
from flexsparse.finetune.families import FAMILIES, UNTRAINED, family_of
from flexsparse.finetune.inputs import Batch, collate, takes_of
from flexsparse.finetune.model import Encoder

ONE_STEP = {"guidance_scale": 1.0, "num_inference_steps": 1}


def _model(name: str, **others: Any):
    kind, config = ZOO[name].make
    return Entry(make=(kind, {**config, **others}), inputs=ZOO[name].inputs, sparse=()).model()


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, tuple | list):
        return [x for part in value for x in _flat(part)]
    return [torch.as_tensor(value).float()]


def _compare(
    pipeline: str,
    model: nn.Module,
    latents: Tensor,
    size: tuple[int, int, int],
    told: dict[str, Any],
    clip: dict[str, Tensor],
    tokens: int,
    *,
    plain: Callable[[Tensor], Tensor] = lambda latents: latents,
    time: Callable[[Tensor], Tensor] = lambda timestep: timestep / 1000,
    condition: Tensor | None = None,
    stepped: Callable[[Batch, Tensor, Step], Tensor] | None = None,
) -> None:
    """The pipeline's first step, and ours with the same noise, time and embeddings.

    Args:
        pipeline: its class.
        model: its transformer.
        latents: noise, as the pipeline takes it.
        size: frames, rows and columns, in pixels.
        told: what the pipeline is called with.
        clip: the same as a clip brings it.
        tokens: of the text.
        plain: brings the pipeline's latents into `[B, C, T, H, W]`.
        time: brings what the model is told into [0, 1]; 1 is noise.
        condition: latents of the first frame.
        stepped: where a prediction takes the pipeline's latents; `_stepped` by default.
    """
    family = family_of(type(model), model.config)
    recorder = Recorder(model)
    step = pipeline_step(pipeline, model, latents, size, dict(told))
    theirs = recorder.calls[0]
    t = float(time(theirs["timestep"].flatten()[-1]))
    noisy = plain(theirs["hidden_states"])
    takes = takes_of(family, model.config, tokens, vae=False)
    batch = collate([clip], noisy[:, : takes.latents], torch.tensor([t]), takes, condition=condition)
    with torch.no_grad():
        prediction = family.velocity(model, model.config, batch)
    ours = recorder.calls[-1]
    assert ours.keys() == theirs.keys()
    for name in ours:
        for mine, other in zip(_flat(ours[name]), _flat(theirs[name]), strict=True):
            torch.testing.assert_close(mine, other, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(recorder.outputs[-1], recorder.outputs[0])
    torch.testing.assert_close((stepped or _stepped)(batch, prediction, step), plain(step.after), atol=1e-4, rtol=1e-4)


def _stepped(batch: Batch, prediction: Tensor, step: Step) -> Tensor:
    """Where a prediction takes its noisy latents, by the objective's definition, in the pipeline's first step."""
    scheduler = step.scheduler
    if not hasattr(scheduler, "alphas_cumprod"):
        return batch.noisy - (scheduler.sigmas[1] - scheduler.sigmas[0]).abs() * prediction
    signal = scheduler.alphas_cumprod[batch.timestep].float()  # of a single step, to the clean latents
    if scheduler.config.prediction_type == "v_prediction":
        return signal.sqrt() * batch.noisy - (1 - signal).sqrt() * prediction
    return (batch.noisy - (1 - signal).sqrt() * prediction) / signal.sqrt()


def _vae(frames: int, side: int, **config: Any) -> Vae:
    return Vae(temporal_compression_ratio=frames, spatial_compression_ratio=side, config=SimpleNamespace(**config))


def _noise(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("name", "pipeline"), [("wan", "WanPipeline"), ("skyreels", "SkyReelsV2Pipeline")])
def test_wan_and_skyreels(name, pipeline):
    embeds = text(8, WAN["text_dim"])
    told = {**ONE_STEP, "prompt_embeds": embeds}
    _compare(pipeline, _model(name), _noise(4, 2, 8, 16), (5, 64, 128), told, {"text": embeds[0, :LENGTH]}, 8)


def test_hunyuan():
    embeds, pooled = text(8, HUNYUAN["text_embed_dim"]), torch.randn(1, HUNYUAN["pooled_projection_dim"])
    told = {
        "num_inference_steps": 1,
        "guidance_scale": 6.0,
        "prompt_embeds": embeds,
        "prompt_attention_mask": masked(8),
        "pooled_prompt_embeds": pooled,
    }
    clip = {"text": embeds[0, :LENGTH], "pooled": pooled[0]}
    _compare("HunyuanVideoPipeline", _model("hunyuan"), _noise(4, 2, 4, 8), (5, 32, 64), told, clip, 8)


@pytest.mark.parametrize("channels", [9, 4])
@pytest.mark.parametrize("glyphs", [3, 0])
def test_hunyuan15(channels, glyphs, monkeypatch):
    """Latents, the zeros of a first frame and of its mask; a second text of which maybe no token is given; no image."""
    from diffusers import ClassifierFreeGuidance, HunyuanVideo15Pipeline

    if channels == 4:  # the pipeline always adds the zeros
        monkeypatch.setattr(
            HunyuanVideo15Pipeline, "prepare_cond_latents_and_mask", lambda self, z, *_: (z[:, :0], z[:, :0])
        )
    embeds, second = text(8, HUNYUAN15["text_embed_dim"]), text(256, HUNYUAN15["text_embed_2_dim"], glyphs)
    told = {
        "num_inference_steps": 1,
        "prompt_embeds": embeds,
        "prompt_embeds_mask": masked(8),
        "prompt_embeds_2": second,
        "prompt_embeds_mask_2": (torch.arange(256) < glyphs).long()[None],
        "vae": _vae(4, 16, latent_channels=4),
        "guider": ClassifierFreeGuidance(enabled=False),
    }
    clip = {"text": embeds[0, :LENGTH]} | ({"text_2": second[0, :glyphs]} if glyphs else {})
    model = _model("hunyuan15", in_channels=channels)
    _compare("HunyuanVideo15Pipeline", model, _noise(4, 2, 4, 8), (5, 64, 128), told, clip, 8)


def test_ltx():
    embeds = text(8, LTX["caption_channels"])
    told = {**ONE_STEP, "prompt_embeds": embeds, "prompt_attention_mask": masked(8)}

    def plain(tokens: Tensor) -> Tensor:
        return tokens.unflatten(1, (2, 4, 8)).movedim(-1, 1)

    latents = _noise(4, 2, 4, 8).flatten(2).transpose(1, 2)
    _compare("LTXPipeline", _model("ltx"), latents, (9, 128, 256), told, {"text": embeds[0, :LENGTH]}, 8, plain=plain)


def test_mochi():
    embeds = text(16, MOCHI["text_embed_dim"])
    told = {"num_inference_steps": 2, "guidance_scale": 1.0, "prompt_embeds": embeds}  # one step divides by zero
    told["prompt_attention_mask"] = masked(16).bool()
    _compare(
        "MochiPipeline",
        _model("mochi"),
        _noise(12, 2, 8, 16),
        (7, 64, 128),
        told,
        {"text": embeds[0, :LENGTH]},
        16,
        time=lambda timestep: 1 - timestep / 1000,
    )


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"use_rotary_positional_embeddings": True, "sample_height": 12, "sample_width": 20},
        {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
    ],
    ids=["2b", "5b", "1.5"],
)
def test_cogvideox(others):
    embeds = text(8, COGVIDEOX["text_embed_dim"])
    told = {**ONE_STEP, "prompt_embeds": embeds}

    def plain(frames_first: Tensor) -> Tensor:
        return frames_first.transpose(1, 2)

    model = _model("cogvideox", **others)
    _compare(
        "CogVideoXPipeline",
        model,
        _noise(4, 4, 8, 16),
        (13, 64, 128),
        told,
        {"text": embeds[0, :LENGTH]},
        8,
        plain=plain,
    )


def test_allegro():
    embeds = text(8, ALLEGRO["caption_channels"])
    told = {**ONE_STEP, "prompt_embeds": embeds, "prompt_attention_mask": masked(8)}
    clip = {"text": embeds[0, :LENGTH]}
    _compare("AllegroPipeline", _model("allegro"), _noise(4, 3, 8, 16), (12, 64, 128), told, clip, 8)


def test_easyanimate():
    """Its pipeline gives one text, though the class may take two, and no mask of it."""
    embeds = text(8, EASYANIMATE["text_embed_dim"])
    told = {**ONE_STEP, "prompt_embeds": embeds, "prompt_attention_mask": masked(8)}
    told["vae"] = _vae(4, 8, latent_channels=4)
    clip = {"text": embeds[0, :LENGTH]}
    _compare("EasyAnimatePipeline", _model("easyanimate"), _noise(4, 2, 8, 16), (5, 64, 128), told, clip, 8)


@pytest.mark.parametrize(
    ("size", "conditioned"), [((64, 128), False), ((64, 128), True), ((480, 640), False), ((480, 864), False)]
)
def test_kandinsky5(size, conditioned):
    """Channels last; positions are scaled by the size; the text has the length that it has."""
    embeds, pooled = text(LENGTH, KANDINSKY5["in_text_dim"]), torch.randn(1, KANDINSKY5["in_text_dim2"])
    told = {
        **ONE_STEP,
        "prompt_embeds_qwen": embeds,
        "prompt_embeds_clip": pooled,
        "prompt_cu_seqlens": torch.tensor([0, LENGTH]),
    }
    rows, columns = size[0] // 8, size[1] // 8
    model = _model("kandinsky5", visual_cond=conditioned, num_visual_blocks=1)
    latents = _noise(2, rows, columns, 9 if conditioned else 4)
    if conditioned:
        latents[..., 4:] = 0  # given latents are taken whole

    def plain(latents: Tensor) -> Tensor:
        return latents.movedim(-1, 1)

    clip = {"text": embeds[0], "pooled": pooled[0]}
    _compare("Kandinsky5T2VPipeline", model, latents, (5, *size), told, clip, 8, plain=plain)


@pytest.mark.parametrize("image_embed_dim", [12, None])
def test_motif(image_embed_dim):
    from diffusers import ClassifierFreeGuidance

    embeds = text(8, MOTIF["text_embed_dim"])
    told = {
        "num_inference_steps": 1,
        "prompt_embeds": embeds,
        "prompt_attention_mask": masked(8),
        "guider": ClassifierFreeGuidance(enabled=False),
        "vae": _vae(4, 8, z_dim=4, scale_factor_temporal=4, scale_factor_spatial=8),
    }
    model = _model("motif", in_channels=9, image_embed_dim=image_embed_dim)
    clip = {"text": embeds[0, :LENGTH]}
    _compare("MotifVideoPipeline", model, _noise(4, 2, 8, 16), (5, 64, 128), told, clip, 8)


@pytest.mark.parametrize(
    ("name", "pipeline", "image_dim"),
    [
        ("wan", "WanImageToVideoPipeline", None),
        ("wan", "WanImageToVideoPipeline", 12),
        ("chronoedit", "ChronoEditPipeline", 12),
    ],
    ids=["2.2", "2.1", "chronoedit"],
)
def test_wan_of_image_to_video(vae, name, pipeline, image_dim, monkeypatch):
    """The first frame: encoded with zeros after it, and a mask; Wan 2.1 takes an image encoder's embeddings too."""
    import diffusers
    from diffusers import AutoencoderKLWan

    encoder = Encoder(settings(vae=str(vae), frames=5))
    image = torch.rand(1, 3, 32, 64)
    embeds, seen = text(8, WAN["text_dim"]), torch.randn(1, 3, 12)
    told = {**ONE_STEP, "prompt_embeds": embeds, "image": image, "vae": AutoencoderKLWan.from_pretrained(vae)}
    clip = {"text": embeds[0, :LENGTH]}
    if image_dim:
        clip["image"] = seen[0]
        monkeypatch.setattr(getattr(diffusers, pipeline), "encode_image", lambda self, image, device: seen)
    model = _model(name, in_channels=12, image_dim=image_dim, added_kv_proj_dim=32 if image_dim else None)
    video = torch.cat([2 * image[:, :, None] - 1, torch.randn(1, 3, 4, 32, 64)], dim=2)
    condition = encoder.first_frame(video)
    clip["condition"] = condition[0]
    _compare(pipeline, model, _noise(4, 2, 4, 8), (5, 32, 64), told, clip, 8, condition=condition)


def test_every_tested_class_has_a_family_or_a_reason():
    assert {entry.make[0] for entry in ZOO.values()} == {*FAMILIES, *UNTRAINED} and not {*FAMILIES} & {*UNTRAINED}
