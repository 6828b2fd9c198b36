"""The three models of Cosmos that are trained are called as their pipelines call them; others are refused."""

import sys
from types import SimpleNamespace

import pytest
import torch
from models.zoo import COSMOS, ZOO
from torch import nn

from finetune.pipelines import LENGTH, SafetyChecker, text
from finetune.test_finetune_families import ONE_STEP, _compare, _model, _noise
from flexsparse.finetune.families import family_of
from flexsparse.finetune.inputs import collate, takes_of
from flexsparse.finetune.objectives import FlowMatching
from flexsparse.training.errors import RunError

PREDICT2 = {"in_channels": 5, "extra_pos_embed_type": None}
PREDICT25 = PREDICT2 | {"use_crossattn_projection": True, "crossattn_proj_in_channels": 24}
PREDICT25 |= {"encoder_hidden_states_channels": 16}
WORLD = text(8, COSMOS["text_embed_dim"])
CLIP = {"text": WORLD[0, :LENGTH]}


def _vae():
    """A tiny VAE of Wan, which Predict2 and 2.5 have."""
    from diffusers import AutoencoderKLWan

    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return AutoencoderKLWan(**sizes, latents_mean=[0.1] * 4, latents_std=[2.0] * 4)


@pytest.fixture
def torchvision(monkeypatch):
    """A stand-in for what the model uses of it: the nearest pixels."""
    import diffusers.models.transformers.transformer_cosmos as module
    import diffusers.utils

    def resize(x, size, interpolation):
        return nn.functional.interpolate(x, size, mode=interpolation)

    functional = SimpleNamespace(resize=resize)
    transforms = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    monkeypatch.setattr(module, "transforms", transforms, raising=False)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(transforms=transforms))
    monkeypatch.setitem(sys.modules, "torchvision.transforms", transforms)
    monkeypatch.setitem(sys.modules, "torchvision.transforms.functional", functional)
    monkeypatch.setattr(diffusers.utils, "is_torchvision_available", lambda: True)


def test_cosmos_1_of_text_to_world(torchvision):
    """Its network is between EDM's preconditioners, in latents of standard deviation sigma_data."""

    def time(timestep):
        sigma = (4 * timestep).exp()
        return sigma / (sigma + 0.5)

    def stepped(batch, prediction, step):  # a single step, to the clean latents
        sigma = 0.5 * batch.t / (1 - batch.t)
        return step.scheduler.precondition_outputs(step.before, prediction, sigma)

    told = {**ONE_STEP, "prompt_embeds": WORLD, "safety_checker": SafetyChecker()}
    _compare(
        "CosmosTextToWorldPipeline",
        _model("cosmos", concat_padding_mask=True),
        _noise(4, 2, 8, 16),
        (9, 64, 128),
        told,
        CLIP,
        8,
        time=time,
        stepped=stepped,
    )


def test_predict2_of_video_to_world(torchvision):
    """The first frame is given as it is, with a time of its own; what the pipeline takes for its velocity is known."""
    condition, vae = _noise(4, 2, 8, 16) + 1, _vae()
    vae.encode = lambda video: SimpleNamespace(latents=2.0 * condition + 0.1)  # its mean and standard deviation
    told = {"num_inference_steps": 2, "guidance_scale": 1.0, "prompt_embeds": WORLD, "safety_checker": SafetyChecker()}
    told |= {"image": torch.rand(1, 3, 64, 128), "vae": vae}

    def stepped(batch, prediction, step):
        """Their latents are ours over 1 - t, and what is given is left out of them before the call alone."""
        now, then = step.scheduler.sigmas[:2].float()
        clean = batch.noisy - batch.t * prediction
        return step.before + (then - now) * (step.before - clean) / now

    _compare(
        "Cosmos2VideoToWorldPipeline",
        _model("cosmos", **PREDICT2, concat_padding_mask=True),
        _noise(4, 2, 8, 16),
        (5, 64, 128),
        told,
        CLIP,
        8,
        time=lambda timestep: timestep,
        condition=condition,
        stepped=stepped,
    )


def test_the_given_frame_has_no_loss():
    model = _model("cosmos", **PREDICT2)
    family, objective = family_of(type(model), model.config), FlowMatching()
    clean, noise = _noise(4, 2, 8, 16), _noise(4, 2, 8, 16).flip(-1)
    t = torch.tensor([0.3])
    takes = takes_of(family, model.config, 8, vae=False)
    assert takes.condition == "latents" and takes.required == () and takes.latents == 4
    noisy = objective.noisy(clean, noise, t)
    prediction = family.velocity(model, model.config, collate([CLIP], noisy, t, takes, condition=clean))
    torch.testing.assert_close(prediction[:, :, 0], (noise - clean)[:, :, 0])
    assert objective.loss(prediction, clean, noise, t) > 0.1
    before = prediction[:, :, 1].detach()
    other = clean.clone()
    other[:, :, 0] += 1
    again = family.velocity(model, model.config, collate([CLIP], noisy, t, takes, condition=other))
    assert not torch.allclose(before, again[:, :, 1]), "the others see it"
    other[:, :, 1] += 1
    same = family.velocity(model, model.config, collate([CLIP], noisy, t, takes, condition=other))
    assert torch.equal(again[:, :, 1], same[:, :, 1]), "and of the condition nothing else"


def test_predict25_of_text_to_world(torchvision):
    embeds = text(8, 24)
    told = {**ONE_STEP, "prompt_embeds": embeds, "vae": _vae(), "safety_checker": SafetyChecker()}
    model = _model("cosmos", **PREDICT25, concat_padding_mask=True)
    clip = {"text": embeds[0, :LENGTH]}
    _compare(
        "Cosmos2_5_PredictBasePipeline",
        model,
        _noise(4, 2, 8, 16),
        (5, 64, 128),
        told,
        clip,
        8,
        time=lambda timestep: timestep,
    )


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"in_channels": 5}, r"noise of their own \(Cosmos 1\.0 of video to world\), and is not trained here: pass"),
        ({"extra_pos_embed_type": None}, r"makes images, not videos \(Cosmos-Predict2 of text to image\)"),
        (PREDICT25 | {"controlnet_block_every_n": 7}, r"has controlnet_block_every_n in its configuration"),
        (PREDICT25 | {"img_context_dim_in": 7}, r"has img_context_dim_in in its configuration: Cosmos Transfer"),
        ({"concat_padding_mask": True}, r"needs torchvision: pip install torchvision"),
    ],
)
def test_other_models_are_refused(others, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr("diffusers.utils.is_torchvision_available", lambda: False)
    with pytest.raises(RunError, match=message):
        family_of(type(ZOO["cosmos"].model()), {**ZOO["cosmos"].model().config, **others})
