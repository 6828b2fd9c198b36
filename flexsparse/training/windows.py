"""Windows of a clip: where a training sample is cut out.

Letters: C channels, T frames, H and W rows and columns.
"""

import torch
from torch import Tensor

ZOOM = 1.15  # training crops move inside a frame this much larger than a window
SEED_STRIDE = 1_000_003  # keeps the streams of different seeds apart
Window = tuple[int, int, int]


def generator(seed: int, number: int) -> torch.Generator:
    """The random numbers of sample `number` (-1: what does not belong to a sample); nothing of it need be stored."""
    return torch.Generator().manual_seed((seed * SEED_STRIDE + number + 1) % 2**64)


def decoded_size(height: int, width: int) -> tuple[int, int]:
    """Pixel size to decode at, so that crops of `height` x `width` have room to move."""
    return round(height * ZOOM), round(width * ZOOM)


def cut(video: Tensor, start: Window, window: Window) -> Tensor:
    """`[C, T, H, W]` -> `[1, C, *window]` from a start (frame, row, column)."""
    time, rows, columns = (slice(first, first + size) for first, size in zip(start, window))
    return video[:, time, rows, columns][None].contiguous()


def random_cut(video: Tensor, window: Window, random: torch.Generator) -> Tensor:
    """A random window, flipped half of the time: `[C, T, H, W]` -> `[1, C, *window]`."""
    limits = [size - side for size, side in zip(video.shape[1:], window)]
    start, top, left = (int(torch.randint(limit + 1, (), generator=random)) for limit in limits)
    clean = cut(video, (start, top, left), window)
    return clean.flip(-1) if torch.rand((), generator=random) < 0.5 else clean


def centre_cut(video: Tensor, window: Window, *, last: bool = False) -> Tensor:
    """The window at the centre of the frame, in the middle of the clip or at its end."""
    frames, rows, columns = (size - side for size, side in zip(video.shape[1:], window))
    return cut(video, (frames if last else frames // 2, rows // 2, columns // 2), window)
