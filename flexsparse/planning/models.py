"""Which model: a preset, a transformer's folder or config.json; and the inputs of one call.

Only configurations are read: the model is made on fake tensors, and no weights are looked at or fetched.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from flexsparse.grids import Grid, VideoInput, geometry_reader
from flexsparse.models import known
from flexsparse.planning.counting import PlanError


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a class's pipeline in diffusers 0.42 adds to its configuration.

    Attributes:
        text: tokens of each text input, by argument; the pipeline's ``max_sequence_length``.
        vae: pixels of a latent along (t, h, w), the first frame by itself; None where frames are counted otherwise.
        stacked: whether text has an axis of its own after the batch.
    """

    text: Mapping[str, int]
    vae: tuple[int, int, int] | None = (4, 8, 8)
    stacked: bool = False


TEXT = "encoder_hidden_states"
_FPS, _AUDIO_LATENTS = 24, 25  # frames and audio latents a second, of LTX-2
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "WanTransformer3DModel": Kind(text={TEXT: 512}),
        "SkyReelsV2Transformer3DModel": Kind(text={TEXT: 512}),
        "HunyuanVideoTransformer3DModel": Kind(text={TEXT: 256}),
        "HunyuanVideo15Transformer3DModel": Kind(
            text={TEXT: 1000, f"{TEXT}_2": 256, "image_embeds": 729}, vae=(4, 16, 16)
        ),
        "CogVideoXTransformer3DModel": Kind(text={TEXT: 226}),
        "LTXVideoTransformer3DModel": Kind(text={TEXT: 128}, vae=(8, 32, 32)),
        "MochiTransformer3DModel": Kind(text={TEXT: 256}, vae=(6, 8, 8)),
        "AllegroTransformer3DModel": Kind(text={TEXT: 512}, vae=None, stacked=True),
        "WanVACETransformer3DModel": Kind(text={TEXT: 512}),
        "ChronoEditTransformer3DModel": Kind(text={TEXT: 512}),
        "CosmosTransformer3DModel": Kind(text={TEXT: 512}),
        "LTX2VideoTransformer3DModel": Kind(text={TEXT: 1024, f"audio_{TEXT}": 1024}, vae=(8, 32, 32)),
        "EasyAnimateTransformer3DModel": Kind(text={TEXT: 256}),
        "Kandinsky5Transformer3DModel": Kind(text={TEXT: 512}),
        "MotifVideoTransformer3DModel": Kind(text={TEXT: 512}),
    }
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A class of diffusers and its configuration.

    Attributes:
        name: as the user gave it.
        kind: the class's name.
        config: arguments of its constructor.
        origin: where the configuration is from.
        scales: pixels of a latent along (t, h, w), as the VAE beside it says; None where there is none that says so.
    """

    name: str
    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    scales: Grid | None = None

    @property
    def latent(self) -> Grid | None:
        """Pixels of a latent along (t, h, w), the first frame by itself; None where frames are counted otherwise."""
        own = KINDS[self.kind].vae
        if _is_ti2v(self.kind, self.config):
            own = WAN_TI2V
        elif _is_cosmos_1(self.kind, self.config):
            own = COSMOS_1
        return own if own is None else self.scales or own


WAN_TI2V = (4, 16, 16)
"""Of Wan2.2-TI2V's VAE, whose latents have 48 channels."""


COSMOS_1 = (8, 8, 8)
"""Of the VAE of Cosmos 1.0; later ones have Wan's."""


def _is_cosmos_1(kind: str, config: Mapping[str, Any]) -> bool:
    return kind == "CosmosTransformer3DModel" and config.get("extra_pos_embed_type", "learnable") is not None


def _is_ti2v(kind: str, config: Mapping[str, Any]) -> bool:
    return kind == "WanTransformer3DModel" and config.get("in_channels") == 48


