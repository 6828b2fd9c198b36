"""One training step, one validation, and the loop around them.

Letters: B batch, C channels, T frames, H and W rows and columns of what the model sees.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from flexsparse.finetune.inputs import CONDITION, Family, Takes, collate
from flexsparse.finetune.interrupts import Interrupts
from flexsparse.finetune.model import Encoder
from flexsparse.finetune.objectives import Objective
from flexsparse.finetune.samples import Sample, Samples
from flexsparse.finetune.settings import Options, Schedules, Settings
from flexsparse.finetune.state import MovingAverage
from flexsparse.training.errors import RunError
from flexsparse.training.progress import TrainingProgress
from flexsparse.training.rate import warmup_cosine
from flexsparse.training.windows import SEED_STRIDE


@dataclass(kw_only=True)
class Curves:
    """What a run logs; JSON values only."""

    loss: list[float] = field(default_factory=list)
    """Training loss of each step, over all processes."""
    sparsity: list[float] = field(default_factory=list)
    """Share of the KV tiles that each step left out."""
    held_out: list[dict[str, Any]] = field(default_factory=list)
    """`{"step": int, "losses": [one for each noise level], "mean": float}`."""


@dataclass(frozen=True, kw_only=True)
class Latents:
    """What the model is to make, noise, and the first frame for a model that takes it: float32 `[B, C, T, H, W]`."""

    clean: Tensor
    noise: Tensor
    condition: Tensor | None

    def to(self, device: torch.device | str) -> Latents:
        """The same on another device."""
        condition = None if self.condition is None else self.condition.to(device)
        return Latents(clean=self.clean.to(device), noise=self.noise.to(device), condition=condition)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained on what.

    Attributes:
        family: how the model is called.
        objective: what it learns.
        takes: what it takes of a clip.
        samples: the clips.
        encoder: makes latents of videos; None for clips that are trained as they are.
    """

    family: Family
    objective: Objective
    takes: Takes
    samples: Samples
    encoder: Encoder | None


@dataclass(kw_only=True)
class Training:
    """A run in memory.

    Attributes:
        model: what is called in training: the model itself, or DDP around it.
        core: the model itself, wrapped by flexsparse.
        held_out: (sample, latents on the CPU) of this process's held-out clips, and how much each counts.
    """

    settings: Settings
    options: Options
    accelerator: Any
    model: nn.Module
    core: nn.Module
    kind: type[nn.Module]
    config: Any
    task: Task
    optimizer: Any
    schedules: Schedules
    average: MovingAverage | None
    curves: Curves
    held_out: list[tuple[Sample, Latents, float]] = field(default_factory=list)

    @property
    def accumulation(self) -> int:
        """Forward passes of one process in one step."""
        return self.settings.batch // (self.options.micro_batch * self.accelerator.num_processes)

    def sparsity(self) -> float:
        """Share of the KV tiles that attention leaves out now."""
        tiles = self.schedules.tiles
        if tiles is None:
            return self.settings.sparsity
        return self.settings.sparsity if tiles.finished else abs(tiles.value - tiles.start)

    def latents(self, samples: Sequence[Sample]) -> Latents:
        """What samples are trained on, on the device; noise is drawn from each sample's random numbers."""
        clean = torch.stack([sample.clean for sample in samples]).to(self.accelerator.device)
        condition, encoder = None, self.task.encoder
        if self.task.takes.condition == "clip" and encoder is None:
            condition = torch.stack([sample.given[CONDITION] for sample in samples]).to(clean.device)
        elif self.task.takes.condition == "clip" and encoder is not None:
            condition = encoder.first_frame(clean)
        if encoder is not None:
            clean = encoder(clean)
        if self.task.takes.condition == "latents":
            condition = clean
        noise = torch.stack([torch.randn(clean.shape[1:], generator=sample.random) for sample in samples])
        return Latents(clean=clean, noise=noise.to(clean.device), condition=condition)

    def times(self, samples: Sequence[Sample]) -> Tensor:
        """Training times `[B]`, functions of the samples' numbers."""
        return torch.cat([self.task.objective.time(sample.number, self.settings.time_shift) for sample in samples])

    def loss(self, model: nn.Module, samples: Sequence[Sample], latents: Latents, t: Tensor) -> Tensor:
        """The objective's loss at times `[B]`, a 0-d tensor."""
        objective, clean, noise = self.task.objective, latents.clean, latents.noise
        t = objective.told(t).to(clean.device)
        batch = collate(
            [sample.given for sample in samples],
            objective.noisy(clean, noise, t),
            t,
            self.task.takes,
            steps=objective.steps,
            condition=latents.condition,
        )
        return objective.loss(self.task.family.velocity(model, self.config, batch).float(), clean, noise, t)


def numbers(training: Training, first_step: int) -> Iterator[int]:
    """The numbers of this process's samples from a step on."""
    batch, processes = training.settings.batch, training.accelerator.num_processes
    mine = batch // processes
    for step in itertools.count(first_step):
        first = step * batch + training.accelerator.process_index * mine
        yield from range(first, first + mine)


