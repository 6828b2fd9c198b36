"""Cosmos: one class of diffusers, three models that are trained, each called as its own pipeline calls it.

Letters: B batch, C channels, T frames, H and W rows and columns of latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from flexsparse.finetune.inputs import Batch, Family, FirstFrame, with_first_frame
from flexsparse.training.errors import RunError

_FPS_1, _FPS_2 = 30, 16  # frames a second that the pipelines of Cosmos 1.0 and Predict2 assume; Predict2.5 is told none
_SIDE = 8  # pixels of a latent: the padding mask is of pixels
_GIVEN_SIGMA = 1e-4  # the noise that a given first frame is said to have
_SIGMA_DATA = 0.5

EDM_SCHEDULER: Mapping[str, Any] = MappingProxyType(
    {
        "_class_name": "EDMEulerScheduler",
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "sigma_data": _SIGMA_DATA,
        "prediction_type": "epsilon",
    }
)
"""What Cosmos 1.0 was published with: `scripts/convert_cosmos_to_diffusers.py` of diffusers."""


def _padding(noisy: Tensor) -> Tensor:
    """No pixel is padding: zeros `[1, 1, rows, columns]`."""
    return noisy.new_zeros(1, 1, noisy.shape[3] * _SIDE, noisy.shape[4] * _SIDE)


def _of_each_frame(t: Tensor, noisy: Tensor) -> Tensor:
    """Times `[B]` as `[B, 1, T, 1, 1]`."""
    return t.view(-1, 1, 1, 1, 1).expand(-1, 1, noisy.shape[2], 1, 1)


def _text_to_world(model: nn.Module, config: Any, batch: Batch) -> Tensor:
    """Cosmos 1.0, of EDM: its time is a quarter of the logarithm of sigma, in its latents, which are scaled by sigma_data."""
    sigma = _SIGMA_DATA * batch.t / (1 - batch.t)
    return model(
        hidden_states=batch.noisy,
        timestep=sigma.log() / 4,
        encoder_hidden_states=batch.text,
        fps=_FPS_1,
        padding_mask=_padding(batch.noisy),
        return_dict=False,
    )[0]


def _frame_to_world(model: nn.Module, config: Any, batch: Batch) -> Tensor:
    """Predict2: the first frame is given as it is, nearly without noise; its velocity is known, and not learned."""
    condition, mask = with_first_frame(batch)
    given, t = mask[..., :1, :1], _of_each_frame(batch.t, batch.noisy)
    out = model(
        hidden_states=torch.where(given > 0, condition, batch.noisy),
        timestep=torch.where(given > 0, _GIVEN_SIGMA / (1 + _GIVEN_SIGMA), t),
        encoder_hidden_states=batch.text,
        fps=_FPS_2,
        condition_mask=mask,
        padding_mask=_padding(batch.noisy),
        return_dict=False,
    )[0]
    known = (batch.noisy - condition) / t.clamp_min(1 / batch.steps)  # at time 0 noise has no trace in the latents
    return torch.where(given > 0, known.to(out.dtype), out)


def _text_to_world_25(model: nn.Module, config: Any, batch: Batch) -> Tensor:
    """Predict2.5 without a given frame: its mask is zeros. Each frame has a time of its own, here one for all."""
    return model(
        hidden_states=batch.noisy,
        timestep=_of_each_frame(batch.t, batch.noisy),
        encoder_hidden_states=batch.text,
        condition_mask=torch.zeros_like(batch.noisy[:, :1]),
        padding_mask=_padding(batch.noisy),
        return_dict=False,
    )[0]


TEXT_TO_WORLD = Family(
    text="text_embed_dim", velocity=_text_to_world, scheduler=lambda config: EDM_SCHEDULER, vae="AutoencoderKLCosmos"
)
FRAME_TO_WORLD = Family(
    text="text_embed_dim", velocity=_frame_to_world, first_frame=FirstFrame(mask=1, latents=False, of="latents")
)
TEXT_TO_WORLD_25 = replace(
    FRAME_TO_WORLD,
    text="crossattn_proj_in_channels",
    velocity=_text_to_world_25,
    first_frame=FirstFrame(mask=1, latents=False),
)


def cosmos(config: Mapping[str, Any]) -> Family:
    """How the model of a configuration is called.

    Raises:
        RunError: it is another than Cosmos 1.0 of text to world, Predict2 of video to world, and Predict2.5.
    """
    from diffusers.utils import is_torchvision_available

    if config["concat_padding_mask"] and not is_torchvision_available():
        raise RunError(
            "--model has concat_padding_mask, for which diffusers needs torchvision: pip install torchvision"
        )
    masked, edm = config["in_channels"] > config["out_channels"], config["extra_pos_embed_type"] is not None
    controlled = [name for name in ("controlnet_block_every_n", "img_context_dim_in") if config.get(name)]
    if controlled:
        what = f"has {' and '.join(controlled)} in its configuration: Cosmos Transfer, which a control network steers"
    elif config["use_crossattn_projection"] and masked:
        return TEXT_TO_WORLD_25
    elif edm and masked:
        what = "takes given frames with noise of their own (Cosmos 1.0 of video to world)"
    elif not edm and not masked:
        what = "makes images, not videos (Cosmos-Predict2 of text to image)"
    else:
        return TEXT_TO_WORLD if edm else FRAME_TO_WORLD
    raise RunError(
        f"--model {what}, and is not trained here: pass a Cosmos 1.0 of text to world, a Cosmos-Predict2 of video to world, or "
        "a Cosmos-Predict2.5; or give finetune(..., family=Family(...)) in Python"
    )
