"""Flow matching on straight paths: `z_t = (1 - t) * clean + t * noise`, velocity `noise - clean`.

Every video is float `[B, 3, T, H, W]`, every time float `[B]` in [0, 1]: 0 is clean, 1 is noise.
"""

import torch
from torch import Tensor


def _per_sample(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1, 1)


def noisy(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point at time `t` on the straight path from `clean` to `noise`."""
    return (1 - _per_sample(t)) * clean + _per_sample(t) * noise


def velocity_loss(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of a predicted velocity, a 0-d tensor."""
    return (velocity - (noise - clean)).square().mean()


def denoise(z: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """The clean video that one straight step from time `t` to 0 reaches."""
    return z - _per_sample(t) * velocity


def share(step: int) -> float:
    """How far through a distribution of times a step is, in [0, 1).

    Steps walk through it evenly (golden ratio) instead of at random: the loss depends on the time far more than on
    anything else, so that a few dozen steps show a curve and not the luck of the draw.
    """
    return (0.5 + step * 0.6180339887498949) % 1.0


def training_time(step: int) -> Tensor:
    """The time of a training step, float32 `[1]`: logit-normal, most of it between 0.5 and 0.8."""
    normal = torch.special.ndtri(torch.tensor([share(step)], dtype=torch.float64).clamp(1e-3, 1 - 1e-3))
    return (0.7 + 0.6 * normal).sigmoid().float()
