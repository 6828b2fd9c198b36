"""What a run is between two steps, as files: trained parameters, optimizer, moving average, curve.

A checkpoint is a folder that appears whole or not at all. It has one safetensors file, or one for each process where FSDP2
shards the model. Only trained parameters are in it: the others come from the model's folder again.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flexsparse.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from flexsparse.training.errors import RunError
from flexsparse.training.files import sync_folder

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8})")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a parameter; a parameter that is not sharded itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, by name, in order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class MovingAverage:
    """The exponential moving average of trained parameters, float32, sharded as they are.

    Args:
        model: whose parameters are averaged.
        decay: of the average; smaller in the first steps, so that the start is forgotten: `(1 + step) / (10 + step)`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.parameters, self.decay = trained_parameters(model), decay
        self.values = {name: local(p).detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Count the parameters after a step, numbered from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(local(parameter).detach().float(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages for its parameters."""
        before = {name: local(p).detach().clone() for name, p in self.parameters.items()}
        self._copy(self.values)
        try:
            yield
        finally:
            self._copy(before)

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            local(parameter).copy_(values[name])


def pack(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: MovingAverage | None, state: dict[str, Any]
) -> Checkpoint:
    """This process's part of a checkpoint."""
    parameters = trained_parameters(model)
    tensors = {f"model.{name}": local(p) for name, p in parameters.items()}
    of_optimizer = optimizer_tensors(optimizer, list(parameters))
    tensors |= {f"optimizer.{name}": local(value) for name, value in of_optimizer.items()}
    if average is not None:
        tensors |= {f"average.{name}": value for name, value in average.values.items()}
    return Checkpoint(tensors=tensors, state=state)


def unpack(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, average: MovingAverage | None
) -> None:
    """Puts back what `pack` took.

    Raises:
        RunError: it is another model's.
    """
    parameters = trained_parameters(model)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "average": {}}
    for name, value in checkpoint.tensors.items():
        kind, _, rest = name.partition(".")
        parts[kind][rest] = value
    wanted = {name: local(p).shape for name, p in parameters.items()}
    if wanted != {name: value.shape for name, value in parts["model"].items()}:
        raise RunError(
            "the checkpoint does not fit --model: pass the model that the run began with, or start with --force"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            local(parameter).copy_(parts["model"][name])
        for name in average.values if average is not None else ():
            average.values[name].copy_(parts["average"][name])  # type: ignore[union-attr]
    load_optimizer_tensors(optimizer, list(parameters), _as_sharded(parts["optimizer"], parameters))


def _as_sharded(tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's tensors, those of sharded parameters as shards of the same kind."""
    found = {}
    for key, value in tensors.items():
        parameter = parameters[key.rpartition(".")[0]]
        if isinstance(parameter, DTensor) and value.dim():
            value = DTensor.from_local(
                value.to(local(parameter).device),
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        found[key] = value
    return found


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in an output folder, the oldest first."""
    found = [(int(m[1]), p) for p in (folder / FOLDER).glob("step-*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return sorted(found)


def part(rank: int) -> str:
    """A process's file in a checkpoint."""
    return f"part-{rank:05d}.safetensors"


def begin(folder: Path, step: int) -> Path:
    """A fresh folder for the parts of a checkpoint; what killed runs left is removed.

    Raises:
        RunError: it cannot be made.
    """
    parent = folder / FOLDER
    try:
        parent.mkdir(exist_ok=True)
        for leftover in parent.glob(".step-*"):
            shutil.rmtree(leftover)
        temporary = _temporary(folder, step)
        temporary.mkdir()
    except OSError as error:
        raise RunError(
            f"checkpoints in {str(parent)!r} cannot be written ({error.strerror or error}); those before are intact: make room "
            "or pass another --out, then run again with --resume"
        ) from error
    return temporary


def _temporary(folder: Path, step: int) -> Path:
    return folder / FOLDER / f".step-{step:08d}"


def write_part(folder: Path, step: int, rank: int, checkpoint: Checkpoint) -> None:
    """Writes one process's part.

    Raises:
        RunError: it cannot be written.
    """
    save_checkpoint(_temporary(folder, step) / part(rank), checkpoint)


def finish(folder: Path, step: int, keep: int) -> None:
    """Makes the written parts a checkpoint, in one rename, and removes the oldest of more than `keep`.

    Raises:
        RunError: the disk refuses.
    """
    temporary, final = _temporary(folder, step), folder / FOLDER / f"step-{step:08d}"
    try:
        temporary.replace(final)
        sync_folder(final.parent)
        for _, old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    except OSError as error:
        raise RunError(
            f"checkpoint {str(final)!r} cannot be finished ({error.strerror or error}): make room, then run again with --resume"
        ) from error


def read_part(path: Path, rank: int, parts: int) -> Checkpoint:
    """One process's part of a checkpoint.

    Args:
        path: the checkpoint's folder.
        rank: of the process.
        parts: how many parts this run would write.

    Raises:
        RunError: corrupt, or written by another number of processes.
    """
    written = len(list(path.glob("part-*.safetensors")))
    if not written:
        raise RunError(f"checkpoint {str(path)!r} is empty: remove it to continue from the one before")
    if written != parts:
        raise RunError(
            f"checkpoint {str(path)!r} was sharded over {written} processes, and this run shards over {parts}: resume it with "
            f"{written}"
        )
    return load_checkpoint(path / part(rank))
