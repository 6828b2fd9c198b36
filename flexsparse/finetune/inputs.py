"""What a model is given: how a family says it, what a clip has to bring, and batches of it.

Letters: B batch, C channels, T frames, H and W rows and columns of latents, L text tokens, D text channels, P pooled channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flexsparse.training.errors import RunError

TEXT, TEXT_2, POOLED, IMAGE, CONDITION = "text", "text_2", "pooled", "image", "condition"
EMBEDDINGS = {TEXT: 2, TEXT_2: 2, POOLED: 1, IMAGE: 2}
"""Embeddings that a clip's files may hold, and their number of dimensions: `[L, D]` or `[P]`."""
Given = Mapping[str, Tensor]
"""What a clip brings beside its video, by name: embeddings, and for image to video `condition` `[C, T, H, W]`."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A model's input.

    Attributes:
        noisy: latents `[B, C, T, H, W]`.
        t: times `[B]`; 1 is noise.
        text: `[B, L, D]`.
        lengths: how many tokens of it are given, `[B]`.
        pooled: pooled text `[B, P]`, for a family that takes it.
        text_2: the second encoder's text `[B, L, D]`, for a family that takes it.
        lengths_2: how many tokens of that are given, `[B]`.
        image: an image's embeddings `[B, L, D]`, for a family that takes them.
        condition: latents of the first frame `[B, C, T, H, W]`, for a model that takes them.
        steps: timesteps between clean and noise.
    """

    noisy: Tensor
    t: Tensor
    text: Tensor
    lengths: Tensor
    pooled: Tensor | None = None
    text_2: Tensor | None = None
    lengths_2: Tensor | None = None
    image: Tensor | None = None
    condition: Tensor | None = None
    steps: int = 1000

    @property
    def timestep(self) -> Tensor:
        """Times in steps, int64 `[B]`: FSDP2 would round floats to bfloat16, which has 4 between 512 and 1024."""
        return (self.steps * self.t).round().long()

    @property
    def mask(self) -> Tensor:
        """Which text tokens are given, at least one: int64 `[B, L]`."""
        return _mask(self.text, self.lengths.clamp_min(1))

    @property
    def mask_2(self) -> Tensor | None:
        """Which of the second text's tokens are given, maybe none: int64 `[B, L]`."""
        return None if self.text_2 is None or self.lengths_2 is None else _mask(self.text_2, self.lengths_2)


def _mask(text: Tensor, lengths: Tensor) -> Tensor:
    return (torch.arange(text.shape[1], device=text.device) < lengths[:, None]).long()


Call = Callable[[nn.Module, Any, Batch], Tensor]
"""(model, its configuration, batch) to what the objective asks for, `[B, C, T, H, W]`: the velocity noise - clean, or for a
noise schedule what its `prediction_type` says."""


@dataclass(frozen=True, kw_only=True)
class FirstFrame:
    """Channels that a class may take beyond the noisy latents': those of a clip whose first frame alone is seen, and a mask.

    Attributes:
        mask: channels of the mask.
        latents: whether there are channels of latents beside it; else the first frame takes the place of a noisy one.
        of: what the first frame is of (image to video): a `clip` brings it, encoded with zeros after it, or it is that of
            the clip's own `latents`, for a model that sees none after it; None: all are zeros (text to video).
    """

    mask: int
    latents: bool = True
    of: Literal["clip", "latents"] | None = None

    def channels(self, latents: int) -> int:
        """Channels that go in, beside noisy latents of so many or with them."""
        return (2 if self.latents else 1) * latents + self.mask


