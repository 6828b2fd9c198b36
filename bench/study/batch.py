"""One step's input, and the noise levels at which held-out loss is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHIFT, SPREAD = 0.7, 0.6
"""Training times are logit-normal: sigmoid(SHIFT + SPREAD * normal), as `flexsparse.training.flow.training_time`."""
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)


def levels() -> tuple[float, ...]:
    """The noise levels of held-out loss: middles of five equal parts of the training distribution of times.

    The mean over them estimates the expected training objective, with no luck of the draw in it.
    """
    normal = torch.special.ndtri(torch.tensor(QUANTILES, dtype=torch.float64))
    return tuple(round(t, 4) for t in (SHIFT + SPREAD * normal).sigmoid().tolist())


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Clean video and noise, float32 ``[B, C, T, H, W]``; times, float32 ``[B]``, 0 for clean and 1 for noise."""

    clean: Tensor
    noise: Tensor
    t: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(clean=self.clean.to(device), noise=self.noise.to(device), t=self.t.to(device))

    @property
    def noisy(self) -> Tensor:
        """The point at time t on the straight path from clean video to noise."""
        t = self.t.view(-1, 1, 1, 1, 1)
        return (1 - t) * self.clean + t * self.noise
