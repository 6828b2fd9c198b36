"""Tiny runs: what the tests of fine-tuning train, and clips for them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from flexsparse.finetune.run import Result, finetune
from flexsparse.finetune.settings import Options, Settings
from flexsparse.finetune.state import checkpoints, part
from flexsparse.training.checkpoint import load_checkpoint

SETTINGS: dict[str, Any] = {
    "frames": 4,
    "height": 32,
    "width": 32,
    "tile": (2, 4, 4),
    "text_tokens": 4,
    "steps": 6,
    "anneal_step": 0.25,
    "anneal_every": 1,
    "sparsity": 0.5,
    "learning_rate": 2e-3,
    "warmup": 2,
    "noise_levels": (0.3, 0.7),
    "eval_every": 3,
}
OPTIONS: dict[str, Any] = {"compile": "off", "device": "cpu", "save_every": 2}


def settings(**others: Any) -> Settings:
    """Settings of a tiny run."""
    return Settings(**{**SETTINGS, **others})


def options(folder: Path, **others: Any) -> Options:
    """Options of a tiny run."""
    return Options(folder=folder, **{**OPTIONS, **others})


def quiet() -> Console:
    """A console that keeps its text."""
    return Console(file=io.StringIO(), width=200)


def forget_accelerate() -> None:
    """As in a fresh process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def tuned(folder: Path, after_step: Any = None, console: Console | None = None, **others: Any) -> Result:
    """A whole run; keyword arguments go to the settings or to the options, whoever has them."""
    forget_accelerate()
    mine = {name: others.pop(name) for name in list(others) if name in Options.__dataclass_fields__}
    return finetune(settings(**others), options(folder, **mine), console or quiet(), after_step=after_step)


def stop_after(steps: int) -> Any:
    """An `after_step` that ends a run as a kill does: without saving."""

    def after_step(done: int) -> None:
        if done == steps:
            raise InterruptedError

    return after_step


def tensors(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of one kind in a run's last checkpoint."""
    stored = load_checkpoint(checkpoints(folder)[-1][1] / part(0)).tensors
    return {name.partition(".")[2]: value for name, value in stored.items() if name.startswith(kind + ".")}


def write_video(path: Path, frames: int = 12, size: int = 48, seed: int = 0) -> Path:
    """A moving gradient."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        x, y = np.meshgrid(np.arange(size), np.arange(size))
        for index in range(frames):
            rgb = np.stack([(x * (3 + seed) + 5 * index) % 256, (y * 5) % 256, (x + y + 9 * index) % 256], -1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return path