def with_first_frame(batch: Batch) -> tuple[Tensor, Tensor]:
    """Latents `[B, C, T, H, W]` of which the first frame counts, and a mask `[B, 1, T, H, W]` that is 1 there.

    Raises:
        RunError: the batch has no first frame.
    """
    if batch.condition is None:
        raise RunError("the model takes a first frame, and the batch has none: give collate(..., condition=...)")
    mask = torch.zeros_like(batch.noisy[:, :1])
    mask[:, :, 0] = 1
    return batch.condition.to(batch.noisy), mask


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a class is called, and what it was trained for.

    Attributes:
        text: the configuration's key for the channels of a text embedding.
        velocity: calls it. For a noise schedule it gives what that predicts instead of a velocity.
        pooled: the key for the channels of a pooled text embedding, if it takes one.
        text_2: the key for the channels of a second text encoder's embedding, if it takes one.
        image: the key for the channels of an image's embeddings, if it takes them; where the value is None, it does not.
        tokens: text tokens that it is given unless `--text-tokens` says otherwise, or the key for their number.
        tokens_2: tokens of the second text.
        channels: the keys for the channels of noisy latents and of the output; where the last is None, as many.
        first_frame: what the channels beyond the latents' are, for a class that may have such.
        scheduler: (the model's configuration) to the configuration, with its `_class_name`, of the diffusers scheduler that it
            was published with, where that is a noise schedule; None for flow matching.
        vae: class of the VAE whose latents it takes; `--vae` runs an AutoencoderKLWan.
        compile: values of `--compile` that the class's code allows, the best first.
        unused: (model) to the modules that its output does not depend on: DDP would wait for their gradients.
        check: raises a `RunError` for a configuration, or a number of text tokens, that cannot be trained.
    """

    text: str
    velocity: Call
    pooled: str | None = None
    text_2: str | None = None
    image: str | None = None
    tokens: int | str = 512
    tokens_2: int = 256
    channels: tuple[str, str] = ("in_channels", "out_channels")
    first_frame: FirstFrame | None = None
    scheduler: Callable[[Any], Mapping[str, Any]] | None = None
    vae: str = "AutoencoderKLWan"
    compile: tuple[str, ...] = ("whole", "regional", "off")
    unused: Callable[[Any], Sequence[nn.Module]] = lambda model: ()
    check: Callable[[Any, int], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Takes:
    """What one model takes of a clip.

    Attributes:
        channels: of each of a clip's embeddings, by name; a name that is not there is not read.
        tokens: of each `[L, D]` embedding that is cut or filled up.
        latents: channels of latents.
        condition: what the first frame is of that it takes, as `FirstFrame.of`; None if it takes none.
        required: names that every clip has to bring; others are zeros.
    """

    channels: Mapping[str, int]
    tokens: Mapping[str, int] = field(default_factory=dict)
    latents: int
    condition: Literal["clip", "latents"] | None = None
    required: tuple[str, ...] = ()

    def why_not(self, given: Given) -> str | None:
        """Why a clip that brings this cannot be trained; None where it can."""
        for name in self.required:
            if name not in given:
                what = "its first frame encoded with zeros after it" if name == CONDITION else "of the first frame"
                return f"it has no tensor {name!r} ({what}), which a model of image to video needs"
        for name, wanted in self.channels.items():
            if name in given and given[name].shape[-1] != wanted:
                return (
                    f"its {name} has {given[name].shape[-1]} channels, the model takes {wanted}: encode it with the model's "
                    "own encoder"
                )
        return None


def takes_of(family: Family, config: Mapping[str, Any], tokens: int | None, *, vae: bool) -> Takes:
    """What a model takes of a clip.

    Args:
        family: how it is called.
        config: its configuration.
        tokens: `--text-tokens`; None for what the family says.
        vae: whether a VAE encodes the clips.

    Raises:
        RunError: a configuration that cannot be trained.
    """
    if vae and family.vae != "AutoencoderKLWan":
        raise RunError(
            f"--vae: --model takes latents of an {family.vae}, and only AutoencoderKLWan is run here: encode the clips with "
            "that, and pass a folder of latents"
        )
    keys = {TEXT: family.text, TEXT_2: family.text_2, POOLED: family.pooled, IMAGE: family.image}
    going_in, coming_out = family.channels
    missing = next((key for key in (*keys.values(), going_in) if key is not None and key not in config), None)
    if missing is not None:
        raise RunError(
            f"--model has no {missing!r} in its configuration: give finetune(..., family=Family(...)) in Python"
        )
    channels = {name: int(config[key]) for name, key in keys.items() if key is not None and config[key] is not None}
    count = tokens or (family.tokens if isinstance(family.tokens, int) else int(config[family.tokens]))
    if family.check is not None:
        family.check(config, count)
    takes, gives = int(config[going_in]), int(config.get(coming_out) or config[going_in])
    frame = family.first_frame
    extra = frame is not None and takes == frame.channels(gives)
    if takes > gives and not extra:
        known = f"only with {frame.channels(gives)}, a first frame and its mask" if frame else "not"
        raise RunError(
            f"--model takes {takes} channels and gives {gives}: more than noise goes in (image to video, control), for which "
            f"models of this class are trained {known}"
        )
    condition = frame.of if extra and frame is not None else None
    brings = condition == "clip" and not vae
    required = (*((CONDITION,) if brings else ()), *((IMAGE,) if IMAGE in channels else ()))
    if condition and vae and IMAGE in channels:
        raise RunError(
            "--vae: --model takes an image's embeddings, and each window of a video would need its own: pass latents, with "
            "'condition' and 'image'"
        )
    lengths = {TEXT: count} | ({TEXT_2: family.tokens_2} if TEXT_2 in channels else {})
    return Takes(
        channels=channels, tokens=lengths, latents=gives if extra else takes, condition=condition, required=required
    )


def collate(
    clips: Sequence[Given],
    noisy: Tensor,
    t: Tensor,
    takes: Takes,
    *,
    steps: int = 1000,
    condition: Tensor | None = None,
) -> Batch:
    """Noisy latents with what their clips bring: texts are cut to their number of tokens and filled up with zeros.

    Args:
        clips: what each sample's clip brings.
        noisy: latents `[B, C, T, H, W]`.
        t: times `[B]`.
        takes: what the model takes.
        steps: of the objective.
        condition: latents whose first frame the model is given `[B, C, T, H, W]`.

    Raises:
        RunError: an embedding of another width than the model takes.
    """
    for given in clips:
        reason = takes.why_not(given)
        if reason is not None:
            raise RunError(f"--data: a clip cannot be used; {reason}")
    device, found = noisy.device, {}
    for name, tokens in takes.tokens.items():
        padded = torch.zeros(len(clips), tokens, takes.channels[name])
        lengths = torch.zeros(len(clips), dtype=torch.int64)
        for index, given in enumerate(clips):
            if name in given:
                part = given[name][:tokens]
                padded[index, : len(part)], lengths[index] = part, len(part)
        found[name] = padded.to(device), lengths.to(device)
    text, lengths = found[TEXT]
    text_2, lengths_2 = found.get(TEXT_2, (None, None))
    pooled = image = None
    if POOLED in takes.channels:
        zeros = torch.zeros(takes.channels[POOLED])
        pooled = torch.stack([given.get(POOLED, zeros) for given in clips]).to(device)
    if IMAGE in takes.channels:
        images = sorted({len(given[IMAGE]) for given in clips})
        if len(images) > 1:
            raise RunError(
                f"--micro-batch {len(clips)}: clips have images of {images[0]} to {images[-1]} tokens: "
                "pass --micro-batch 1, or images of one length"
            )
        image = torch.stack([given[IMAGE] for given in clips]).to(device)
    return Batch(
        noisy=noisy,
        t=t,
        text=text,
        lengths=lengths,
        pooled=pooled,
        text_2=text_2,
        lengths_2=lengths_2,
        image=image,
        condition=condition,
        steps=steps,
    )
