"""What a video transformer of diffusers is called with, to look at its attention: noisy latents, a time, no prompt.

Most arguments follow from their name and the configuration; `ARGUMENTS` says how. Text embeddings are zeros of the right
width. Letters: B batch (1), C channels, T, H and W latent frames, rows and columns, L text tokens.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from flexsparse.grids import Grid
from flexsparse.models import known

_LTX_SECONDS, _LTX_SIDE = 8 / 25, 32  # of one latent: frames of its VAE at 25 frames a second, pixels
_LTX2_FPS, _COSMOS_FPS = 24.0, (30, 16)  # frames a second that pipelines assume; of Cosmos 1.0, of Predict2
_SIGMA_DATA = 0.5  # of Cosmos 1.0
_KANDINSKY_SIDE = 8  # pixels of a latent of Kandinsky 5
_GUIDANCE = 6000.0  # HunyuanVideo's distilled guidance, 6, as its pipeline scales it


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the arguments are made of.

    Attributes:
        config: the model's.
        kind: its class's name.
        axes: of its video input (`models.Known`).
        as_tokens: whether its input is a sequence of tokens.
        latents: noisy, ``[1, C, T, H, W]``.
        grid: tokens along (T, H, W).
        time: 0 is clean, 1 is noise.
        text: L.
    """

    config: Any
    kind: str
    axes: str
    as_tokens: bool
    latents: Tensor
    grid: Grid
    time: float
    text: int

    @property
    def cosmos_masked(self) -> bool:
        """Whether it is a Cosmos that is told which frames are given."""
        return "Cosmos" in self.kind and self.config["in_channels"] > self.config["out_channels"]

    def zeros(self, length: int, *keys: str) -> Tensor:
        """Zero embeddings ``[1, length, width]``, as wide as the first of some keys of the configuration says."""
        width = next(int(value) for key in keys if (value := self.config.get(key)) is not None)
        return self.latents.new_zeros(1, length, width)

    def video(self) -> Tensor:
        """The latents as the model takes them."""
        if self.as_tokens:
            return self.latents.flatten(2).transpose(1, 2)
        latents = self.latents
        if self.config.get("visual_cond"):  # Kandinsky 5: no first frame is given
            latents = torch.cat([latents, torch.zeros_like(latents), torch.zeros_like(latents[:, :1])], dim=1)
        order = ["BCTHW".index(axis) for axis in self.axes.split()]
        return latents.permute(order).contiguous()

    def text_embeddings(self) -> Tensor:
        """Allegro has an axis for several prompts."""
        projected = ("crossattn_proj_in_channels",) if self.config.get("use_crossattn_projection") else ()  # Cosmos 2.5
        x = self.zeros(self.text, *projected, "text_dim", "text_embed_dim", "caption_channels", "in_text_dim")
        return x[:, None] if "Allegro" in self.kind else x

    def text_mask(self, length: int) -> Tensor:
        """Every text token is valid."""
        mask = torch.ones(1, length, device=self.latents.device, dtype=torch.int64)
        if "Allegro" in self.kind:
            return mask[:, None].to(self.latents.dtype)
        return mask.bool() if self.kind.startswith(("LTX", "Mochi")) else mask

    def step(self) -> Tensor:
        """The time as the model counts it: Mochi's runs the other way, and Cosmos has the time itself, or of each frame."""
        if "Cosmos" in self.kind:
            return self._cosmos_step()
        time = 1 - self.time if self.kind.startswith("Mochi") else self.time
        dtype = self.latents.dtype if "HunyuanVideo15" in self.kind else torch.float32  # that one computes in its dtype
        return torch.full((1,), 1000 * time, device=self.latents.device, dtype=dtype)

    def _cosmos_step(self) -> Tensor:
        """Cosmos 1.0, which has positions that are learned: a quarter of EDM's log sigma, as noisy as flow matching is."""
        device = self.latents.device
        if self.cosmos_masked:
            return torch.full((1, 1, self.latents.shape[2], 1, 1), self.time, device=device)
        if self.config["extra_pos_embed_type"] is None:
            return torch.full((1,), self.time, device=device)
        share = min(max(self.time, 1e-3), 1 - 1e-3)
        return torch.full((1,), 0.25 * math.log(_SIGMA_DATA * share / (1 - share)), device=device)

    def control(self) -> Tensor:
        """Of WanVACE, as of a grey video of which all is to be made: zeros for its latents, and a mask of ones."""
        latents, channels = self.latents, int(self.config["vace_in_channels"])
        grey = latents.new_zeros(1, min(2 * latents.shape[1], channels), *latents.shape[2:])
        return torch.cat([grey, latents.new_ones(1, channels - grey.shape[1], *latents.shape[2:])], dim=1)

    def positions(self) -> list[Tensor]:
        """Kandinsky 5's, along each axis."""
        return [torch.arange(size, device=self.latents.device) for size in self.grid]

    def frame_rate(self) -> float | None:
        """Of LTX-2, of Cosmos 1.0 and of Predict2; Predict2.5 is told none."""
        if "Cosmos" not in self.kind:
            return _LTX2_FPS
        if self.config.get("use_crossattn_projection"):
            return None
        return _COSMOS_FPS[int(self.config["extra_pos_embed_type"] is None)]

    def rotary(self) -> tuple[Any, ...] | None:
        """Rotary tables that the pipeline, not the model, makes: CogVideoX's where it uses them, and Allegro's."""
        embeddings: Any = importlib.import_module("diffusers.models.embeddings")

        T, H, W = self.grid
        config, device = self.config, self.latents.device
        head_dim = int(config["attention_head_dim"])
        if "Allegro" in self.kind:
            scales = tuple(float(config[f"interpolation_scale_{axis}"]) for axis in "thw")
            *tables, t, h, w = embeddings.get_3d_rotary_pos_embed_allegro(
                head_dim, ((0, 0), (H, W)), (H, W), T, scales, device=device
            )
            places = torch.cartesian_prod(t.long(), h.long(), w.long()).T.reshape(3, 1, -1).contiguous()
            return tuple(tables), tuple(places)
        if not config.get("use_rotary_positional_embeddings"):
            return None
        most = tuple(int(config[key]) // int(config["patch_size"]) for key in ("sample_height", "sample_width"))
        if config.get("patch_size_t") is not None:
            if most[0] < H or most[1] < W:
                raise ValueError(
                    f"the grid is {self.grid}, {self.kind} has tables of positions up to {most}: give a smaller one"
                )
            return embeddings.get_3d_rotary_pos_embed(
                head_dim, None, (H, W), T, grid_type="slice", max_size=most, device=device
            )
        scale = min(most[0] / H, most[1] / W)
        rows, columns = round(H * scale), round(W * scale)
        top, left = round((most[0] - rows) / 2), round((most[1] - columns) / 2)
        crop = ((top, left), (top + rows, left + columns))
        return embeddings.get_3d_rotary_pos_embed(head_dim, crop, (H, W), T, device=device)


def kandinsky_scale(rows: int, columns: int) -> tuple[float, float, float]:
    """Of Kandinsky 5's positions, by latents: its pipeline's for about 480 rows and columns of pixels, or for others."""
    small = all(480 <= _KANDINSKY_SIDE * size <= 854 for size in (rows, columns))
    return (1, 2, 2) if small else (1, 3.16, 3.16)


ARGUMENTS: Mapping[str, Callable[[Inputs], Any]] = MappingProxyType(
    {
        "hidden_states": Inputs.video,
        "timestep": Inputs.step,
        "encoder_hidden_states": Inputs.text_embeddings,
        "encoder_attention_mask": lambda i: i.text_mask(i.text),
        "encoder_hidden_states_2": lambda i: i.zeros(i.text, "text_embed_2_dim"),
        "encoder_attention_mask_2": lambda i: i.text_mask(i.text),
        "image_embeds": lambda i: None if "Motif" in i.kind else i.zeros(1, "image_embed_dim"),
        "pooled_projections": lambda i: i.zeros(1, "pooled_projection_dim", "in_text_dim2")[:, 0],
        "guidance": lambda i: i.latents.new_full((1,), _GUIDANCE) if i.config.get("guidance_embeds") else None,
        "num_frames": lambda i: i.grid[0],
        "height": lambda i: i.grid[1],
        "width": lambda i: i.grid[2],
        "rope_interpolation_scale": lambda i: (_LTX_SECONDS, _LTX_SIDE, _LTX_SIDE),
        "image_rotary_emb": Inputs.rotary,
        "control_hidden_states": Inputs.control,
        "audio_hidden_states": lambda i: i.zeros(1, "audio_in_channels"),
        "audio_num_frames": lambda i: 1,
        "audio_encoder_hidden_states": Inputs.text_embeddings,
        "audio_encoder_attention_mask": lambda i: i.text_mask(i.text),
        "isolate_modalities": lambda i: True,  # LTX-2: the video does not see the audio
        "fps": Inputs.frame_rate,
        "visual_rope_pos": Inputs.positions,
        "scale_factor": lambda i: kandinsky_scale(*i.latents.shape[3:]),
        "text_rope_pos": lambda i: torch.arange(i.text, device=i.latents.device),
        "condition_mask": lambda i: torch.zeros_like(i.latents[:, :1]) if i.cosmos_masked else None,
        "padding_mask": lambda i: i.latents.new_zeros(1, 1, *i.latents.shape[3:]),
        "return_dict": lambda i: False,
    }
)
"""How an argument is made, by its name. Others are left to their defaults."""
_FIXED_TEXT = "max_text_seq_length"  # CogVideoX adds a table of positions to text and video together
_MOST_TEXT = "max_sequence_length"


def patch_of(model: nn.Module) -> Grid:
    """Latents of one token along (T, H, W).

    Raises:
        ValueError: the model does not say.
    """
    config = getattr(model, "config", None) or {}
    if known(model).sizes:
        return (1, 1, 1)
    patch = config.get("patch_size")
    if isinstance(patch, int):
        return (int(config.get("patch_size_t") or 1), patch, patch)
    if isinstance(patch, (list, tuple)) and len(patch) == 3:
        return (int(patch[0]), int(patch[1]), int(patch[2]))
    raise ValueError(
        f"{type(model).__name__} has no patch size in its configuration: it is no video transformer known here"
    )


def channels_of(model: nn.Module) -> int:
    """Channels of a model's latents.

    Raises:
        ValueError: the model does not say.
    """
    config: Any = getattr(model, "config", None) or {}
    channels = config.get("in_channels", config.get("in_visual_dim"))
    if "Cosmos" in type(model).__name__:  # a mask of given frames is an argument of its own
        channels = config.get("out_channels")
    if not isinstance(channels, int):
        raise ValueError(
            f"{type(model).__name__} has no in_channels in its configuration: it is no video transformer known here"
        )
    return channels


def model_inputs(model: nn.Module, latents: Tensor, time: float, text: int) -> dict[str, Any]:
    """Keyword arguments of one call.

    Args:
        model: a video transformer of diffusers.
        latents: noisy, ``[1, C, T, H, W]``, of the model's channels.
        time: 0 is clean, 1 is noise.
        text: text tokens; fewer where the model's configuration allows fewer, and exactly as many where it says so.

    Raises:
        ValueError: the model needs an argument that `ARGUMENTS` does not know, or does not say its sizes.
    """
    names = dict(
        inspect.signature(type(model).forward).parameters
    )  # the class's: wrapping gives the instance one of its own
    names.pop("self", None)
    needed = {
        name for name, p in names.items() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    needed |= names.keys() & {"pose_hidden_states"}  # of WanAnimate, though it has a default
    unknown = needed - ARGUMENTS.keys()
    if unknown or "hidden_states" not in names:
        what = f"needs {', '.join(sorted(unknown))}" if unknown else "takes no hidden_states"
        raise ValueError(f"{type(model).__name__} {what}: it is no video transformer that can be called here")
    config: Any = model.config
    patch = patch_of(model)
    text = min(text, config.get(_MOST_TEXT) or text)
    inputs = Inputs(
        config=config,
        kind=type(model).__name__,
        axes=known(model).axes,
        as_tokens=bool(known(model).sizes),
        latents=latents,
        grid=tuple(size // side for size, side in zip(latents.shape[2:], patch)),  # type: ignore[arg-type]
        time=time,
        text=config.get(_FIXED_TEXT) or text,
    )
    try:
        return {name: make(inputs) for name, make in ARGUMENTS.items() if name in names}
    except (KeyError, StopIteration):
        raise ValueError(
            f"{type(model).__name__}'s configuration lacks a width: it is no video transformer known here"
        ) from None
