"""Saving a run and continuing it, in all of its processes."""

import json
from dataclasses import asdict
from typing import Any

import flexsparse as fs
from flexsparse.finetune import state
from flexsparse.finetune.launch import together
from flexsparse.finetune.train import Curves, Training
from flexsparse.training.checkpoint import Checkpoint
from flexsparse.training.environment import describe
from flexsparse.training.files import write_file

METRICS = "metrics.json"


def _parts(training: Training) -> int:
    return training.accelerator.num_processes if training.accelerator.is_fsdp2 else 1


def skipped(training: Training) -> dict[str, str]:
    """Skipped clips of all processes."""
    from accelerate.utils import gather_object

    found: dict[str, str] = {}
    for name, reason in gather_object(list(training.task.samples.reader.bad.items())):
        found.setdefault(name, reason)
    return dict(sorted(found.items()))


def _packed(training: Training, said: dict[str, Any]) -> Checkpoint:
    return state.pack(training.core, training.optimizer.optimizer, training.average, said)


def save(training: Training, done: int) -> None:
    """Writes a checkpoint after `done` steps, and metrics.json.

    Raises:
        RunError: a disk refuses; the checkpoint before is intact.
    """
    accelerator, folder = training.accelerator, training.options.folder
    rank, main = accelerator.process_index, accelerator.is_main_process
    bad = skipped(training)
    together(accelerator, lambda: state.begin(folder, done), main)
    said = {"step": done, "curves": asdict(training.curves), "bad": bad}
    together(
        accelerator, lambda: state.write_part(folder, done, rank, _packed(training, said)), rank < _parts(training)
    )
    together(accelerator, lambda: state.finish(folder, done, training.options.keep), main)
    together(accelerator, lambda: write_metrics(training, done, bad), main)


def resume(training: Training) -> int:
    """Continues from the last checkpoint; returns the number of steps done."""
    found = state.checkpoints(training.options.folder)
    if not found:
        return 0  # killed before its first checkpoint
    parts = _parts(training)
    rank = training.accelerator.process_index if parts > 1 else 0
    checkpoint = state.read_part(found[-1][1], rank, parts)
    state.unpack(checkpoint, training.core, training.optimizer.optimizer, training.average)
    training.curves = Curves(**checkpoint.state["curves"])
    training.task.samples.reader.bad.update(checkpoint.state["bad"])
    return int(checkpoint.state["step"])


def write_metrics(training: Training, done: int, bad: dict[str, str]) -> None:
    """Writes metrics.json: curves, skipped clips, where the run happened."""
    content = {
        "steps": done,
        "noise_levels": list(training.settings.noise_levels),
        "curves": asdict(training.curves),
        "skipped_clips": bad,
        "processes": training.accelerator.num_processes,
        "machine": describe(training.accelerator.device.type),
        "attention": [str(call.name) for call in fs.report(training.core).calls if call.sparse],
    }
    write_file(training.options.folder / METRICS, json.dumps(content, indent=1).encode())
