"""What a finished run leaves behind: the transformer, or LoRA weights, and the gates.

The weights go into a fresh instance of the model's own class, so that files are the same for a sharded model.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import flexsparse as fs
from flexsparse.finetune.model import prepare_model
from flexsparse.finetune.objectives import FILE, SCHEDULER, scheduler_file
from flexsparse.finetune.train import Training
from flexsparse.training.errors import RunError
from flexsparse.training.files import write_atomically

TRANSFORMER = "transformer"
LORA = "pytorch_lora_weights.safetensors"
GATES = "gates.safetensors"


def export(training: Training, folder: Path) -> list[Path]:
    """Writes the trained weights, raw or averaged; every process has to call it, the first one writes.

    Returns:
        What was written.

    Raises:
        RunError: the disk refuses; what was there before is intact.
    """
    averaged = training.average if training.settings.export == "ema" else None
    with averaged.applied() if averaged is not None else contextlib.nullcontext():
        tensors = training.accelerator.get_state_dict(training.model)
        if not training.accelerator.is_main_process:
            return []
        model = _filled(training, tensors)
        from safetensors import SafetensorError  # what safetensors makes of a full disk

        try:
            return _write(training, model, folder)
        except (OSError, SafetensorError) as error:
            why = getattr(error, "strerror", None) or error
            raise RunError(
                f"the result in {str(folder)!r} cannot be written ({why}): make room, then run again with --resume"
            ) from error


def _filled(training: Training, tensors: dict[str, Tensor]) -> nn.Module:
    """A model of the original class, on the CPU, prepared as the trained one is, with its weights."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = training.kind.from_config(training.config)  # type: ignore[attr-defined]
        options = replace(training.options, compile="off", gradient_checkpointing=False, wrap={})
        prepare_model(model, replace(training.settings, gates_from=None), options)
    model.load_state_dict({name: value.detach().float().cpu() for name, value in tensors.items()}, assign=True)
    return model


def _write(training: Training, model: nn.Module, folder: Path) -> list[Path]:
    written = []
    if training.settings.lora_rank:
        from peft import get_peft_model_state_dict
        from safetensors.torch import save

        found = get_peft_model_state_dict(model, adapter_name="default")
        tensors = {f"transformer.{name}": value.contiguous() for name, value in found.items()}
        write_atomically(folder / LORA, save(tensors, metadata={"format": "pt"}))
        written.append(folder / LORA)
    else:
        _replace(folder / TRANSFORMER, lambda path: model.save_pretrained(path))  # type: ignore[operator]
        written.append(folder / TRANSFORMER)
        _keep_scheduler(training.settings.model, folder)
    if fs.gate_parameters(model):
        _replace(folder / GATES, lambda path: fs.save_gates(model, path))
        written.append(folder / GATES)
    return written


def _keep_scheduler(model: str, folder: Path) -> None:
    """What the model learned to predict is said beside its weights, as its pipeline did: a next stage goes on with that."""
    said = scheduler_file(model)
    if said is not None:
        (folder / SCHEDULER).mkdir(exist_ok=True)
        write_atomically(folder / SCHEDULER / FILE, said.read_bytes())


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file or folder under another name and renames it; one that was there goes away last."""
    temporary, old = (path.with_name(f".{path.name}.{kind}") for kind in ("partial", "old"))
    for leftover in (temporary, old):
        _remove(leftover)
    write(temporary)
    for file in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    if path.is_dir():
        path.replace(old)
    temporary.replace(path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