def _scales_beside(file: Path) -> Grid | None:
    """What the configuration of the VAE beside a transformer says of its scales; None where it does not."""
    try:
        config = json.loads((file.parent.parent / "vae" / "config.json").read_text())
        temporal, spatial = (config[f"scale_factor_{name}"] for name in ("temporal", "spatial"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    valid = all(isinstance(scale, int) and scale > 0 for scale in (temporal, spatial))
    return (temporal, spatial, spatial) if valid else None


_WAN = "scripts/convert_wan_to_diffusers.py of diffusers"
_COGVIDEOX = "scripts/convert_cogvideox_to_diffusers.py of diffusers, whose comments give the 5B's sizes"
PRESETS: Mapping[str, Source] = MappingProxyType(
    {
        source.name: source
        for source in (
            Source(
                name="wan2.1-1.3b",
                kind="WanTransformer3DModel",
                config={"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
                origin=f"{_WAN}: Wan-T2V-1.3B",
            ),
            Source(
                name="wan2.1-14b",
                kind="WanTransformer3DModel",
                config={"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40},
                origin=f"{_WAN}: Wan-T2V-14B",
            ),
            Source(
                name="hunyuanvideo",
                kind="HunyuanVideoTransformer3DModel",
                origin="the class's defaults in diffusers",
            ),
            Source(
                name="cogvideox-5b",
                kind="CogVideoXTransformer3DModel",
                config={"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
                origin=_COGVIDEOX,
            ),
        )
    }
)


def find(name: str) -> Source:
    """A preset, or the configuration in a folder or file.

    Raises:
        PlanError: there is none, or its class is unknown.
    """
    if name.lower() in PRESETS:
        return PRESETS[name.lower()]
    path = Path(name)
    places = [path, path / "config.json", path / "transformer" / "config.json"]
    file = next((place for place in places if os.path.isfile(place)), None)  # pathlib raises for a name too long
    if file is None:
        raise PlanError(
            f"model {name!r} is no preset and no folder or file with a transformer's config.json: give a path, or one of "
            f"{', '.join(PRESETS)}"
        )
    try:
        config = json.loads(file.read_text())
        kind = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(
            f"{str(file)!r} is no configuration of a diffusers model ({type(error).__name__}: {error}): it needs _class_name"
        ) from error
    if kind not in KINDS:
        raise PlanError(f"{str(file)!r} is of {kind}, whose inputs are not known: give one of {', '.join(KINDS)}")
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    return Source(name=name, kind=kind, config=plain, origin=str(file), scales=_scales_beside(file.resolve()))


def heads_of(source: Source) -> int | None:
    """Heads of its attention, by the configuration or the class's default; None where neither says."""
    name = "num_attention_heads"
    kind = getattr(importlib.import_module("diffusers"), source.kind)
    default = inspect.signature(kind).parameters.get(name)
    heads = source.config.get(name, None if default is None else default.default)
    return heads if isinstance(heads, int) else None


def build(source: Source, dtype: torch.dtype) -> nn.Module:
    """The model, under `counting.fake`.

    Raises:
        PlanError: the configuration does not fit the class.
    """
    before = torch.get_default_dtype()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = getattr(importlib.import_module("diffusers"), source.kind)
        try:
            torch.set_default_dtype(dtype)  # as from_pretrained(torch_dtype=...) does
            model: nn.Module = kind.from_config(dict(source.config))
        except Exception as error:  # whatever the constructor says is the answer
            raise PlanError(f"{source.origin or source.name}: {source.kind} cannot be made of it: {error}") from error
        finally:
            torch.set_default_dtype(before)
    return model


def grid_of(model: nn.Module, source: Source, pixels: tuple[int, int, int]) -> Grid:
    """The token grid of a video of (frames, rows, columns), for a model of a source.

    Raises:
        PlanError: the sizes are no multiples, or how frames become latents is not known.
    """
    kind = type(model).__name__
    vae = source.latent
    if vae is None:
        raise PlanError(f"how {kind}'s frames become latents is not known here: give --grid T,H,W in tokens")
    reader = geometry_reader(model, None).grid
    patch = reader.patch if isinstance(reader, VideoInput) else (1, 1, 1)
    frames, rows, columns = pixels
    if frames < 1 or (frames - 1) % vae[0] or ((frames - 1) // vae[0] + 1) % patch[0]:
        raise PlanError(f"frames is {frames}: {kind} takes a multiple of {vae[0] * patch[0]}, plus 1")
    for name, size, side in zip(("height", "width"), (rows, columns), (vae[1] * patch[1], vae[2] * patch[2])):
        if size < side or size % side:
            raise PlanError(f"{name} is {size}: {kind} takes a multiple of {side}")
    return (
        ((frames - 1) // vae[0] + 1) // patch[0],
        rows // (vae[1] * patch[1]),
        columns // (vae[2] * patch[2]),
    )


def example(model: nn.Module, grid: Grid, batch: int, dtype: torch.dtype, text: int | None = None) -> dict[str, Any]:
    """Keyword arguments of one call: fake, but for masks, which leave everything, and images, which there are none of.

    Args:
        model: made by `build`.
        grid: tokens (T, H, W).
        batch: samples.
        dtype: of the floating inputs.
        text: tokens of the first text; the pipeline's by default.
    """
    config: Any = model.config
    kind = KINDS[type(model).__name__]
    positions = config.get("max_text_seq_length")  # for which CogVideoX has a table
    text = text or (positions if isinstance(positions, int) else None)
    lengths = {**kind.text, **({} if text is None else {TEXT: text})}
    if _is_ltx2(model):  # one prompt, for video and audio
        lengths[f"audio_{TEXT}"] = lengths[TEXT]
    extra = (1,) if kind.stacked else ()
    width = _text_width(config)
    widths = {
        TEXT: width,
        f"{TEXT}_2": config.get("text_embed_2_dim"),
        f"audio_{TEXT}": width,
        "image_embeds": config.get("image_embed_dim"),
    }
    per_token = (math.prod(grid),) if _is_ti2v(type(model).__name__, config) else ()  # as its pipeline gives it
    found: dict[str, Any] = {"timestep": torch.zeros(batch, *per_token), "return_dict": False}
    found["hidden_states"] = torch.empty(_video(model, grid, batch), dtype=dtype)
    for name, length in lengths.items():
        found[name] = torch.empty((batch, *extra, length, widths[name]), dtype=dtype)
    names = _names(model)
    masks = {
        "encoder_attention_mask": lengths[TEXT],
        "encoder_attention_mask_2": lengths.get(f"{TEXT}_2", 0),
        "audio_encoder_attention_mask": lengths[TEXT],
    }
    with unset_fake_temporarily():
        kind_of_mask = torch.float32 if kind.stacked else torch.int64
        for name, length in masks.items():
            if name in names:
                found[name] = torch.ones(batch, *extra, length, dtype=kind_of_mask)
        if "image_embeds" in found:
            found["image_embeds"] = torch.zeros(found["image_embeds"].shape, dtype=dtype)
    if "pooled_projections" in names:
        pooled = _first(config, "pooled_projection_dim", "in_text_dim2")
        found["pooled_projections"] = torch.empty((batch, pooled), dtype=dtype)
    if config.get("guidance_embeds"):
        found["guidance"] = torch.empty(batch, dtype=dtype)
    if config.get("image_dim"):
        found["encoder_hidden_states_image"] = torch.empty((batch, 257, config["image_dim"]), dtype=dtype)
    found |= {name: size for name, size in zip(("num_frames", "height", "width"), grid) if name in names}
    found |= _more(model, found["hidden_states"], grid, lengths[TEXT])
    return found


def _more(model: nn.Module, video: torch.Tensor, grid: Grid, text: int) -> dict[str, Any]:
    """What only one class is given."""
    config: Any = model.config
    batch, dtype, kind = len(video), video.dtype, type(model).__name__
    if kind == "WanVACETransformer3DModel":
        return {"control_hidden_states": video.new_empty((batch, config["vace_in_channels"], *video.shape[2:]))}
    if kind == "Kandinsky5Transformer3DModel":
        positions = [torch.arange(size) for size in grid]
        return {"visual_rope_pos": positions, "text_rope_pos": torch.arange(text)}
    if _is_ltx2(model):
        frames = max(1, round(_AUDIO_LATENTS * ((grid[0] - 1) * 8 + 1) / _FPS))
        audio = torch.empty((batch, frames, config["audio_in_channels"]), dtype=dtype)
        return {"audio_hidden_states": audio, "audio_num_frames": frames}
    if kind != "CosmosTransformer3DModel":
        return {}
    found: dict[str, Any] = {}
    if config["in_channels"] > config["out_channels"]:
        found["condition_mask"] = video[:, :1] * 0
        found["timestep"] = torch.zeros(batch, 1, video.shape[2], 1, 1)
    if config["concat_padding_mask"]:
        if importlib.util.find_spec("torchvision") is None:
            raise PlanError(
                f"{kind} has concat_padding_mask, for which diffusers needs torchvision: pip install torchvision"
            )
        found["padding_mask"] = torch.zeros(1, 1, *video.shape[3:], dtype=dtype)
    return found


def _is_ltx2(model: nn.Module) -> bool:
    return type(model).__name__ == "LTX2VideoTransformer3DModel"


def _text_width(config: Any) -> int:
    if config.get("use_crossattn_projection"):  # Cosmos-Predict2.5, whose other width is behind the projection
        return int(config["crossattn_proj_in_channels"])
    return _first(config, "text_dim", "text_embed_dim", "caption_channels", "in_text_dim")


def _video(model: nn.Module, grid: Grid, batch: int) -> tuple[int, ...]:
    config: Any = model.config
    channels = _first(config, "in_channels", "in_visual_dim")
    if config.get("visual_cond"):  # Kandinsky 5: a first frame and its mask
        channels = 2 * channels + 1
    if type(model).__name__ == "CosmosTransformer3DModel":  # its mask is an argument of its own
        channels = config["out_channels"]
    reader = geometry_reader(model, None).grid
    if not isinstance(reader, VideoInput):
        return (batch, math.prod(grid), channels)
    sizes = {"B": batch, "C": channels} | {axis: g * p for axis, g, p in zip("THW", grid, reader.patch)}
    return tuple(sizes[axis] for axis in known(model).axes.split())


def _names(model: nn.Module) -> list[str]:
    return list(inspect.signature(type(model).forward).parameters)


def _first(config: Any, *names: str) -> int:
    return next(int(config[name]) for name in names if config.get(name))
