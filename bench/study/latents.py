"""Windows as latents: the pixels that a latent window takes, and their encoding by a VAE of diffusers.

Letters: C channels, T, H and W frames, rows and columns (of latents, or of pixels where said).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexsparse.training.errors import RunError
from flexsparse.training.windows import Window

_WEIGHTS = (".safetensors", ".bin")


class Encoder:
    """Encodes pixels to normalised latents, in float32, with the mode of the VAE's distribution: no luck of a draw.

    Args:
        folder: of an ``AutoencoderKL*`` of diffusers, or of a pipeline that has a ``vae``.
        latents: the latent window (T, H, W) to make.
        device: where to encode.

    Attributes:
        pixels: the window (T, H, W) of pixels that gives it.
        channels: C of the latents.
        digest: SHA-256 of the VAE's configuration and weights.

    Raises:
        RunError: no such folder, no VAE that can serve, or no pixel window gives these latents.
    """

    pixels: Window
    channels: int

    def __init__(self, folder: Path, latents: Window, device: torch.device | str = "cpu") -> None:
        self._name, self._device = f"--vae {str(folder)!r}", device
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise RunError(f"{self._name} {what}: pass the folder of a diffusers VAE")
        if (folder / "vae" / "config.json").is_file():
            folder = folder / "vae"
        self._vae = self._load(folder).to(device)
        self.digest = _digest(folder)
        # an encoder without a 3D convolution encodes frame by frame
        self._frames = any(isinstance(module, nn.Conv3d) for module in self._vae.encoder.modules())
        self._shift, self._scale = self._normalisation()
        self._find_window(latents)

    def _load(self, folder: Path) -> Any:
        try:
            kind = json.loads((folder / "config.json").read_text())["_class_name"]
            if not kind.startswith("AutoencoderKL"):
                raise ValueError(f"it is a {kind}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # diffusers warns of what it imports
                diffusers: Any = importlib.import_module("diffusers")
                vae, told = getattr(diffusers, kind).from_pretrained(
                    folder, torch_dtype=torch.float32, local_files_only=True, output_loading_info=True
                )
            if told["missing_keys"]:  # diffusers would leave them random
                raise ValueError(f"its weights lack {sorted(told['missing_keys'])[0]}")
        except Exception as error:  # whatever a folder of another kind, or a broken file, throws
            raise RunError(
                f"{self._name} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:200]}): pass the "
                "folder of an AutoencoderKL*, as save_pretrained writes it"
            ) from error
        return vae.eval().requires_grad_(False)

    def _normalisation(self) -> tuple[Tensor, Tensor]:
        """What to subtract and what to multiply with, each ``[1, C or 1, 1, 1, 1]``, as the VAE's pipelines do."""
        config, kept = self._vae.config, dict(self._vae.named_buffers())  # LTX has its mean and std in the weights
        mean, std = (config.get(name, kept.get(name)) for name in ("latents_mean", "latents_std"))
        factor = config.get("scaling_factor")
        if factor is None and (mean is None or std is None):
            raise RunError(
                f"{self._name} has neither a scaling_factor nor latents_mean and latents_std in its config.json, so that its "
                "latents cannot be normalised: add them, or pass another VAE"
            )
        if mean is None or std is None:
            mean, std = config.get("shift_factor") or 0.0, 1.0
        mean, std = (
            torch.as_tensor(x, dtype=torch.float32, device=self._device).view(1, -1, 1, 1, 1) for x in (mean, std)
        )
        return mean, float(1.0 if factor is None else factor) / std

    def _find_window(self, latents: Window) -> None:
        """The pixel window by the VAE's ratios, tried out: what a configuration says of them is not always so."""
        config, (T, H, W) = self._vae.config, latents
        names = ("scale_factor_{}", "{}_compression_ratio")
        every, side = (
            next((value for name in names if (value := config.get(name.format(axis)))), None)
            or getattr(self._vae, f"{axis}_compression_ratio", None)
            for axis in ("temporal", "spatial")
        )
        side = int(side or 2 ** (len(config.get("block_out_channels") or "1234") - 1))
        every = int(every or 4) if self._frames else 1
        made: dict[Window, str] = {}
        for frames in dict.fromkeys((every * (T - 1) + 1, every * T)):  # causal in time, or not
            window = (frames, H * side, W * side)
            try:
                found = self(torch.zeros(1, 3, *window))
            except RuntimeError as error:
                made[window] = " ".join(str(error).split())[:120]
                continue
            if tuple(found.shape[2:]) == latents:
                self.pixels, self.channels = window, found.shape[1]
                return
            made[window] = f"latents {tuple(found.shape[2:])}"
        tried = "; ".join(f"{window} pixels: {what}" for window, what in made.items())
        raise RunError(f"{self._name} gives no latents {latents} ({tried}): pass another VAE")

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        """float32 pixels ``[B, 3, T, H, W]`` in [-1, 1] -> float32 latents ``[B, C, T, H, W]``, on the encoder's device."""
        video = video.to(self._device)
        if self._frames:
            found = self._vae.encode(video).latent_dist.mode()
        else:
            B, _, T = video.shape[:3]
            found = self._vae.encode(video.transpose(1, 2).flatten(0, 1)).latent_dist.mode()
            found = found.unflatten(0, (B, T)).transpose(1, 2)
        return (found - self._shift) * self._scale


def _digest(folder: Path) -> str:
    """SHA-256 of what a VAE computes: its configuration and weights, not where it lies."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name == "config.json" or path.suffix in _WEIGHTS:
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()
