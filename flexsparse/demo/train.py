"""Trains the methods side by side, one step each in turn, and stores what is needed to continue.

Taking turns gives step times that were measured under the same conditions, and a killed run in which every
method has done the same number of steps.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexsparse.demo.data import Batch, ClipData
from flexsparse.demo.methods import build_model
from flexsparse.demo.model import VideoDiT
from flexsparse.demo.settings import Settings
from flexsparse.training import flow
from flexsparse.training.checkpoint import (
    Checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from flexsparse.training.errors import RunError
from flexsparse.training.progress import TrainingProgress
from flexsparse.training.rate import warmup_cosine


@dataclass(kw_only=True)
class Curves:
    """What one training logs; JSON values only."""

    loss: list[float] = field(default_factory=list)
    """Training loss of each step."""
    step_seconds: list[float | None] = field(default_factory=list)
    """Time of each step; None for the first one of a process, which compiles."""
    compile_seconds: list[float] = field(default_factory=list)
    """Time of those first steps."""
    held_out: list[dict[str, Any]] = field(default_factory=list)
    """`{"step": int, "losses": [one for each held-out time], "mean": float}`."""


@dataclass(kw_only=True)
class Training:
    """One method's model, optimizer and curves."""

    method: str
    model: VideoDiT
    optimizer: torch.optim.Optimizer
    curves: Curves

    @property
    def names(self) -> list[str]:
        """Parameter names, in the optimizer's order."""
        return [name for name, _ in self.model.named_parameters()]


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to a tenth; a function of the step alone."""
    warmup = min(10, max(1, settings.steps // 10))
    return warmup_cosine(step, steps=settings.steps, warmup=warmup, peak=settings.learning_rate)


def start_trainings(settings: Settings) -> list[Training]:
    """Fresh trainings of all methods, compiled lazily by their first step."""
    trainings = []
    for method in settings.methods:
        model = build_model(method, settings, compiled=settings.compile)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
        trainings.append(Training(method=method, model=model, optimizer=optimizer, curves=Curves()))
    return trainings


def pack(trainings: list[Training], step: int, settings: Settings) -> Checkpoint:
    """The checkpoint after `step` steps."""
    tensors: dict[str, Tensor] = {}
    for training in trainings:
        model = {f"model.{name}": value for name, value in training.model.state_dict().items()}
        optimizer = optimizer_tensors(training.optimizer, training.names)
        tensors |= {f"{training.method}.{name}": value for name, value in model.items()}
        tensors |= {f"{training.method}.optimizer.{name}": value for name, value in optimizer.items()}
    curves = {training.method: vars(training.curves) for training in trainings}
    state = {"step": step, "settings": settings.as_dict(), "digest": settings.digest(), "curves": curves}
    return Checkpoint(tensors=tensors, state=state)


def unpack(checkpoint: Checkpoint, trainings: list[Training], settings: Settings) -> int:
    """Puts a checkpoint's state into fresh trainings; returns the number of steps done.

    Raises:
        RunError: the run was made with other settings, or the checkpoint lacks something.
    """
    if checkpoint.state.get("digest") != settings.digest():
        differences = "; ".join(settings.differences(checkpoint.state.get("settings") or {}))
        raise RunError(
            f"--resume with other settings ({differences or 'unknown'}): pass the settings of the run, or "
            "start afresh with --force"
        )
    try:
        for training in trainings:
            prefix = f"{training.method}."
            mine = {
                name.removeprefix(prefix): value
                for name, value in checkpoint.tensors.items()
                if name.startswith(prefix)
            }
            model = {name[6:]: value for name, value in mine.items() if name.startswith("model.")}
            optimizer = {name[10:]: value for name, value in mine.items() if name.startswith("optimizer.")}
            training.model.load_state_dict(model)
            load_optimizer_tensors(training.optimizer, training.names, optimizer)
            training.curves = Curves(**checkpoint.state["curves"][training.method])
        return int(checkpoint.state["step"])
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"the checkpoint does not fit this model ({reason}): start afresh with --force") from error


def train(
    trainings: list[Training],
    data: ClipData,
    settings: Settings,
    *,
    first_step: int,
    checkpoint_path: Path,
    save_every: int,
    progress: TrainingProgress,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Trains all methods from `first_step` to `settings.steps`.

    Args:
        trainings: the methods; changed in place.
        data: the clip.
        settings: of the run.
        first_step: steps done before.
        checkpoint_path: written every `save_every` steps and after the last one.
        save_every: steps between checkpoints.
        progress: told about every step.
        after_step: called with the number of steps done; tests interrupt a run with it.

    Raises:
        RunError: a loss is not finite; a checkpoint cannot be written.
    """
    device = torch.device(settings.device)
    held_out = [batch.to(device) for batch in data.held_out()]
    for step in range(first_step, settings.steps):
        batch = data.batch(step).to(device)
        for training in trainings:
            compiles = step == first_step
            if compiles and settings.compile:
                progress.compiling(training.method)
            loss, seconds = _timed_step(training, batch, learning_rate(step, settings), device)
            if not math.isfinite(loss):
                raise RunError(f"{training.method}: the loss is {loss} at step {step + 1}: pass a smaller --lr")
            training.curves.loss.append(loss)
            training.curves.step_seconds.append(None if compiles else seconds)
            if compiles:
                training.curves.compile_seconds.append(seconds)
            progress.stepped(training.method, loss)
        done = step + 1
        if done % settings.eval_every == 0 or done == settings.steps:
            for training in trainings:
                training.curves.held_out.append(evaluate(training.model, held_out, done))
        if done % save_every == 0 or done == settings.steps:
            save_checkpoint(checkpoint_path, pack(trainings, done, settings))
        progress.step_done(done)
        if after_step:
            after_step(done)


def _timed_step(training: Training, batch: Batch, rate: float, device: torch.device) -> tuple[float, float]:
    """One optimizer step; returns its loss and its duration in seconds."""
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    synchronize(device)
    start = time.perf_counter()
    z = flow.noisy(batch.clean, batch.noise, batch.t)
    loss = flow.velocity_loss(training.model(z, batch.t), batch.clean, batch.noise)
    training.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
    training.optimizer.step()
    synchronize(device)
    return loss.item(), time.perf_counter() - start


def evaluate(model: VideoDiT, batches: list[Batch], step: int) -> dict[str, Any]:
    """Held-out losses, one for each batch, and their mean.

    Gradients stay enabled: without them `torch.compile` would compile the model a second time.
    """
    losses = []
    for batch in batches:
        z = flow.noisy(batch.clean, batch.noise, batch.t)
        losses.append(flow.velocity_loss(model(z, batch.t), batch.clean, batch.noise).item())
    return {"step": step, "losses": losses, "mean": sum(losses) / len(losses)}


def synchronize(device: torch.device) -> None:
    """Waits for the GPU, if there is one, so that clocks measure work and not its launch."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
