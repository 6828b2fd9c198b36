"""Training windows and held-out windows of one clip, split by time.

Letters: B batch, C channels, T frames, H and W pixel rows and columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flexsparse.training.flow import training_time
from flexsparse.training.windows import centre_cut, generator, random_cut

HELD_OUT_TIMES = (0.5, 0.65, 0.8)
_HELD_OUT_SHARE = 0.2


def frames_needed(frames: int) -> int:
    """The shortest clip that gives one training window and one held-out window."""
    return 2 * frames


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's input: clean video and noise, float32 `[B, 3, T, H, W]`; times, float32 `[B]`."""

    clean: Tensor
    noise: Tensor
    t: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(clean=self.clean.to(device), noise=self.noise.to(device), t=self.t.to(device))


class ClipData:
    """Windows of a clip: the first frames train, the last fifth (at least one window) is held out.

    A batch depends on the seed and on the step's number alone. So every method sees the same data, and a
    resumed run continues with the data that an uninterrupted one would have seen, with no generator to store.

    Args:
        video: float32 `[3, T, H, W]` in [-1, 1], at least as large as a window.
        frames, height, width: size of a window.
        seed: seed of crops, flips and noise.
    """

    def __init__(self, video: Tensor, *, frames: int, height: int, width: int, seed: int) -> None:
        held_out = max(frames, round(video.shape[1] * _HELD_OUT_SHARE))
        self.train_video = video[:, :-held_out]
        self.held_out_video = video[:, -held_out:]
        self.frames, self.height, self.width, self.seed = frames, height, width, seed

    def batch(self, step: int) -> Batch:
        """The training batch of one step, `B = 1`: a random window, crop and flip, noise and time."""
        random = generator(self.seed, step)
        clean = random_cut(self.train_video, self._window, random)
        noise = torch.randn(clean.shape, generator=random)
        return Batch(clean=clean, noise=noise, t=training_time(step))

    def held_out(self) -> list[Batch]:
        """The held-out batches: the centre crop at the last window, fixed noise, one batch for each fixed
        time."""
        clean = centre_cut(self.held_out_video, self._window, last=True)
        noise = torch.randn(clean.shape, generator=generator(self.seed, -1))
        return [Batch(clean=clean, noise=noise, t=torch.tensor([t])) for t in HELD_OUT_TIMES]

    @property
    def _window(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width
