"""Tiny videos, written with PyAV where a test needs them."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av")


@pytest.fixture
def make_video(tmp_path: Path) -> Callable[..., Path]:
    """A factory: `make_video(name, frames)` writes a moving gradient, 64 x 48, and returns its path."""

    def make(name: str = "clip.mp4", frames: int = 24, width: int = 64, height: int = 48) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w", format="mp4") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            x, y = np.meshgrid(np.arange(width), np.arange(height))
            for index in range(frames):
                rgb = np.stack([(x * 3 + 5 * index) % 256, (y * 5) % 256, (x + y + 9 * index) % 256], -1)
                frame = av.VideoFrame.from_ndarray(rgb.astype(np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return make


@pytest.fixture
def make_audio(tmp_path: Path) -> Callable[[], Path]:
    """A factory: writes a file that holds a tone and no picture, and returns its path."""

    def make(name: str = "tone.wav") -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
            samples = (1000 * np.sin(np.arange(8000) / 5)).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 8000, 0, Fraction(1, 8000)
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return make
