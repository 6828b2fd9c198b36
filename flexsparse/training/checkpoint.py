"""Checkpoints: one safetensors file that holds the tensors and, as JSON in its header, everything else.

One file, so that tensors and step number cannot disagree; no pickle, so that a file from elsewhere runs no
code.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexsparse.training.errors import RunError
from flexsparse.training.files import write_atomically

_FORMAT = "flexsparse-checkpoint-1"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """State of a run between two steps."""

    tensors: dict[str, Tensor]
    """Every tensor, by a dotted name such as `vsa.model.patch_in.weight`."""
    state: dict[str, Any]
    """Everything else, as JSON values: step, settings, curves."""


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint atomically.

    Raises:
        RunError: it cannot be written; the previous checkpoint is untouched.
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    metadata = {
        "format": _FORMAT,
        "checksum": str(_checksum(tensors)),
        "state": json.dumps(checkpoint.state),
    }
    try:
        write_atomically(path, save(tensors, metadata=metadata))
    except OSError as error:
        raise RunError(
            f"checkpoint {str(path)!r} cannot be written ({error.strerror or error}); a previous checkpoint is intact: make "
            "room, then run again, with --resume where there is one"
        ) from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint back, onto the CPU.

    Raises:
        RunError: not readable, truncated, changed, or no checkpoint of ours.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"format {metadata.get('format')!r} instead of {_FORMAT!r}")
            names = list(file.keys())
            tensors = {name: file.get_tensor(name).clone() for name in names}  # no view into the mapped file
        if str(_checksum(tensors)) != metadata["checksum"]:
            raise ValueError("the checksum does not match its tensors")
        state = json.loads(metadata["state"])
        if not isinstance(state, dict):
            raise ValueError("its state is not a JSON object")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise RunError(
            f"checkpoint {str(path)!r} is corrupt ({error}): delete it, or start afresh with --force"
        ) from error
    return Checkpoint(tensors=tensors, state=state)


def _checksum(tensors: dict[str, Tensor]) -> int:
    """CRC-32 over names and bytes: safetensors itself notices a cut file, but not a flipped byte."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().tobytes(), value)
    return value


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """An optimizer's per-parameter tensors as `<parameter>.<state>`; `names` in the order of its parameters.

    AdamW keeps nothing else that changes: the learning rate is a function of the step.
    """
    state = optimizer.state_dict()["state"]
    return {f"{names[index]}.{key}": value for index, entry in state.items() for key, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(names):
        entry = {
            key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.rpartition(".")[0] == name
        }
        if entry:
            state[index] = entry
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
