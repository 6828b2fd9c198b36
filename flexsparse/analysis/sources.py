"""Where a look at a model gets its model, clip and latents from: files. Errors name the command's options.

Letters: C channels, T, H and W frames, rows and columns (of latents, or of pixels where said).
"""

from __future__ import annotations

import importlib
import io
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexsparse.grids import Grid
from flexsparse.training.errors import RunError
from flexsparse.training.flow import noisy
from flexsparse.training.video import Source, as_float, find_source, read_frames
from flexsparse.training.weights import check_complete

TINY = "tiny"
_TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 192,
    "num_layers": 3,
    "rope_max_seq_len": 256,
}
FRAMES, PIXELS = 4, 8
"""Frames and pixels along a side that one latent stands for, where there is no VAE to say so."""


def load_model(where: str, dtype: torch.dtype, seed: int) -> nn.Module:
    """A video transformer of diffusers.

    Args:
        where: its folder, that of a pipeline which has a `transformer`, or `tiny` for a small random Wan.
        dtype: of its parameters.
        seed: of a tiny model's.

    Raises:
        RunError: no such folder, or one that diffusers cannot load.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers warns of what it imports
        diffusers: Any = importlib.import_module("diffusers")
        if where == TINY:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = diffusers.WanTransformer3DModel(**_TINY).eval()
            return model if dtype == torch.float32 else model.to(dtype)
        return _from_folder(diffusers, where, "--model", "transformer", dtype).eval()


def _from_folder(diffusers: Any, where: str, option: str, part: str, dtype: torch.dtype) -> nn.Module:
    folder = Path(where)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        tiny = ", or 'tiny'" if option == "--model" else ""
        raise RunError(f"{option} {where!r} {what}: pass the folder of a diffusers model{tiny}")
    if (folder / part / "config.json").is_file():
        folder = folder / part
    try:
        kind = json.loads((folder / "config.json").read_text())["_class_name"]
        model: nn.Module = getattr(diffusers, kind).from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
        check_complete(option.lstrip("-"), where, model)
        return model
    except RunError:
        raise
    except Exception as error:  # whatever a broken folder makes diffusers throw
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"{option} {where!r} cannot be loaded ({type(error).__name__}: {reason}): pass a folder with a config.json and "
            "weights, as save_pretrained writes it"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A clip at the size of a grid.

    Attributes:
        source: its file.
        shown: uint8 `[3, T, H, W]` pixels, a frame for every T of the token grid.
        latents: clean, float32 `[1, C, T, H, W]`.
        note: how the latents were made, for the page.
    """

    source: Source
    shown: Tensor
    latents: Tensor
    note: str


def load_clip(video: Path | None, grid: Grid, patch: Grid, channels: int, vae: str | None) -> Clip:
    """Frames and latents of a clip.

    Args:
        video: the file, None for the sample clip.
        grid: tokens along (T, H, W).
        patch: latents of a token along (T, H, W).
        channels: C.
        vae: folder of the model's VAE; None averages pixels, and mixes their colours to C channels at random.

    Raises:
        RunError: a file that cannot be read or has too few frames; a VAE that cannot be loaded, or of another model.
    """
    source = find_source(video)
    name = f"--video {str(source.path)!r}"
    T, H, W = (size * side for size, side in zip(grid, patch))
    encoder = None if vae is None else _load_vae(vae)
    frames, pixels = (FRAMES, PIXELS) if encoder is None else _ratios(encoder)
    wanted = (T - 1) * frames + 1
    clip = read_frames(source.path, name, height=H * pixels, width=W * pixels, min_frames=1)
    if clip.shape[1] < wanted:
        most = (clip.shape[1] - 1) // frames + 1
        if most < patch[0]:
            raise RunError(f"{name} has {clip.shape[1]} frame(s), too few for this model: pass a longer clip")
        raise RunError(
            f"{name} has {clip.shape[1]} frame(s), and a grid of {grid[0]} needs {wanted}: pass a longer clip, or --grid "
            f"{most // patch[0]},{grid[1]},{grid[2]}"
        )
    clip = clip[:, :wanted]
    shown = clip[:, :: frames * patch[0]]
    if encoder is None:
        latents = _mixed(as_float(clip[:, ::frames]), (T, H, W), channels)
        note = (
            f"no VAE was given: latents are the clip's pixels, averaged to the latent grid and mixed to {channels} channels at "
            "random, which is not what a trained model has seen"
        )
    else:
        latents = _encoded(encoder, as_float(clip)[None])
        note = f"latents from {type(encoder).__name__}"
        if latents.shape[1:] != (channels, T, H, W):
            raise RunError(
                f"--vae {vae!r} makes latents {tuple(latents.shape[1:])}, the model takes {(channels, T, H, W)}: pass the "
                "model's own VAE"
            )
    return Clip(source=source, shown=shown, latents=latents, note=note)


def _mixed(video: Tensor, size: tuple[int, int, int], channels: int) -> Tensor:
    """`[3, T, H, W]` pixels to `[1, channels, *size]`, each channel about as strong as noise."""
    small = torch.nn.functional.adaptive_avg_pool3d(video[None], size)
    mix = torch.randn(channels, 3, generator=torch.Generator().manual_seed(0))
    x = torch.einsum("oc,bcthw->bothw", mix, small)
    return (x - x.mean()) / x.std().clamp_min(1e-3)


def _load_vae(where: str) -> nn.Module:
    import diffusers

    model = _from_folder(diffusers, where, "--vae", "vae", torch.float32).eval()
    if not callable(getattr(model, "encode", None)):
        raise RunError(
            f"--vae {where!r} is a {type(model).__name__}, which cannot encode: pass the folder of the model's VAE"
        )
    return model


def _ratios(vae: Any) -> tuple[int, int]:
    """Frames and pixels along a side that one latent stands for."""
    config = vae.config
    frames = getattr(vae, "temporal_compression_ratio", None) or config.get("scale_factor_temporal")
    frames = frames or config.get("temporal_compression_ratio")
    pixels = getattr(vae, "spatial_compression_ratio", None) or config.get("scale_factor_spatial")
    return int(frames or FRAMES), int(pixels or PIXELS)


def _encoded(vae: Any, video: Tensor) -> Tensor:
    """Normalised latents of `[1, 3, T, H, W]` pixels: by the VAE's mean and std where it has them, and its scaling factor."""
    with torch.no_grad():
        latents = vae.encode(video).latent_dist.mode()
    kept = dict(vae.named_buffers())  # LTX's VAE has them in its weights
    mean, std = (vae.config.get(name, kept.get(name)) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        mean, std = (torch.as_tensor(x, dtype=torch.float32).view(1, -1, 1, 1, 1) for x in (mean, std))
        latents = (latents - mean) / std
    return latents * float(vae.config.get("scaling_factor") or 1)


def at_time(latents: Tensor, time: float, seed: int) -> Tensor:
    """Latents with noise, on the straight path from the clip to noise."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    return noisy(latents, noise, torch.tensor([time]))


def to_jpeg(frame: Tensor) -> bytes:
    """uint8 `[3, H, W]` as a JPEG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=80)
    return file.getvalue()
