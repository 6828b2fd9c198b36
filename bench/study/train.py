"""One training: from random weights or another run's, resumed after a kill to the same numbers.

The learning rate is constant after its warm-up and losses are those of averaged weights, so that a run can be made longer
later, and any point of its curve is a result (for equal FLOPs, a sparse run takes more steps than a dense one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flexsparse as fs
from bench.study import models
from bench.study.batch import Batch
from bench.study.clips import Clips
from bench.study.evaluate import Evaluation, evaluate
from bench.study.flops import Flops, count
from bench.study.rows import Results, Row
from bench.study.settings import ANCHOR, Method, Run, Size
from flexsparse.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from flexsparse.training.errors import RunError
from flexsparse.training.flow import velocity_loss

WARMUP = 20
AVERAGE = 0.98
"""Decay of the averaged weights: about the last 50 steps; fewer at the start."""
CHECKPOINT = "checkpoint.safetensors"


@dataclass(kw_only=True)
class Progress:
    """What a run has done; JSON values only."""

    step: int = 0
    train_loss: list[float] = field(default_factory=list)
    flops: float = 0.0
    attention_flops: float = 0.0
    measured: list[Any] = field(default_factory=list)
    """`[step, FLOPs of attention, of selection, of all]` of a training step, at each evaluation."""


@dataclass(kw_only=True)
class Training:
    """A run under way.

    Attributes:
        run: its settings.
        model: what trains.
        averaged: the same with averaged weights, uncompiled: what is evaluated.
        schedules: of the annealing; shared by both models.
        optimizer: AdamW.
        bf16: whether models run under bfloat16 autocast; weights, loss and optimizer are float32.
        progress: of the run.
    """

    run: Run
    model: nn.Module
    averaged: nn.Module
    schedules: Sequence[fs.SparsitySchedule]
    optimizer: torch.optim.Optimizer
    bf16: bool = False
    progress: Progress = field(default_factory=Progress)

    @property
    def names(self) -> list[str]:
        """Parameter names, in the optimizer's order."""
        return [name for name, _ in self.model.named_parameters()]


def start(
    run: Run, channels: int, *, device: str, compiled: bool, weights: Path | None, bf16: bool = False
) -> Training:
    """A fresh training.

    Args:
        run: its settings.
        channels: of the video.
        device: "cpu" or "cuda".
        compiled: whether the model goes through `torch.compile`.
        weights: checkpoint of averaged weights to start from, for a run with ``start``.
        bf16: see `Training`.
    """
    builder, schedules = models.scheduled(run.method, run.steps)
    model, averaged = (
        models.make(run.size, run.method, run.seed, channels, compile=compile, schedule=builder).to(device)
        for compile in (compiled, False)
    )
    if weights is not None:
        found = load_checkpoint(weights).tensors
        missing, unexpected = model.load_state_dict(found, strict=False)
        if unexpected or any("to_gate" not in name for name in missing):
            raise RunError(f"{str(weights)!r} does not fit {run.name}: delete the study's folder and start again")
    averaged.load_state_dict(model.state_dict())
    averaged.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    return Training(run=run, model=model, averaged=averaged, schedules=schedules, optimizer=optimizer, bf16=bf16)


def step(training: Training, batch: Batch, number: int) -> Tensor:
    """One optimizer step; returns the loss, on the model's device."""
    for schedule in training.schedules:
        schedule.seek(number)
    for group in training.optimizer.param_groups:
        group["lr"] = training.run.rate * min(1.0, (number + 1) / WARMUP)
    velocity = models.velocity(training.model, batch.noisy, batch.t, training.bf16)
    loss = velocity_loss(velocity, batch.clean, batch.noise)
    training.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
    training.optimizer.step()
    decay = min(AVERAGE, (1 + number) / (10 + number))
    with torch.no_grad():
        own = list(training.model.parameters())
        torch._foreach_lerp_(list(training.averaged.parameters()), own, 1 - decay)
    return loss.detach()


def pack(training: Training) -> Checkpoint:
    """What resuming needs."""
    tensors = {f"model.{name}": value for name, value in training.model.state_dict().items()}
    tensors |= {f"averaged.{name}": value for name, value in training.averaged.state_dict().items()}
    optimizer = optimizer_tensors(training.optimizer, training.names)
    tensors |= {f"optimizer.{name}": value for name, value in optimizer.items()}
    state = {"digest": training.run.digest(), "run": training.run.as_dict(), "progress": vars(training.progress)}
    return Checkpoint(tensors=tensors, state=state)


def unpack(training: Training, checkpoint: Checkpoint) -> None:
    """Puts a checkpoint into a fresh training.

    Raises:
        RunError: it is of a run with other settings.
    """
    if checkpoint.state.get("digest") != training.run.digest():
        raise RunError(
            f"the checkpoint of {training.run.name} was made with other settings: pass another --out, or delete its folder"
        )
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "averaged": {}, "optimizer": {}}
    for name, value in checkpoint.tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    training.model.load_state_dict(parts["model"])
    training.averaged.load_state_dict(parts["averaged"])
    load_optimizer_tensors(training.optimizer, training.names, parts["optimizer"])
    training.progress = Progress(**checkpoint.state["progress"])


