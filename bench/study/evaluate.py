"""Held-out loss of a model, at each noise level."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import nn

from bench.study.batch import Batch
from bench.study.flops import observe
from bench.study.models import velocity
from flexsparse.training.flow import velocity_loss


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one pass over the held-out batches gave.

    Attributes:
        levels: mean loss at each noise level, by the level.
        windows: mean loss of each window, over levels.
        kept: KV tiles that a row keeps and computed query rows of a tile, on average; None for attention that is not sparse.
        density: share of the pairs of tokens that attention computed.
    """

    levels: dict[str, float]
    windows: list[float]
    kept: tuple[float, float] | None
    density: float

    @property
    def loss(self) -> float:
        """Mean over windows and levels: an estimate of the training objective on unseen video."""
        return fmean(self.levels.values())


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch], bf16: bool = False) -> Evaluation:
    """Velocity loss of an uncompiled model.

    Args:
        model: in evaluation or training mode, it makes no difference to it.
        batches: `Clips.held_out`: all levels of one window, then of the next.
        bf16: under autocast, as in training.
    """
    by_level: dict[str, list[float]] = defaultdict(list)
    losses = []
    with observe(model) as seen:
        for batch in batches:
            loss = velocity_loss(velocity(model, batch.noisy, batch.t, bf16), batch.clean, batch.noise).item()
            by_level[f"{batch.t.item():.4f}"].append(loss)
            losses.append(loss)
    each = len(by_level)
    windows = [fmean(losses[first : first + each]) for first in range(0, len(losses), each)]
    means = {level: fmean(x) for level, x in by_level.items()}
    return Evaluation(levels=means, windows=windows, kept=seen.kept, density=seen.density)
