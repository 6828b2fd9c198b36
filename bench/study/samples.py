"""What a trained model makes: a clip sampled from noise, as a strip of frames."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.study.models import velocity
from bench.study.settings import Size
from flexsparse.training.files import write_file

STEPS = 16
SEED = 12_345
SHOWN = 4


@torch.no_grad()
def sample(model: nn.Module, size: Size, channels: int, device: str, bf16: bool = False) -> Tensor:
    """Euler steps along the flow from fixed noise: float32 ``[C, T, H, W]``."""
    random = torch.Generator().manual_seed(SEED)
    video = torch.randn(1, channels, size.frames, size.height, size.width, generator=random).to(device)
    times = torch.linspace(1, 0, STEPS + 1, device=device)
    for now, then in pairwise(times):
        video = video + (then - now) * velocity(model, video, now.expand(1), bf16)
    return video[0].float().cpu()


def save(video: Tensor, path: Path) -> None:
    """Pixels as a PNG strip of frames; latents, which no picture shows, as a safetensors file beside it.

    Raises:
        RunError: it cannot be written.
    """
    if video.shape[0] != 3:
        from safetensors.torch import save as as_bytes

        write_file(path.with_suffix(".safetensors"), as_bytes({"latents": video.contiguous()}))
        return
    import io

    from PIL import Image

    frames = video[:, :: max(1, video.shape[1] // SHOWN)][:, :SHOWN]
    pixels = frames.clamp(-1, 1).add(1).mul(127.5).round().byte()
    strip = torch.cat(list(pixels.permute(1, 2, 3, 0)), dim=1)
    file = io.BytesIO()
    Image.fromarray(strip.numpy()).save(file, format="PNG")
    write_file(path, file.getvalue())