def train(
    training: Training,
    clips: Clips,
    held_out: Sequence[Batch],
    results: Results,
    folder: Path,
    *,
    until: int,
    save_every: int = 50,
    stop: Callable[[], bool] = lambda: False,
    told: Callable[[int, float], None] = lambda step, loss: None,
) -> bool:
    """Train until a step; rows and checkpoints are written on the way.

    Args:
        training: from `start`, after `unpack` where there is a checkpoint.
        clips: training batches.
        held_out: on the model's device.
        results: gets the rows "evaluation" and, at the end, "run".
        folder: of the run: its checkpoint, and the averaged weights at the end.
        until: steps in all.
        save_every: steps between checkpoints.
        stop: asked after every step; ends the training early, after a checkpoint.
        told: called after each step with the number of steps done and the loss.

    Returns:
        Whether ``until`` was reached, or the loss was not finite: then the rows say so, and nothing goes on from there.

    Raises:
        RunError: a file cannot be written.
    """
    run, progress = training.run, training.progress
    device = next(training.model.parameters()).device
    if not progress.measured:
        _measured(training, evaluate(training.averaged, held_out, training.bf16), clips.channels, results)
    while progress.step < until:
        batch = clips.batch(run.seed, progress.step).to(device)
        loss = step(training, batch, progress.step).item()
        progress.step += 1
        progress.train_loss.append(loss)
        if not math.isfinite(loss):
            results.put(*_diverged(training, clips.channels, until))
            return True
        told(progress.step, loss)
        if progress.step % run.evaluate_every == 0 or progress.step == until:
            _measured(training, evaluate(training.averaged, held_out, training.bf16), clips.channels, results)
        stopping = stop()
        if progress.step % save_every == 0 or progress.step == until or stopping:
            save_checkpoint(folder / CHECKPOINT, pack(training))
        if stopping and progress.step < until:
            return False
    averaged = Checkpoint(tensors=dict(training.averaged.state_dict()), state=run.as_dict())
    save_checkpoint(weights_of(folder, until), averaged)
    results.put(_summary(training, clips.channels))
    return True


def weights_of(folder: Path, steps: int) -> Path:
    """Where a run leaves its averaged weights after so many steps."""
    return folder / f"averaged-{steps}.safetensors"


def _diverged(training: Training, channels: int, until: int) -> list[Row]:
    """The last rows of a run whose loss is not finite: an evaluation without a loss, and a summary."""
    run, progress = training.run, training.progress
    before, attention, selection, total = progress.measured[-1]
    progress.flops += (progress.step - before) * total
    progress.attention_flops += (progress.step - before) * (attention + selection)
    nothing: Row = {"loss": None, "levels": {}, "windows": [], "density": None}
    flops = {"flops": progress.flops, "attention_flops": progress.attention_flops}
    last = {"kind": "evaluation", **_labels(run), "step": progress.step, **flops, **nothing}
    losses = [loss for loss in progress.train_loss if math.isfinite(loss)]
    summary = _summary(training, channels) | {"steps": until, "train_loss": losses}
    return [last, summary | {"finished": False, "diverged": progress.step}]


def _measured(training: Training, found: Evaluation, channels: int, results: Results) -> None:
    """Adds the FLOPs since the last evaluation, at the mean of a step's then and now, and writes a row."""
    run, progress = training.run, training.progress
    now = count(training.averaged, run.size, run.method, channels, kept=found.kept)
    if progress.measured:
        before, attention, selection, total = progress.measured[-1]
        steps = progress.step - before
        progress.flops += steps * (now.total + total) / 2
        progress.attention_flops += steps * (now.attention + now.selection + attention + selection) / 2
    progress.measured.append([progress.step, now.attention, now.selection, now.total])
    results.put(
        {
            "kind": "evaluation",
            **_labels(run),
            "step": progress.step,
            "flops": progress.flops,
            "attention_flops": progress.attention_flops,
            "loss": found.loss,
            "levels": found.levels,
            "windows": found.windows,
            "density": found.density,
        }
    )


def _labels(run: Run) -> Row:
    return {
        "run": run.name,
        "size": run.size.name,
        "method": run.method.name,
        "seed": run.seed,
        "question": run.question,
    }


def _summary(training: Training, channels: int) -> Row:
    """The row of a run that has reached its end; FLOPs are means over its steps."""
    run, progress, method = training.run, training.progress, training.run.method
    sparse = method.attention == "sparse"
    attention, total = progress.attention_flops / progress.step, progress.flops / progress.step
    _, last_attention, last_selection, _ = progress.measured[-1]
    selection = attention * last_selection / (last_attention + last_selection)
    return {
        "kind": "run",
        **_labels(run),
        "steps": progress.step,
        "start": run.start,
        "parameters": models.count_parameters(training.model),
        "grid": list(run.size.grid),
        "tile": method.tile if sparse else None,
        "builder": repr(method.builder) if sparse else method.attention,
        "flops_per_step": asdict(Flops(attention=attention - selection, selection=selection, other=total - attention))
        | {"total": total},
        "dense_flops_per_step": dense_flops(run.size, channels).total,
        "train_loss": progress.train_loss,
        "finished": True,
    }


def dense_flops(size: Size, channels: int) -> Flops:
    """Of a step of the dense model of a size."""
    method = Method(name=ANCHOR, attention="dense")
    return count(models.make(size, method, 0, channels), size, method, channels)