def train(
    training: Training,
    *,
    first_step: int,
    save: Callable[[int], None],
    progress: TrainingProgress,
    interrupts: Interrupts,
    after_step: Callable[[int], None] | None = None,
) -> int:
    """Trains from `first_step` to the last one, or until a signal comes.

    Args:
        training: changed in place.
        first_step: steps done before.
        save: writes a checkpoint after so many steps.
        progress: told about every step.
        interrupts: whether a signal came, here or in another process.
        after_step: called with the number of steps done; tests interrupt a run with it.

    Returns:
        Steps done in all; checkpointed.

    Raises:
        RunError: a loss or gradient is not finite, see `_step`; a checkpoint cannot be written; no clip can be used.
    """
    s, options = training.settings, training.options
    saved = first_step
    samples = training.task.samples.ahead(numbers(training, first_step))
    with contextlib.closing(samples):  # type: ignore[type-var]
        for step in range(first_step, s.steps):
            if step == first_step and options.compile != "off":
                progress.compiling(s.method)
            loss, norm, stop = _step(training, step, samples, interrupts)
            done = step + 1
            training.curves.loss.append(loss)
            training.curves.sparsity.append(training.sparsity())
            rate = training.optimizer.param_groups[0]["lr"]
            log = {
                "train/loss": loss,
                "train/gradient_norm": norm,
                "train/lr": rate,
                "train/sparsity": training.sparsity(),
            }
            progress.stepped(s.method, loss)
            if training.held_out and (done % s.eval_every == 0 or done == s.steps):
                found = validate(training, done)
                training.curves.held_out.append(found)
                log |= {f"held_out/noise {level:g}": x for level, x in zip(s.noise_levels, found["losses"])}
                log["held_out/mean"] = found["mean"]
            _log(training, log, done)
            if done % options.save_every == 0 or done == s.steps or stop:
                save(done)
                saved = done
            progress.step_done(done)
            if after_step:
                after_step(done)
            if stop:
                break
    return saved


def _log(training: Training, values: dict[str, float], step: int) -> None:
    """Add to the logs; a disk that refuses them stops no run: its curves are in its checkpoints."""
    try:
        training.accelerator.log(values, step=step)
    except OSError as error:
        training.accelerator.trackers = []
        warnings.warn(
            f"the logs end before step {step}: they cannot be written ({error.strerror or error})", stacklevel=2
        )


def _step(
    training: Training, step: int, samples: Iterator[Sample], interrupts: Interrupts
) -> tuple[float, float, bool]:
    """One optimizer step: the loss over all processes, the gradient's norm, whether any process is to stop.

    Raises:
        RunError: loss or norm is not finite, in all processes alike; the weights are those of the step before.
    """
    s, accelerator, optimizer = training.settings, training.accelerator, training.optimizer
    for group in optimizer.param_groups:
        group["lr"] = warmup_cosine(step, steps=s.steps, warmup=s.warmup, peak=s.learning_rate)
    training.schedules.seek(step)
    torch.manual_seed((s.seed * SEED_STRIDE + step * accelerator.num_processes + accelerator.process_index) % 2**64)
    total = torch.zeros((), device=accelerator.device)
    for turn in range(training.accumulation):
        some = [next(samples) for _ in range(training.options.micro_batch)]
        latents, t = training.latents(some), training.times(some)
        last = turn == training.accumulation - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(training.model):
            loss = training.loss(training.model, some, latents, t) / training.accumulation
            accelerator.backward(loss)
        total += loss.detach()
    norm = accelerator.clip_grad_norm_([p for p in training.core.parameters() if p.requires_grad], s.max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    stop = torch.tensor(float(interrupts.signal is not None))
    said = accelerator.reduce(torch.stack([x.to(total) for x in (total, norm, stop)]), reduction="mean")
    loss_value, norm_value, stopping = said.tolist()  # the norm is the same everywhere, and so is its mean
    for name, value in (("loss", loss_value), ("gradient's norm", norm_value)):
        if not math.isfinite(value):
            if not step:  # no rate was applied yet
                raise RunError(
                    f"the {name} is {value} at step 1, before any update: look at --model's weights and at --data"
                )
            raise RunError(
                f"the {name} is {value} at step {step + 1}: start again with --force and a smaller --lr; or, where the machine "
                "is to blame, go on from the last checkpoint with --resume"
            )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if training.average is not None:
        training.average.update(step)
    return loss_value, norm_value, stopping > 0


def hold_out(training: Training) -> None:
    """Prepares this process's share of the held-out clips: every process gets equally many, and none counts twice."""
    accelerator = training.accelerator
    samples = training.task.samples.held_out()
    rank, processes = accelerator.process_index, accelerator.num_processes
    for index in range(rank, len(samples) + (-len(samples)) % processes, processes):
        sample = samples[index % len(samples)]
        training.held_out.append((sample, training.latents([sample]).to("cpu"), float(index < len(samples))))


def validate(training: Training, step: int) -> dict[str, Any]:
    """Held-out losses over all processes, one for each noise level, and their mean.

    Gradients stay enabled for a compiled model, which would be compiled a second time without; but FSDP2 waits for a backward.
    """
    accelerator = training.accelerator
    graph = training.options.compile != "off" and not accelerator.is_fsdp2
    drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in training.core.modules())
    training.core.train(not drops)
    losses = torch.zeros(len(training.settings.noise_levels), dtype=torch.float64)
    with torch.set_grad_enabled(graph):
        for sample, latents, weight in training.held_out:
            latents = latents.to(accelerator.device)
            for index, level in enumerate(training.settings.noise_levels):
                loss = training.loss(training.core, [sample], latents, torch.tensor([level]))
                losses[index] += weight * float(loss.detach())
    training.core.train()
    for (
        module
    ) in training.core.modules():  # without a backward, parameters stay gathered, and a checkpoint would take them so
        if isinstance(module, FSDPModule):
            module.reshard()
    weights = sum(weight for *_, weight in training.held_out)
    both = torch.cat([losses, torch.tensor([weights], dtype=torch.float64)]).to(accelerator.device)
    *sums, count = accelerator.reduce(both, reduction="sum").tolist()
    means = [value / count for value in sums]
    return {"step": step, "losses": means, "mean": sum(means) / len(means)}
