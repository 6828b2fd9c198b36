"""How the models of diffusers that were trained with flow matching are called: a table, by class.

Letters: B batch, C channels, T frames, H and W rows and columns of latents, L text tokens, D text channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from flexsparse.finetune.samples import Sample
from flexsparse.training.errors import RunError

_SECONDS, _SIDE = 8 / 25, 32  # of one LTX latent: frames of its VAE at 25 frames a second, pixels
_GUIDANCE = 6.0  # what HunyuanVideo's distilled guidance is used with


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A model's input: noisy latents `[B, C, T, H, W]`, times `[B]` (1 is noise), text `[B, L, D]`, how many tokens of it are
    given `[B]`, pooled text `[B, P]` or None."""

    noisy: Tensor
    t: Tensor
    text: Tensor
    lengths: Tensor
    pooled: Tensor | None

    @property
    def timestep(self) -> Tensor:
        """Times in thousandths, int64 `[B]`: FSDP2 would round floats to bfloat16, which has 4 between 512 and 1024."""
        return (1000 * self.t).round().long()

    @property
    def mask(self) -> Tensor:
        """Which text tokens are given, at least one: int64 `[B, L]`."""
        positions = torch.arange(self.text.shape[1], device=self.text.device)
        return (positions < self.lengths.clamp_min(1)[:, None]).long()


Velocity = Callable[[nn.Module, Any, Batch], Tensor]
"""(model, its configuration, batch) to the velocity noise - clean `[B, C, T, H, W]`."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a class is called.

    Attributes:
        text: the configuration's key for the channels of a text embedding.
        pooled: the key for the channels of a pooled text embedding, if it takes one.
        velocity: calls it.
    """

    text: str
    velocity: Velocity
    pooled: str | None = None


def _wan(model: nn.Module, config: Any, batch: Batch) -> Tensor:
    return model(batch.noisy, batch.timestep, batch.text, return_dict=False)[0]


def _hunyuan(model: nn.Module, config: Any, batch: Batch) -> Tensor:
    guidance = torch.full_like(batch.t, 1000 * _GUIDANCE) if config.guidance_embeds else None
    return model(
        hidden_states=batch.noisy,
        timestep=batch.timestep,
        encoder_hidden_states=batch.text,
        encoder_attention_mask=batch.mask,
        pooled_projections=batch.pooled,
        guidance=guidance,
        return_dict=False,
    )[0]


def _ltx(model: nn.Module, config: Any, batch: Batch) -> Tensor:
    *_, frames, height, width = batch.noisy.shape
    out = model(
        hidden_states=batch.noisy.flatten(2).transpose(1, 2),
        encoder_hidden_states=batch.text,
        timestep=batch.timestep,
        encoder_attention_mask=batch.mask,
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(_SECONDS, _SIDE, _SIDE),
        return_dict=False,
    )[0]
    return out.transpose(1, 2).unflatten(2, (frames, height, width))


def _mochi(model: nn.Module, config: Any, batch: Batch) -> Tensor:
    """Its time runs from noise to clean, and so does its velocity."""
    out = model(
        hidden_states=batch.noisy,
        encoder_hidden_states=batch.text,
        timestep=1000 - batch.timestep,
        encoder_attention_mask=batch.mask.bool(),
        return_dict=False,
    )[0]
    return -out


WAN = Family(text="text_dim", velocity=_wan)
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "WanTransformer3DModel": WAN,
        "SkyReelsV2Transformer3DModel": WAN,
        "HunyuanVideoTransformer3DModel": Family(
            text="text_embed_dim", pooled="pooled_projection_dim", velocity=_hunyuan
        ),
        "LTXVideoTransformer3DModel": Family(text="caption_channels", velocity=_ltx),
        "MochiTransformer3DModel": Family(text="text_embed_dim", velocity=_mochi),
    }
)


def in_thousandths(t: Tensor) -> Tensor:
    """Times as models are told them."""
    return (1000 * t).round() / 1000


def family_of(model: nn.Module) -> Family:
    """How a model is called.

    Raises:
        RunError: its class is not in the table.
    """
    kind = type(model).__name__
    if kind not in FAMILIES:
        raise RunError(
            f"--model is a {kind}, which this recipe cannot call or which was not trained with flow matching: pass one of "
            f"{', '.join(FAMILIES)}, or give finetune(..., family=Family(...)) in Python"
        )
    return FAMILIES[kind]


def collate(samples: Sequence[Sample], noisy: Tensor, t: Tensor, tokens: int, family: Family, config: Any) -> Batch:
    """Noisy latents with the samples' text: cut to `tokens`, filled up with zeros; all zeros where there is none.

    Raises:
        RunError: text of another width than the model takes.
    """
    width, device = int(config[family.text]), noisy.device
    text = torch.zeros(len(samples), tokens, width)
    lengths = torch.zeros(len(samples), dtype=torch.int64)
    for index, sample in enumerate(samples):
        if sample.text is None:
            continue
        if sample.text.shape[1] != width:
            raise RunError(
                f"--data: text embeddings have {sample.text.shape[1]} channels, --model takes {width}: encode them with the "
                "model's own text encoder"
            )
        given = sample.text[:tokens]
        text[index, : len(given)], lengths[index] = given, len(given)
    pooled = None
    if family.pooled is not None:
        zeros = torch.zeros(int(config[family.pooled]))
        pooled = torch.stack([zeros if sample.pooled is None else sample.pooled for sample in samples]).to(device)
    return Batch(noisy=noisy, t=t, text=text.to(device), lengths=lengths.to(device), pooled=pooled)
